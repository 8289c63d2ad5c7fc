"""The Toeplitz engine against its definition, in values, gradients, range and empty rows."""

from __future__ import annotations

import pytest
import torch

import longspan
from conv_cases import dense_toeplitz
from longspan import ShapeError, toeplitz_attention, toeplitz_attention_with_lse
from longspan.conv_basis.impl import guard
from longspan.conv_basis.impl.engine import Problem, block_size
from longspan.conv_basis.ops import toeplitz_fwd

SHAPES = [  # n_q, n_k, query_offset, groups
    (70, 70, 0, 1),
    (70, 70, 0, 5),
    (20, 90, 70, 3),
    (33, 70, 5, 4),
    (70, 33, 0, 2),
    (40, 40, -6, 2),
    (1, 1, 0, 1),
    (1, 65, 64, 2),
]


def draw(n_q, n_k, offset, groups, is_causal, heads=2, kv_heads=1, dtype=torch.float64):
    length = max(n_q + offset, 1) if is_causal else 2 * (n_q + n_k + abs(offset)) + 1
    kernel = torch.randn(2, heads, groups, length, dtype=dtype)
    value = torch.randn(2, kv_heads, n_k, 5, dtype=dtype)
    starts = torch.randint(0, n_k + 1, (2, heads, groups)).sort(-1).values
    return kernel, value, starts, torch.randn(2, heads, n_k, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("block", [16, 0])
def test_equals_the_definition_with_gradients(shape, is_causal, block):
    n_q, n_k, offset, groups = shape
    kernel, value, starts, key_offset = draw(n_q, n_k, offset, groups, is_causal)
    leaves = [t.requires_grad_() for t in (kernel, key_offset, value)]
    want, want_lse = dense_toeplitz(kernel, value, starts, key_offset, n_q, is_causal, offset)
    out, lse, _ = toeplitz_fwd(kernel, starts, key_offset, value, None, n_q, is_causal, offset,
                               block, "auto")  # fmt: skip
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(lse, want_lse, rtol=1e-10, atol=1e-11)
    upstream, upstream_lse = torch.randn_like(out), torch.randn_like(lse)

    def gradients(output, lse):
        seen = torch.where(lse == float("-inf"), 0.0, lse)
        return torch.autograd.grad((output * upstream).sum() + (seen * upstream_lse).sum(), leaves)

    for got, expected in zip(gradients(out, lse), gradients(want, want_lse), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("is_causal", [True, False])
def test_gradcheck(is_causal):
    kernel, value, starts, key_offset = draw(9, 11, 2, 2, is_causal)
    leaves = [t.requires_grad_() for t in (kernel, key_offset, value)]

    def run(kernel, key_offset, value):
        return toeplitz_attention_with_lse(
            kernel, value, groups=starts, key_offset=key_offset, num_queries=9, query_offset=2,
            is_causal=is_causal,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, leaves)


def kernels(name, n, groups):
    lag = torch.arange(n).double()
    return {
        "rough": lambda: 40 * torch.rand(1, 1, groups, n).double() - 20,
        "decay": lambda: (20 - 40 * lag / n).expand(1, 1, groups, n),
        "fast decay": lambda: (40 * torch.exp(-lag / 30) - 20).expand(1, 1, groups, n),
        "grow": lambda: (40 * lag / n - 20).expand(1, 1, groups, n),
        "fast growth": lambda: (20 - 40 * torch.exp(-lag / 30)).expand(1, 1, groups, n),
        "wave": lambda: (20 * torch.sin(lag / 7)).expand(1, 1, groups, n),
        "steps": lambda: (
            20 * torch.randn(1, 1, groups, n // 50 + 1).clamp(-1, 1).repeat_interleave(50, -1)
        )[..., :n].double(),
    }[name]()


@pytest.mark.parametrize(
    "name", ["rough", "decay", "fast decay", "grow", "fast growth", "wave", "steps"]
)
@pytest.mark.parametrize("is_causal", [True, False])
def test_twenty_nats_in_float32(name, is_causal):
    """Row by row, not only on average: relative error at most 1e-4; gradients, too."""
    n, groups = 1200, 6
    starts = torch.randint(0, n, (1, 1, groups)).sort(-1).values
    kernel = kernels(name, 2 * n - 1, groups).float()
    kernel = kernel[..., :n].contiguous() if is_causal else kernel.contiguous()
    value = torch.randn(1, 1, n, 8)
    leaves32 = [kernel.requires_grad_(), value.requires_grad_()]
    leaves64 = [t.detach().double().requires_grad_() for t in leaves32]
    out, lse = toeplitz_attention_with_lse(*leaves32, groups=starts, is_causal=is_causal)
    want, want_lse = dense_toeplitz(*leaves64, starts, None, n, is_causal, 0)
    error = (out.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert error.max() <= 1e-4
    assert (lse.double() - want_lse).abs().max() <= 1e-4
    upstream = torch.randn_like(want)
    grads = torch.autograd.grad(out, leaves32, upstream.float())
    want_grads = torch.autograd.grad(want, leaves64, upstream)
    for got, expected in zip(grads, want_grads, strict=True):
        assert (got.double() - expected).norm() <= 1e-4 * expected.norm()


def test_every_path_of_the_range_guard_is_taken():
    n = 600
    value = torch.randn(1, 3, n, 4)
    lag = torch.arange(n).float()
    calm, wild = -0.01 * lag, 16 * (1 - torch.exp(-lag / 20))
    wilder = torch.where(lag < 20, -40.0, 20.0)
    kernel = torch.stack((calm, wild, wilder))[None, :, None]
    starts = torch.zeros(1, 3, 1, dtype=torch.int64)
    out, lse, path = toeplitz_fwd(kernel, starts, None, value, None, n, True, 0, 0, "auto")
    assert path.tolist() == [[guard.SINGLE, guard.DOUBLE, guard.WEIGHT_BY_WEIGHT]]
    want, want_lse = dense_toeplitz(kernel, value, starts, None, n, True, 0)
    assert ((out - want).norm(dim=-1) / want.norm(dim=-1)).max() <= 1e-5
    assert (lse - want_lse).abs().max() <= 1e-5


def test_the_guard_is_needed(monkeypatch):
    """Without it the wild kernel is wrong: the test above can fail."""
    n = 600
    kernel = (16 * (1 - torch.exp(-torch.arange(n).float() / 20))).expand(1, 1, 1, n).contiguous()
    value, starts = torch.randn(1, 1, n, 4), torch.zeros(1, 1, 1, dtype=torch.int64)
    want, _ = dense_toeplitz(kernel, value, starts, None, n, True, 0)
    monkeypatch.setattr(guard, "_FINEST", float("inf"))
    out, _, _ = toeplitz_fwd(kernel, starts, None, value, None, n, True, 0, 0, "auto")
    assert ((out - want).norm(dim=-1) / want.norm(dim=-1)).max() > 1e-4


def test_alibi_merges_with_an_exact_part():
    """Keys split between two calls, joined by lse, equal all keys."""
    slope = torch.tensor([0.05, 0.3])
    kernel = -slope[None, :, None] * torch.arange(300.0)
    value = torch.randn(1, 2, 300, 8)
    hide = torch.zeros(1, 2, 300)
    hide[..., 100:] = float("-inf")
    show = torch.where(hide == 0, float("-inf"), 0.0)
    whole = toeplitz_attention_with_lse(kernel, value)
    parts = [toeplitz_attention_with_lse(kernel, value, key_offset=o) for o in (hide, show)]
    joined = longspan.merge(parts)
    torch.testing.assert_close(joined.output, whole.output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(joined.lse, whole.lse, rtol=1e-5, atol=1e-5)
    assert (parts[1].output[:, :, :100] == 0).all()
    assert (parts[1].lse[:, :, :100] == float("-inf")).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_values(dtype):
    kernel, value = torch.randn(1, 4, 200), torch.randn(1, 2, 200, 8)
    out = toeplitz_attention(kernel, value.to(dtype))
    assert out.dtype is dtype
    want = toeplitz_attention(kernel, value.to(dtype).float())
    torch.testing.assert_close(out.float(), want, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_same_bits_again():
    kernel, value = torch.randn(2, 2, 3, 300), torch.randn(2, 2, 300, 8)
    starts = torch.tensor([0, 77, 130]).expand(2, 2, 3)
    kernel.requires_grad_()

    def run():
        out = toeplitz_attention(kernel, value, groups=starts)
        return out, *torch.autograd.grad(out.square().sum(), kernel)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty(shape):
    batch, n = shape
    kernel = torch.randn(batch, 2, 8, requires_grad=True)
    value = torch.randn(batch, 2, n, 4, requires_grad=True)
    out, lse = toeplitz_attention_with_lse(kernel, value, num_queries=3)
    assert out.shape == (batch, 2, 3, 4)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    out.sum().backward()
    assert (kernel.grad == 0).all()


def test_row_offset_shifts_lse_only():
    kernel, value, row = torch.randn(1, 1, 50), torch.randn(1, 1, 50, 3), torch.randn(1, 1, 50)
    plain = toeplitz_attention_with_lse(kernel, value)
    moved = toeplitz_attention_with_lse(kernel, value, row_offset=row)
    assert torch.equal(moved.output, plain.output)
    torch.testing.assert_close(moved.lse, plain.lse + row)


def test_opcheck():
    kernel, value, starts, key_offset = draw(20, 30, 10, 2, True, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (
            kernel.requires_grad_(), starts, key_offset.requires_grad_(),
            value.to(dtype).transpose(2, 3).contiguous().transpose(2, 3).requires_grad_(), None,
            20, True, 10, 0, "auto",
        )  # fmt: skip
        torch.library.opcheck(toeplitz_fwd, arguments)


def test_compiles_whole():
    kernel, value = torch.randn(1, 2, 40), torch.randn(1, 2, 40, 4)
    compiled = torch.compile(toeplitz_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(kernel, value), toeplitz_attention(kernel, value))


def test_errors_say_what_to_do():
    value = torch.randn(1, 2, 10, 4)
    with pytest.raises(ShapeError, match="is_causal=False.*Pad it"):
        toeplitz_attention(torch.zeros(1, 2, 10), value, is_causal=False)
    with pytest.raises(ShapeError, match="log_kernel has 3 heads and value has 2"):
        toeplitz_attention(torch.zeros(1, 3, 10), value)
    with pytest.raises(ShapeError, match="key_offset has shape"):
        toeplitz_attention(torch.zeros(1, 2, 10), value, key_offset=torch.zeros(1, 2, 9))
    with pytest.raises(ShapeError, match="with groups"):
        toeplitz_attention(torch.zeros(1, 2, 1, 10), value)


def test_weights_by_definition_agree_with_the_engine():
    kernel, value, starts, key_offset = draw(30, 40, 10, 3, True, kv_heads=2)
    problem = Problem(kernel[0], starts[0].clone(), key_offset[0], value[0], 30, True, 10)
    problem.starts[:, 0] = 0
    logs = guard.log_weights(problem, slice(0, 30))
    out, lse, _ = guard.guarded_forward(problem, 16)
    torch.testing.assert_close(torch.softmax(logs, -1) @ value[0], out)
    torch.testing.assert_close(torch.logsumexp(logs, -1), lse)


@pytest.mark.parametrize("n", [1, 5000, 20000, 100000, 10**6])
def test_blocks_grow_with_the_length(n):
    size = block_size(n, torch.device("cpu"))
    assert size & (size - 1) == 0
    assert size <= max(32, n)


def test_a_few_bad_blocks_are_evaluated_alone():
    """One early block of many has a range beyond float32; gradients of the head are in float64."""
    n = 4096
    lag = torch.arange(n).float()
    kernel = torch.where(lag < 100, -17.0 + 0.17 * lag, 0.0)[None, None, None].requires_grad_()
    value = torch.randn(1, 1, n, 4, requires_grad=True)
    starts = torch.zeros(1, 1, 1, dtype=torch.int64)
    out, lse, path = toeplitz_fwd(kernel, starts, None, value, None, n, True, 0, 128, "auto")
    assert path.tolist() == [[guard.DOUBLE]]
    leaves = [t.detach().double().requires_grad_() for t in (kernel, value)]
    want, want_lse = dense_toeplitz(*leaves, starts, None, n, True, 0)
    assert ((out - want).norm(dim=-1) / want.norm(dim=-1)).max() <= 1e-4
    assert (lse - want_lse).abs().max() <= 1e-4
    upstream = torch.randn_like(want)
    grads = torch.autograd.grad(out, (kernel, value), upstream.float())
    for got, expected in zip(grads, torch.autograd.grad(want, leaves, upstream), strict=True):
        assert (got - expected).norm() <= 1e-4 * expected.norm()
