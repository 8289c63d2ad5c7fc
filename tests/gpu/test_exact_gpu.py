"""Exact attention on a CUDA device: torch's kernels and the chunked form against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from longspan import ExactConfig, exact_attention, exact_attention_varlen, exact_attention_with_lse
from longspan._merge import merge
from longspan.testing import make_qkv, relative_error, softmax_oracle
from longspan.types import AttentionOutput

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["flash", "cudnn", "chunked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_q", "n_k", "offset"), [(257, 257, 0), (65, 300, 235), (300, 65, -20)])
@pytest.mark.parametrize("dim", [(64, 64), (80, 48)])
def test_values_and_gradients(backend, dtype, n_q, n_k, offset, dim):
    q, k, v = make_qkv(2, 4, n_q, dim[0], n_k=n_k, kv_heads=2, value_dim=dim[1], dtype=dtype,
                       device="cuda", requires_grad=True)  # fmt: skip
    lengths = torch.tensor([n_k, n_k - 9], dtype=torch.int32, device="cuda")
    common = {"is_causal": True, "query_offset": offset, "key_lengths": lengths}
    got = exact_attention_with_lse(q, k, v, enable_gqa=True, config=ExactConfig(backend=backend),
                                   **common)  # fmt: skip
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    want = softmax_oracle(*wide, **common)
    seen = torch.isfinite(want.lse)
    assert torch.equal(torch.isfinite(got.lse), seen)
    assert relative_error(got.output, want.output) < 5e-3
    torch.testing.assert_close(got.lse[seen].double(), want.lse[seen], rtol=1e-4, atol=1e-4)
    up_o = torch.randn_like(want.output)
    up_l = torch.randn_like(want.lse)

    def gradients(result, inputs):
        lse = torch.where(seen, result.lse, 0.0)
        loss = (result.output.double() * up_o).sum() + (lse.double() * up_l).sum()
        return torch.autograd.grad(loss, inputs)

    for a, b in zip(gradients(got, (q, k, v)), gradients(want, wide), strict=True):
        assert relative_error(a, b) < 1e-2


@pytest.mark.parametrize("length", [64, 1000, 4096])
def test_cudnn_parts_join(length):
    """Two halves of the keys with cuDNN's lse, and its backward from the lse of the whole row."""
    from longspan.exact.ops import exact_bwd, exact_fwd

    q, k, v = make_qkv(1, 4, length, 64, n_k=2 * length, kv_heads=2, dtype=torch.bfloat16,
                       device="cuda")  # fmt: skip
    cuts = ((slice(0, length), False), (slice(length, None), True))
    halves = [(k[:, :, part], v[:, :, part], is_causal) for part, is_causal in cuts]
    scale = 64**-0.5
    parts = [AttentionOutput(*exact_fwd(q, a, b, None, None, c, scale, 0, "cudnn"))
             for a, b, c in halves]  # fmt: skip
    got = merge(parts)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    want = softmax_oracle(*wide, is_causal=True, query_offset=length, scale=scale)
    assert relative_error(got.output, want.output) < 5e-3
    torch.testing.assert_close(got.lse.double(), want.lse, rtol=1e-4, atol=1e-4)
    up = torch.randn(1, 4, 2 * length, 64, dtype=torch.bfloat16, device="cuda")[:, :, :length]
    whole = got.output.to(q.dtype)
    grads = [exact_bwd(up, None, q, a, b, whole, got.lse, None, None, c, scale, 0, "cudnn")
             for a, b, c in halves]  # fmt: skip
    joined = (grads[0][0].float() + grads[1][0].float(),
              torch.cat([g[1] for g in grads], 2), torch.cat([g[2] for g in grads], 2))  # fmt: skip
    expected = torch.autograd.grad(want.output, wide, up.double())
    for a, b in zip(joined, expected, strict=True):
        assert relative_error(a, b) < 1e-2


@pytest.mark.parametrize("backend", ["auto", "flash", "cudnn", "efficient"])
def test_torch_backends(backend):
    q, k, v = make_qkv(2, 4, 256, 64, dtype=torch.bfloat16, device="cuda")
    got = exact_attention(q, k, v, is_causal=True, config=ExactConfig(backend=backend))
    want = softmax_oracle(q, k, v, is_causal=True).output
    assert relative_error(got, want) < 5e-3


def test_auto_is_as_fast_as_the_faster_of_flash_and_cudnn():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from longspan.bench.measure import time_call

    q, k, v = make_qkv(1, 16, 8192, 128, dtype=torch.bfloat16, device="cuda")
    best = float("inf")
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            timing = time_call(
                lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), device=q.device
            )
        best = min(best, timing.ms_p50)
    ours = time_call(lambda: exact_attention(q, k, v, is_causal=True), device=q.device)
    assert ours.ms_p50 < 1.15 * best


def test_varlen_with_gradients_equals_separate():
    marks = [0, 100, 100, 357, 400]
    cu = torch.tensor(marks, dtype=torch.int32, device="cuda")
    q = torch.randn(400, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(400, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(2))  # fmt: skip
    got = exact_attention_varlen(q, k, v, cu, cu, 257, 257, is_causal=True, enable_gqa=True)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    rows = []
    for start, end in itertools.pairwise(marks):
        part = [t[start:end].transpose(0, 1)[None] for t in wide]
        rows.append(softmax_oracle(*part, is_causal=True).output[0].transpose(0, 1))
    want = torch.cat(rows)
    assert relative_error(got, want) < 5e-3
    up = torch.randn_like(want)
    got_grads = torch.autograd.grad(got, (q, k, v), up.bfloat16())
    for a, b in zip(got_grads, torch.autograd.grad(want, wide, up), strict=True):
        assert relative_error(a, b) < 1e-2


def test_decoding_and_long_lse():
    q, k, v = make_qkv(1, 8, 1, 128, n_k=70_000, kv_heads=2, dtype=torch.bfloat16, device="cuda")
    got = exact_attention_with_lse(q, k, v, is_causal=True, enable_gqa=True, query_offset=69_999)
    want = softmax_oracle(q, k, v)
    assert relative_error(got.output, want.output) < 5e-3
    torch.testing.assert_close(got.lse.double(), want.lse, rtol=1e-4, atol=1e-4)


def test_gradient_that_is_a_slice_of_a_longer_one():
    """torch.cat hands its backward slices: strides that cuDNN's own backward misreads."""
    q, k, v = make_qkv(1, 8, 256, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    upstream = torch.randn(1, 8, 1024, 128, device="cuda", dtype=torch.bfloat16)[:, :, :256]
    got = torch.autograd.grad(exact_attention(q, k, v, is_causal=True), (q, k, v), upstream)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    want = torch.autograd.grad(
        softmax_oracle(*wide, is_causal=True).output, wide, upstream.double()
    )
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-2


def test_gradient_of_segments_as_a_batch():
    """Query, output and gradient permuted alike: the gradient goes to the kernel as it is."""
    flat = make_qkv(1, 8, 1024, 128, dtype=torch.bfloat16, device="cuda")
    q, k, v = (t.unflatten(2, (4, 256)).squeeze(0).transpose(0, 1).requires_grad_() for t in flat)
    out = exact_attention(q, k, v, is_causal=True)
    upstream = torch.randn(8, 4, 256, 128, device="cuda", dtype=torch.bfloat16).transpose(0, 1)
    assert out.stride() == upstream.stride()
    got = torch.autograd.grad(out, (q, k, v), upstream)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    want = torch.autograd.grad(
        softmax_oracle(*wide, is_causal=True).output, wide, upstream.double()
    )
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-2
