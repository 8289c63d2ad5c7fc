"""The gated delta rule behind the same state: what it computes and how it differs."""

from __future__ import annotations

import pytest
import torch

from longspan import (
    InfiniConfig,
    ShapeError,
    UnsupportedError,
    infini_attention,
    infini_attention_varlen,
)
from longspan.infini.impl.kernels import kernel_refusal

F64 = torch.float64
IMPLS = ["reference", "eager"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("length", [1, 5, 150])
def test_the_memory_is_that_of_the_paper(impl, length):
    """S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, written as matrices (2412.06464)."""
    n, d, dv = 2 * length, 4, 3
    k, v = draw(1, 1, n, d), draw(1, 1, n, dv, seed=1)
    beta, log_a = torch.sigmoid(draw(1, 1, n, seed=2)), -draw(1, 1, n, seed=3).abs()
    state = torch.zeros(d, dv, dtype=F64)
    for t in range(n):
        unit = k[0, 0, t] / k[0, 0, t].norm()
        keep = torch.eye(d, dtype=F64) - beta[0, 0, t] * torch.outer(unit, unit)
        state = log_a[0, 0, t].exp() * keep @ state
        state = state + beta[0, 0, t] * torch.outer(unit, v[0, 0, t])
    config = InfiniConfig(segment_length=length, update="gated_delta")
    result = infini_attention(
        k, k, v, config=config, write_gate=beta, log_decay=log_a, impl=impl
    ).final_state
    torch.testing.assert_close(result.memory[0, 0], state, rtol=1e-9, atol=1e-9)
    assert (result.normaliser == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_value_that_changes_is_overwritten(impl):
    """The paper's rules keep the old value in; this one reads the new value alone."""
    key = draw(1, 1, 1, 8).expand(1, 1, 3, 8)
    value = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]], dtype=F64)[None, None]
    gate = torch.full((1,), 1e9, dtype=F64)
    reads = {}
    for update in ("linear", "delta", "gated_delta"):
        config = InfiniConfig(segment_length=1, update=update)
        output = infini_attention(key, key, value, gate=gate, config=config, impl=impl).output
        reads[update] = output[0, 0, 2].tolist()
    assert reads["linear"] == pytest.approx([0.5, 0.5])
    assert reads["delta"] == pytest.approx([0.0, 0.5])
    assert reads["gated_delta"] == pytest.approx([0.0, 1.0])


def test_gradients_of_strength_and_decay():
    n = 7
    q, k, v = (draw(1, 1, n, 3, seed=s).requires_grad_() for s in range(3))
    beta = torch.sigmoid(draw(1, 1, n, seed=4)).requires_grad_()
    decay = (-draw(1, 1, n, seed=5).abs()).requires_grad_()
    config = InfiniConfig(segment_length=3, update="gated_delta")

    def run(q, k, v, beta, decay):
        return infini_attention(
            q, k, v, config=config, write_gate=beta, log_decay=decay, impl="eager"
        ).output

    assert torch.autograd.gradcheck(run, (q, k, v, beta, decay))


def test_packed_sequences_take_their_own_strengths():
    q, k, v = (draw(13, 2, 4, seed=s) for s in range(3))
    beta, decay = torch.sigmoid(draw(13, 2, seed=4)), -draw(13, 2, seed=5).abs()
    config = InfiniConfig(segment_length=3, update="gated_delta")
    cu = torch.tensor([0, 5, 13], dtype=torch.int32)
    packed = infini_attention_varlen(
        q, k, v, cu, cu, 8, 8, config=config, write_gate=beta, log_decay=decay
    )
    for start, stop in ((0, 5), (5, 13)):
        one = [t[start:stop].transpose(0, 1)[None] for t in (q, k, v)]
        rates = [t[start:stop].T[None] for t in (beta, decay)]
        alone = infini_attention(*one, config=config, write_gate=rates[0], log_decay=rates[1])
        torch.testing.assert_close(packed[start:stop], alone.output[0].transpose(0, 1))
    plain = infini_attention_varlen(q, k, v, cu, cu, 8, 8, config=config)
    assert (plain - packed).abs().max() > 0.01
    with pytest.raises(ShapeError, match=r"write_gate is \(13,\); it must be \(total_k, H_kv\)"):
        infini_attention_varlen(q, k, v, cu, cu, 8, 8, config=config, write_gate=beta[:, 0])


def test_kernels_say_that_they_have_none():
    config = InfiniConfig(update="gated_delta")
    refusal = kernel_refusal(config, torch.bfloat16, torch.device("cpu"), 64, 64)
    assert refusal == "update='gated_delta' has no Triton kernel"
    q = draw(1, 1, 4, 16).bfloat16()
    with pytest.raises(UnsupportedError):
        infini_attention(q, q, q, config=config, impl="triton")
    with pytest.raises(UnsupportedError, match="only update='gated_delta' uses it"):
        infini_attention(q, q, q, write_gate=torch.ones(1, 1, 4))
