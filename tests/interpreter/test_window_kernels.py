"""Window kernels in the interpreter: values and all gradients against the float64 definition."""

from __future__ import annotations

import pytest
import torch

from longspan import (
    WindowConfig,
    explain,
    window_attention,
    window_attention_varlen,
    window_attention_with_lse,
)
from longspan._triton.launch import KernelConfig, pick
from longspan._validation import validate
from longspan.testing import make_qkv
from longspan.window import window_attention_chunk
from longspan.window.impl.reference import window_reference
from longspan.window.impl.triton import forward
from longspan.window.impl.triton.forward import triton_forward
from longspan.window.impl.triton.tiles import descriptors
from longspan.window.ops import window_fwd
from window_cases import CASES, Case, assert_matches_reference, attend


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_float32(case, nan_scratch):
    assert_matches_reference(case, "triton", torch.float32)


@pytest.mark.parametrize("is_one_loop", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_both_orders_of_tiles(case, is_one_loop, nan_scratch):
    """The forward of both kinds of configuration, whichever is the default."""
    q, k, v = make_qkv(case.batch, case.heads, case.n_q, case.dim, n_k=case.n_k,
                       kv_heads=case.kv_heads, value_dim=case.value_dim, kind=case.kind,
                       transposed=case.transposed)  # fmt: skip
    lengths = torch.tensor([case.n_k, case.n_k - 5]) if case.padded else None
    config = WindowConfig(window=case.window, num_sinks=case.sinks)
    call = validate("test", q, k, v, is_causal=case.is_causal, scale=case.scale, enable_gqa=True,
                    query_offset=case.offset, key_lengths=lengths)  # fmt: skip
    kernel = pick([KernelConfig(64, 64, 4, 2, is_one_loop=is_one_loop)])
    assert kernel.is_one_loop == is_one_loop
    got = triton_forward(call, config, None, None, 0, 0, kernel)
    want = window_reference(call._replace(query=q.double(), key=k.double(), value=v.double()),
                            config)  # fmt: skip
    size = max(1.0, want.lse.masked_fill(want.lse.isinf(), 0.0).abs().max().item())
    assert got[0].shape == want.output.shape
    torch.testing.assert_close(got[0].double(), want.output, rtol=0, atol=2e-6 * size)
    torch.testing.assert_close(got[1].double(), want.lse, rtol=0, atol=2e-6 * size)


@pytest.mark.parametrize("case", CASES[::3], ids=lambda c: c.id)
def test_copied_tiles_equal_loaded_ones(case, nan_scratch, monkeypatch):
    """Tiles by the tensor memory accelerator, against pointers: the same bits."""
    if case.padded:
        pytest.skip("key_lengths always take pointers")
    q, k, v = make_qkv(case.batch, case.heads, case.n_q, case.dim, n_k=case.n_k,
                       kv_heads=case.kv_heads, value_dim=case.value_dim, kind=case.kind,
                       transposed=case.transposed, dtype=torch.bfloat16)  # fmt: skip
    config = WindowConfig(window=case.window, num_sinks=case.sinks)
    call = validate("test", q, k, v, is_causal=case.is_causal, scale=case.scale, enable_gqa=True,
                    query_offset=case.offset)  # fmt: skip
    made = []
    monkeypatch.setattr(forward, "descriptors", lambda *a: made.append(a[0]) or descriptors(*a))
    by_pointers, by_copies = (
        triton_forward(call, config, None, None, 0, 0,
                       pick([KernelConfig(64, 64, 4, 2, is_tma=is_tma)]))
        for is_tma in (False, True)
    )  # fmt: skip
    assert made == [False, True]
    for got, want in zip(by_copies, by_pointers, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case", CASES[6:8] + CASES[18:19] + CASES[24:28] + CASES[29:30], ids=lambda c: c.id
)
def test_half_precision(case, dtype, nan_scratch):
    assert_matches_reference(case, "triton", dtype)


@pytest.mark.parametrize("is_causal", [True, False])
def test_packed(is_causal, nan_scratch):
    lengths_q, lengths_k = [3, 0, 40, 1, 5], [3, 2, 61, 20, 2]
    cu_q = torch.tensor([0, *lengths_q]).cumsum(0).int()
    cu_k = torch.tensor([0, *lengths_k]).cumsum(0).int()
    q = torch.randn(49, 4, 8, requires_grad=True)
    k = torch.randn(88, 2, 8, requires_grad=True)
    v = torch.randn(88, 2, 6, requires_grad=True)
    config = WindowConfig(window=9, num_sinks=2)
    up = torch.randn(49, 6, 4).transpose(1, 2)

    def run(impl):
        out = window_attention_varlen(q, k, v, cu_q, cu_k, 64, 70, is_causal=is_causal,
                                      enable_gqa=True, config=config, impl=impl)  # fmt: skip
        return out, *torch.autograd.grad(out, (q, k, v), up)

    for got, want in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("is_causal", [True, False])
def test_padding_never_reaches_a_result(is_causal):
    q, k, v = make_qkv(2, 2, 50, 8)
    k[1, :, 31:] = float("nan")
    v[1, :, 31:] = float("inf")
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    lengths = torch.tensor([50, 31], dtype=torch.int32)

    def run(impl):
        out = window_attention(q, k, v, is_causal=is_causal, key_lengths=lengths, impl=impl,
                               config=WindowConfig(window=12, num_sinks=3))  # fmt: skip
        return out, *torch.autograd.grad(out.sum(), (q, k, v))

    for got, want in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_batch_neighbours_and_repetition_change_no_bit():
    case = Case(50, 50, window=20, sinks=4)
    q, k, v = make_qkv(2, 2, 50, 16, kv_heads=1)
    whole, again = attend(case, "triton", q, k, v), attend(case, "triton", q, k, v)
    alone = window_attention_with_lse(q[1:2], k[1:2], v[1:2], is_causal=True, enable_gqa=True,
                                      config=WindowConfig(window=20), impl="triton")  # fmt: skip
    assert torch.equal(whole.output[1:2], alone.output)
    assert torch.equal(whole.lse[1:2], alone.lse)
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a, b)


def test_the_future_never_changes_the_past():
    q, k, v = make_qkv(1, 2, 60, 8)
    config = WindowConfig(window=10, num_sinks=2)
    before = window_attention(q, k, v, is_causal=True, config=config, impl="triton")
    for tensor in (q, k, v):
        tensor[:, :, 37:] = torch.randn_like(tensor[:, :, 37:]) * 9
    after = window_attention(q, k, v, is_causal=True, config=config, impl="triton")
    assert torch.equal(before[:, :, :37], after[:, :, :37])


def test_a_non_finite_key_stays_near():
    q, k, v = make_qkv(1, 1, 96, 8)
    config = WindowConfig(window=16, num_sinks=0)
    clean = window_attention(q, k, v, is_causal=True, config=config, impl="triton")
    k[:, :, 40] = float("nan")
    dirty = window_attention(q, k, v, is_causal=True, config=config, impl="triton")
    assert not torch.isfinite(dirty[:, :, 40:56]).any()
    assert torch.equal(dirty[:, :, :32], clean[:, :, :32])
    assert torch.equal(dirty[:, :, 64:], clean[:, :, 64:])


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)])
def test_empty_tensors(shape):
    batch, heads, n_q, n_k = shape
    q, k, v = make_qkv(batch, heads, n_q, 8, n_k=n_k, requires_grad=True)
    got = window_attention_with_lse(q, k, v, is_causal=True, impl="triton")
    assert bool((got.output == 0).all())
    assert bool((got.lse == float("-inf")).all())
    grads = torch.autograd.grad(got.output.sum(), (q, k, v))
    assert all(bool((g == 0).all()) for g in grads)


def test_any_stride():
    """Last stride 2, expanded batch, sliced heads, and an expanded upstream gradient."""
    base = torch.randn(2, 4, 40, 32)
    q = base[..., ::2]
    k = torch.randn(1, 2, 40, 16).expand(2, 2, 40, 16)
    v = torch.randn(2, 5, 40, 16)[:, 1:4:2]
    q, k, v = (t.requires_grad_() for t in (q, k, v))

    def run(impl):
        out = window_attention(q, k, v, is_causal=True, enable_gqa=True, impl=impl,
                               config=WindowConfig(window=12, num_sinks=3))  # fmt: skip
        return out, *torch.autograd.grad(out.sum(), (q, k, v))

    for got, want in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_stream_of_single_tokens():
    q, k, v = make_qkv(1, 2, 24, 8)
    config = WindowConfig(window=5, num_sinks=2)
    whole = window_attention(q, k, v, is_causal=True, config=config, impl="reference")
    state, rows = None, []
    for t in range(24):
        part = (x[:, :, t : t + 1] for x in (q, k, v))
        row, state = window_attention_chunk(*part, state, config=config, impl="triton")
        rows.append(row)
    torch.testing.assert_close(torch.cat(rows, 2), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_opcheck(dtype, transposed):
    q, k, v = make_qkv(2, 4, 9, 8, n_k=12, kv_heads=2, value_dim=6, dtype=dtype,
                       transposed=transposed, requires_grad=True)  # fmt: skip
    settings = (True, 0.25, 3, 7, 2, "triton")
    torch.library.opcheck(window_fwd, (q, k, v, None, None, None, 0, 0, *settings))


def test_auto_takes_the_kernels_and_says_so():
    q, k, v = make_qkv(1, 2, 20, 8)
    told = explain(q, k, v, WindowConfig(window=4), is_causal=True)
    assert told.chosen == "triton"
    refused = explain(q.double(), k.double(), v.double(), WindowConfig(), is_causal=True)
    assert refused.chosen == "eager"
    assert "float64" in refused.reports[0].refusal
    q, k, v = make_qkv(1, 1, 4, 16, value_dim=200)
    refused = explain(q, k, v, WindowConfig())
    assert refused.chosen == "eager"
    assert "up to 128 in float32" in refused.reports[0].refusal
    half = explain(q.half(), k.half(), v.half(), WindowConfig())
    assert half.chosen == "triton"
