"""Converted models on a GPU: kernels in the layers, streams, a step of training."""

from __future__ import annotations

import copy

import pytest
import torch

pytestmark = pytest.mark.gpu
transformers = pytest.importorskip("transformers")

from longspan.hf import convert_infini, load_cache, make_cache, save_cache  # noqa: E402
from longspan.nn import gate_parameter_groups  # noqa: E402

LENGTH = 64


def model(dtype=torch.float32, device="cpu"):
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        initializer_range=0.05, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(config).eval().to(device=device, dtype=dtype)


def ids(count, batch=2):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 200, (batch, count), generator=generator).cuda()


def chunks(net, tokens, sizes, cache):
    with torch.no_grad():
        return torch.cat(
            [net(c, past_key_values=cache).logits for c in tokens.split(sizes, 1)], 1
        )  # fmt: skip


@pytest.mark.parametrize("update", ["linear", "delta", "gated_delta"])
def test_bfloat16_errs_as_little_as_plain_torch_does(update):
    tokens = ids(300)
    oracle = model(torch.float64)
    with convert_infini(oracle, LENGTH, update=update), torch.no_grad():
        want = oracle(tokens.cpu()).logits.cuda()
    low = model(torch.bfloat16, "cuda")
    errors = {}
    for impl in ("eager", "auto"):
        with convert_infini(low, LENGTH, update=update, impl=impl), torch.no_grad():
            errors[impl] = (low(tokens).logits.double() - want).abs().max()
    assert errors["auto"] <= 2 * errors["eager"] + 1e-3
    assert errors["eager"] < 0.1 * want.abs().max()


def test_one_segment_is_the_base_model():
    net, tokens = model(torch.bfloat16, "cuda"), ids(LENGTH)
    with torch.no_grad():
        want = net(tokens).logits.float()
        with convert_infini(net, LENGTH):
            torch.testing.assert_close(net(tokens).logits.float(), want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streams_equal_the_whole(dtype, tmp_path):
    net, tokens = model(dtype, "cuda"), ids(230)
    with convert_infini(net, LENGTH, gate_start=0.0):
        with torch.no_grad():
            want = net(tokens, use_cache=False).logits.float()
        cache = make_cache(net)
        got = [chunks(net, tokens[:, :200], [70, 1, 1, 128], cache)]
        save_cache(net, cache, tmp_path / "cache")
        twin, loaded = copy.deepcopy(cache), load_cache(net, tmp_path / "cache")
        ends = [chunks(net, tokens[:, 200:], [1] * 30, held) for held in (cache, twin, loaded)]
        assert torch.equal(ends[0], ends[1])
        assert torch.equal(ends[0], ends[2])
        got = torch.cat((got[0], ends[0]), 1).float()
    tolerance = 1e-3 if dtype is torch.float32 else 0.03
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


def test_a_step_of_training():
    net, tokens = model(torch.bfloat16, "cuda"), ids(256)
    with convert_infini(net, LENGTH, train="gates"):
        net.train()
        groups = gate_parameter_groups(net, lr=0.0, gate_lr=0.1)
        optimizer = torch.optim.AdamW(groups)
        losses = []
        for _ in range(6):
            loss = net(tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]


def test_memory_does_not_grow_with_the_stream():
    net = model(torch.bfloat16, "cuda")
    peaks = []
    with convert_infini(net, LENGTH):
        for count in (4096, 32768):
            cache = make_cache(net)
            torch.cuda.reset_peak_memory_stats()
            with torch.no_grad():
                for chunk in ids(count, 1).split(1024, 1):
                    net(chunk, past_key_values=cache, logits_to_keep=1)
            peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.02 * peaks[0] + 2**20
