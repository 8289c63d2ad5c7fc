"""Exact attention: torch's kernels behind the contract, against the float64 definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import longspan
from longspan import ExactConfig, exact_attention, exact_attention_varlen, exact_attention_with_lse
from longspan.exact.api import _DenseGradient
from longspan.exact.impl.plan import plan, split_square
from longspan.testing import assert_within_budget, in_float64, make_qkv, softmax_oracle

SHAPES = [  # n_q, n_k, query_offset
    (1, 1, 0),
    (33, 33, 0),
    (7, 40, 33),
    (7, 40, 20),
    (40, 7, 0),
    (40, 20, -10),
    (1, 50, 49),
    (5, 50, 100),
    (6, 9, -6),
]


def low_precision(q, k, v, **common):
    """Plain dense torch in the dtype of the inputs."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    rows = torch.arange(q.shape[2])[:, None] + common.get("query_offset", 0)
    cols = torch.arange(k.shape[2])
    hidden = cols > rows if common.get("is_causal") else torch.zeros(1, 1, dtype=torch.bool)
    hidden = hidden[None, None]
    if common.get("key_lengths") is not None:
        hidden = hidden | (cols >= common["key_lengths"][:, None, None, None])
    weights = torch.softmax(scores.masked_fill(hidden, -1e4), -1)
    return weights.masked_fill(hidden.all(-1, keepdim=True), 0) @ v


@pytest.mark.parametrize("backend", ["auto", "chunked"])
@pytest.mark.parametrize(("n_q", "n_k", "offset"), SHAPES)
@pytest.mark.parametrize("is_causal", [True, False])
def test_values_and_gradients_match_definition(n_q, n_k, offset, is_causal, backend):
    q, k, v = make_qkv(2, 4, n_q, 8, n_k=n_k, kv_heads=2, value_dim=6, dtype=torch.float64,
                       requires_grad=True)  # fmt: skip
    lengths = torch.tensor([n_k, max(n_k - 3, 0)], dtype=torch.int32)
    common = {"is_causal": is_causal, "query_offset": offset, "key_lengths": lengths}
    got = exact_attention_with_lse(q, k, v, enable_gqa=True, config=ExactConfig(backend=backend),
                                   **common)  # fmt: skip
    want = softmax_oracle(q, k, v, **common)
    torch.testing.assert_close(got.output, want.output, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-10, atol=1e-10)
    seen = torch.isfinite(want.lse)
    up_o, up_l = torch.randn_like(want.output), torch.randn_like(want.lse)

    def gradients(result):
        lse = torch.where(seen, result.lse, 0.0)
        loss = (result.output * up_o).sum() + (lse * up_l).sum()
        return torch.autograd.grad(loss, (q, k, v))

    for a, b in zip(gradients(got), gradients(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["auto", "chunked"])
@pytest.mark.parametrize("kind", ["normal", "peaked", "large", "zero"])
def test_error_budget(dtype, backend, kind):
    q, k, v = make_qkv(1, 4, 48, 16, n_k=70, kv_heads=2, dtype=dtype, kind=kind, transposed=True)
    common = {"is_causal": True, "query_offset": 22}
    got = exact_attention_with_lse(q, k, v, enable_gqa=True, config=ExactConfig(backend=backend),
                                   **common)  # fmt: skip
    want = in_float64(softmax_oracle, q, k, v, **common)
    assert_within_budget(got.output, want.output, low_precision(q, k, v, **common))
    assert got.lse.dtype is torch.float32
    if kind == "zero":
        counts = torch.arange(23, 71).float().log()
        # torch's CPU kernel takes a faster, less exact exponential in half precision
        bound = 1e-6 if dtype is torch.float32 or backend == "chunked" else 1e-4
        torch.testing.assert_close(got.lse, counts.expand_as(got.lse), rtol=bound, atol=bound)


def test_gradient_through_lse_keeps_half_precision_accuracy():
    """dlse travels as two columns: with one, its own rounding would show."""
    q, k, v = make_qkv(1, 2, 64, 16, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.full((1, 2, 64), 1.00390625 + 2**-10)
    got = exact_attention_with_lse(q, k, v, is_causal=True).lse
    dq = torch.autograd.grad(got, q, upstream)[0]
    q64 = q.detach().double().requires_grad_()
    lse = softmax_oracle(q64, k.detach(), v.detach(), is_causal=True).lse
    want = torch.autograd.grad(lse, q64, upstream.double())[0]
    assert (dq.double() - want).norm() / want.norm() < 4e-3


def test_gradcheck_through_output_and_lse():
    q, k, v = make_qkv(1, 2, 5, 4, n_k=7, dtype=torch.float64, requires_grad=True)

    def function(q, k, v):
        return tuple(exact_attention_with_lse(q, k, v, is_causal=True, query_offset=2))

    assert torch.autograd.gradcheck(function, (q, k, v))


def test_is_torch_bit_for_bit():
    q, k, v = make_qkv(2, 4, 40, 16, kv_heads=2)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(exact_attention(q, k, v, is_causal=True, enable_gqa=True), want)
    mask = torch.rand(40, 40) > 0.3
    want = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert torch.equal(exact_attention(q, k, v, mask, enable_gqa=True), want)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_with_lse(kind):
    q, k, v = make_qkv(2, 2, 9, 8, n_k=12, dtype=torch.float64, requires_grad=True)
    allowed = torch.rand(2, 1, 9, 12) > 0.4
    allowed[:, :, 3] = False
    mask = allowed if kind == "bool" else torch.randn(1, 2, 9, 12, dtype=torch.float64)
    lengths = torch.tensor([12, 5], dtype=torch.int32)
    got = exact_attention_with_lse(q, k, v, mask, key_lengths=lengths)
    want = exact_attention_with_lse(q, k, v, mask, key_lengths=lengths, impl="reference")
    torch.testing.assert_close(got.output, want.output)
    torch.testing.assert_close(got.lse, want.lse)
    up = torch.randn_like(got.output)
    for a, b in zip(torch.autograd.grad(got.output, (q, k, v), up),
                    torch.autograd.grad(want.output, (q, k, v), up), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_varlen_equals_separate(impl):
    lengths_q, lengths_k = [3, 0, 5, 1], [3, 2, 9, 4]
    cu_q = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
    cu_k = torch.tensor([0, 3, 5, 14, 18], dtype=torch.int32)
    q = torch.randn(9, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(18, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    got = exact_attention_varlen(q, k, v, cu_q, cu_k, 5, 9, is_causal=True, enable_gqa=True,
                                 impl=impl)  # fmt: skip
    rows = []
    for s in range(4):
        part = [
            t[c[s] : c[s + 1]].transpose(0, 1)[None] for t, c in ((q, cu_q), (k, cu_k), (v, cu_k))
        ]
        offset = lengths_k[s] - lengths_q[s]
        rows.append(
            softmax_oracle(*part, is_causal=True, query_offset=offset).output[0].transpose(0, 1)
        )
    want = torch.cat(rows)
    torch.testing.assert_close(got, want)
    up = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), up),
                    torch.autograd.grad(want, (q, k, v), up), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["auto", "chunked"])
@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (1, 2, 0, 4), (1, 2, 4, 0)])
def test_empty_tensors(shape, backend):
    batch, heads, n_q, n_k = shape
    q, k, v = make_qkv(batch, heads, n_q, 8, n_k=n_k, requires_grad=True)
    got = exact_attention_with_lse(q, k, v, is_causal=True, config=ExactConfig(backend=backend))
    assert got.output.shape == (batch, heads, n_q, 8)
    assert (got.output == 0).all() or n_k
    got.output.sum().backward()
    assert q.grad.shape == q.shape
    assert exact_attention(q, k, v).shape == (batch, heads, n_q, 8)


def test_padding_and_batch_neighbours_do_not_matter():
    q, k, v = make_qkv(3, 2, 10, 8)
    lengths = torch.tensor([10, 4, 7], dtype=torch.int32)
    want = exact_attention(q, k, v, is_causal=True, key_lengths=lengths)
    k[1, :, 4:], v[1, :, 4:] = float("nan"), float("inf")
    k[0] *= 2
    got = exact_attention(q, k, v, is_causal=True, key_lengths=lengths)
    assert torch.equal(got[1:], want[1:])
    chunked = ExactConfig(backend="chunked")
    got = exact_attention(q, k, v, is_causal=True, key_lengths=lengths, config=chunked)
    assert torch.isfinite(got[1:]).all()


def test_non_finite_input_shows_in_the_rows_that_see_it():
    q, k, v = make_qkv(1, 1, 6, 8)
    k[0, 0, 3, 0] = float("nan")
    got = exact_attention_with_lse(q, k, v, is_causal=True)
    assert torch.isnan(got.lse[0, 0, 3:]).all()
    assert torch.isnan(got.output[0, 0, 3:]).all()


def test_lse_memory_is_linear():
    """No tensor of N_q x N_k elements exists, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    q, k, v = make_qkv(1, 1, 3000, 8, requires_grad=True)
    with Watch():
        result = exact_attention_with_lse(q, k, v, is_causal=True, query_offset=0)
        (result.output.sum() + result.lse.sum()).backward()
    assert largest <= 3000 * 16


@pytest.mark.parametrize("n_q", range(6))
@pytest.mark.parametrize("n_k", range(6))
@pytest.mark.parametrize("offset", range(-4, 7))
@pytest.mark.parametrize("square", [False, True])
def test_plan_covers_each_visible_score_once(n_q, n_k, offset, square):
    count = torch.zeros(n_q, n_k, dtype=torch.int64)
    for part in plan(n_q, n_k, True, offset):
        for piece in split_square(part) if square else [part]:
            rows, keys = piece.q_end - piece.q_start, piece.k_end - piece.k_start
            seen = torch.ones(rows, keys, dtype=torch.int64)
            if piece.is_causal:
                assert rows == keys or not square
                seen = seen.tril(keys - rows)
            assert (seen.sum(-1) > 0).all()
            count[piece.q_start : piece.q_end, piece.k_start : piece.k_end] += seen
    visible = torch.arange(n_k)[None, :] <= torch.arange(n_q)[:, None] + offset
    assert torch.equal(count, visible.long())


def test_opcheck_in_low_precision_and_transposed():
    for dtype, transposed in ((torch.bfloat16, False), (torch.float32, True)):
        q, k, v = make_qkv(1, 2, 6, 8, n_k=9, dtype=dtype, transposed=transposed,
                           requires_grad=True)  # fmt: skip
        lengths = torch.tensor([8], dtype=torch.int32)
        torch.library.opcheck(
            torch.ops.longspan.exact_fwd.default,
            (q, k, v, None, lengths, True, 0.3, 3, "cpu"),
        )


def test_compiles_in_one_graph():
    q, k, v = make_qkv(1, 2, 6, 8, n_k=9, requires_grad=True)

    def function(q, k, v):
        part = exact_attention_with_lse(q, k, v, is_causal=True, query_offset=3)
        return part.output.sum() + part.lse.sum() + exact_attention(q, k, v).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), function(q, k, v))
    want = torch.autograd.grad(function(q, k, v), (q, k, v))
    for a, b in zip(torch.autograd.grad(compiled(q, k, v), (q, k, v)), want, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_casts_like_torch():
    q, k, v = make_qkv(1, 2, 6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert exact_attention(q, k, v).dtype is torch.bfloat16
        part = exact_attention_with_lse(q, k, v)
    assert part.output.dtype is torch.bfloat16
    assert part.lse.dtype is torch.float32


@pytest.mark.parametrize(
    ("arguments", "config", "words"),
    [
        ({"attn_mask": torch.ones(6, 6, dtype=torch.bool), "is_causal": True}, None, "both given"),
        ({"attn_mask": torch.ones(6, 5, dtype=torch.bool)}, None, "must broadcast to"),
        ({"attn_mask": torch.ones(6, 6, dtype=torch.int64)}, None, "must be boolean"),
        ({"dropout_p": 0.1, "query_offset": 2, "is_causal": True}, None, "dropout_p is 0.1"),
        ({}, ExactConfig(backend="cudnn"), "needs CUDA tensors"),
        ({"key_lengths": torch.ones(1, dtype=torch.int32)}, ExactConfig(backend="efficient"),
         "allowed are auto"),
        ({"impl": "triton"}, None, "no such implementation"),
        ({"impl": "flash"}, None, "Allowed: auto"),
    ],
)  # fmt: skip
def test_refusals(arguments, config, words):
    q, k, v = make_qkv(1, 2, 6, 8)
    with pytest.raises(longspan.LongspanError, match=words):
        exact_attention(q, k, v, config=config or ExactConfig(), **arguments)


def test_unknown_backend_names_the_nearest():
    with pytest.raises(longspan.ConfigError, match="Did you mean 'flash'"):
        ExactConfig(backend="flsh")


def test_inconsistent_cu_seqlens_raise():
    q = torch.randn(6, 2, 8)
    cu = torch.tensor([0, 4, 3, 6], dtype=torch.int32)
    with pytest.raises(longspan.ShapeError, match="never fall"):
        exact_attention_varlen(q, q, q, cu, cu, 6, 6)
    cu = torch.tensor([0, 4, 6], dtype=torch.int32)
    with pytest.raises(longspan.ShapeError, match="max_seqlen_q is 3"):
        exact_attention_varlen(q, q, q, cu, cu, 3, 6)


def test_gradient_for_torchs_kernel_is_dense():
    """A slice as upstream gradient reaches the kernel as a copy with the same values."""
    seen = []
    leaf = torch.zeros(1, 2, 4, 3, requires_grad=True)
    inner = leaf * 1.0
    inner.register_hook(lambda grad: seen.append(grad))
    upstream = torch.randn(1, 2, 9, 3)[:, :, :4]
    assert not upstream.is_contiguous()
    _DenseGradient.apply(inner).backward(upstream)
    assert seen[0].is_contiguous()
    assert torch.equal(leaf.grad, upstream)


@pytest.mark.parametrize(("wide", "strides"), [(5, (20, 60, 5, 1)), (8, (40, 20, 5, 1))])
def test_gradient_in_the_layout_of_the_output_is_not_copied(wide, strides):
    """Segments as a batch: output and gradient are both permuted. With gaps it is copied."""
    seen = []
    base = torch.zeros(2, 3, 4, wide, requires_grad=True)
    output = base.transpose(0, 1)[..., :5]
    output.register_hook(lambda grad: seen.append(grad))
    upstream = torch.randn(2, 3, 4, wide).transpose(0, 1)[..., :5]
    assert upstream.stride() == output.stride()
    _DenseGradient.apply(output).backward(upstream)
    assert seen[0].stride() == strides
    assert torch.equal(base.grad[..., :5], upstream.transpose(0, 1))
