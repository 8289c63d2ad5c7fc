"""On the device: biased attention against float64, a compiled step of every variant, the study."""

import json

import numpy as np
import pytest
import torch

from longspan.models import Transformer, TransformerConfig
from longspan.models.forget import decay_totals, forget_attention
from longspan.models.positions import alibi_attention, alibi_slopes
from longspan.studies.stick_breaking_length.variants import VARIANTS
from longspan.testing import make_qkv
from longspan.train import Batches, TokenFile, TrainConfig, train
from longspan.train.loss import LossModel

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def oracle(q, k, v, bias):
    """softmax(scale q k + bias_j), float64; bias (B, H, N_k)."""
    n_q, n_k = q.shape[2], k.shape[2]
    scores = q.double() @ k.double().mT / q.shape[-1] ** 0.5 + bias[:, :, None, :].double()
    rows = torch.arange(n_q, device=q.device)[:, None] + n_k - n_q
    hidden = torch.arange(n_k, device=q.device)[None, :] > rows
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v.double()


@pytest.mark.parametrize("which", ["alibi", "forget"])
@pytest.mark.parametrize("length", [300, 9000])
def test_biased_attention(which, length):
    q, k, v = make_qkv(batch=1, heads=4, n_q=length, head_dim=64, dtype=torch.bfloat16,
                       device="cuda")  # fmt: skip
    if which == "alibi":
        bias = alibi_slopes(4, "cuda").double()[None, :, None] * torch.arange(length, device="cuda")
        found = alibi_attention(q, k, v)
    else:
        logs = torch.nn.functional.logsigmoid(torch.randn(1, 4, length, device="cuda") + 1.0)
        totals = decay_totals(logs)
        bias = -totals
        found = forget_attention(q, k, v, totals)
    wanted = oracle(q[:, :, -200:], k, v, bias - bias[..., -1:])
    error = (found[:, :, -200:].double() - wanted).norm() / wanted.norm()
    assert error < 8e-3


def test_gradient_of_the_gates():
    """That of the totals to the rounding of bfloat16; of the gates, sums of it that cancel, less
    closely (0.05 apart on a CPU too), but in its direction.
    """
    q, k, v = make_qkv(batch=1, heads=4, n_q=700, head_dim=64, dtype=torch.bfloat16,
                       device="cuda")  # fmt: skip
    logs = torch.nn.functional.logsigmoid(torch.randn(1, 4, 700, device="cuda") + 2.0)
    logs.requires_grad_()
    upstream = torch.randn_like(q)
    totals, again = decay_totals(logs), decay_totals(logs)
    found = torch.autograd.grad(forget_attention(q, k, v, totals), (totals, logs), upstream)
    wanted = torch.autograd.grad(oracle(q, k, v, -again), (again, logs), upstream.double())
    assert (found[0] - wanted[0]).norm() < 8e-3 * wanted[0].norm()
    pair = (found[1].double().flatten(), wanted[1].double().flatten())
    assert torch.nn.functional.cosine_similarity(*pair, dim=0) > 0.995


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_compiled_step_equals_plain(variant):
    """Loss and gradients in bfloat16, compiled, against plain float32."""
    config = TransformerConfig(
        vocab_size=256, width=128, layers=2, heads=2, **VARIANTS[variant].settings
    )
    ids = torch.randint(256, (2, 257), device="cuda")
    losses, norms = [], []
    for dtype, compiled in ((torch.float32, False), (torch.bfloat16, True)):
        loss_model = LossModel(Transformer(config).cuda(), dtype)
        if compiled:
            loss_model.compile_parts()
        loss = loss_model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append(loss.item())
        grads = [p.grad.flatten() for p in loss_model.parameters()]
        norms.append(torch.cat(grads))
        loss_model.uncompile()
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert (norms[1] - norms[0]).norm() < 0.05 * norms[0].norm()


def test_training_learns_and_resumes(tmp_path):
    ids = (np.cumsum(np.arange(40_000) // 50 % 3 + 1) % 60 + 1).astype(np.uint16)
    corpus = TokenFile(
        ids=ids, starts=(0,), names=("drawn",), num_bytes=(1,), vocab_size=64,
        tokenizer_sha256="", sha256="",
    )  # fmt: skip
    config = TrainConfig(
        model=TransformerConfig(vocab_size=64, width=128, layers=2, heads=2), steps=40,
        length=128, batch_size=8, dtype="bfloat16", compile=True, checkpoint_every=10,
        learning_rate=3e-3, warmup_steps=5,
    )  # fmt: skip
    source = Batches(corpus, length=128, batch_size=8)
    whole = train(config, source, tmp_path / "whole").rows
    while not (part := train(config, source, tmp_path / "parts", time_limit=0.0)).is_finished:
        pass
    assert whole[-1]["loss"] < whole[0]["loss"] - 1.0
    assert whole[-1]["compiled"] == "yes"
    for a, b in zip(whole, part.rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2), json.dumps([a, b])
