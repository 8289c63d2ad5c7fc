"""Conv-Basis attention on a GPU: against its float64 reference, then what only a GPU shows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from conv_cases import dense_toeplitz, planted
from longspan import ConvBasisConfig, conv_basis_attention_with_lse, exact_attention_with_lse
from longspan.conv_basis.impl import guard
from longspan.conv_basis.impl.certificate import sample_distances
from longspan.conv_basis.impl.recover import recover_starts, shifted_columns
from longspan.conv_basis.impl.triton.search import search_starts
from longspan.conv_basis.ops import score_columns, toeplitz_fwd
from longspan.testing import assert_within_budget

pytestmark = pytest.mark.gpu
BARE = ConvBasisConfig(min_length=0, check_rows=0, num_bases=4, recover="grid")


def run(q, k, v, config, **settings):
    return conv_basis_attention_with_lse(q, k, v, enable_gqa=True, config=config, **settings)


@pytest.mark.parametrize("dim", [20, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_search_kernel_equals_lock_step(dim, dtype, nan_scratch):
    q, k, _ = (t.cuda() for t in planted(3000, [0, 700, 701, 2999], 4, dim, 2.0, 2, 2, 0, dtype))
    q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    lengths = torch.tensor([3000, 1999], device="cuda")
    config = ConvBasisConfig(threshold=3.0, noise=0.0, near_window=2, num_sinks=1)
    got = search_starts(q, k, lengths, dim**-0.5, config)
    want = recover_starts(q, k, lengths, dim**-0.5, config)
    # a sum that equals the threshold to rounding may fall on either side
    assert (got == want).float().mean() > 0.9
    if dtype is torch.float32:
        assert torch.equal(got, want)


@pytest.mark.parametrize("config", [
    BARE,
    dataclasses.replace(BARE, recover="binary", threshold=2.0),
    dataclasses.replace(BARE, recover="segment", near_window=65, num_sinks=5),
    dataclasses.replace(BARE, recover="means", near_window=30, num_sinks=2, rope_base=100.0),
], ids=["grid", "binary", "segment", "means"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(config, dtype, nan_scratch):
    """Eager, so that both sides choose the same borders."""
    leaves = [torch.randn(2, h, 777, d, device="cuda", dtype=dtype).requires_grad_()
              for h, d in ((4, 32), (2, 32), (2, 20))]  # fmt: skip
    lengths = torch.tensor([777, 500], dtype=torch.int32, device="cuda")
    got = run(*leaves, config, key_lengths=lengths, impl="eager")
    want = run(*leaves, config, key_lengths=lengths, impl="reference")
    limit = {"rtol": 1e-3, "atol": 3e-5} if dtype is torch.float32 else {"rtol": 1e-7, "atol": 1e-9}
    upstream = torch.randn_like(got.output)
    torch.testing.assert_close(got.output, want.output, **limit)
    torch.testing.assert_close(got.lse, want.lse, **limit)
    for a, b in zip(*(torch.autograd.grad(p.output, leaves, upstream) for p in (got, want)),
                    strict=True):  # fmt: skip
        assert (a - b).norm() <= (1e-4 if dtype is torch.float32 else 1e-8) * b.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_planted_half_precision_against_exact(dtype):
    q, k, v = planted(5000, [0, 1000, 3500], 4, 64, 1.0, 1, 2)
    q, k, v = (t.cuda() for t in (q, k, v))
    exact = exact_attention_with_lse(q, k, v, is_causal=True, enable_gqa=True)
    config = ConvBasisConfig(min_length=0, on_violation="return")
    half = [t.to(dtype) for t in (q, k, v)]
    got = run(*half, config)
    plain = exact_attention_with_lse(*half, is_causal=True, enable_gqa=True)
    # rounding the inputs moves every score by its own error: the model reads one key of a segment
    assert_within_budget(got.output, exact.output, plain.output, factor=4.0, magnitude=4.0)


def test_range_guard_paths_and_tf32_setting():
    n = 3000
    value = torch.randn(1, 3, n, 16, device="cuda")
    lag = torch.arange(n, device="cuda").float()
    kernel = torch.stack((-0.01 * lag, 16 * (1 - torch.exp(-lag / 20)),
                          torch.where(lag < 20, -40.0, 20.0)))[None, :, None]  # fmt: skip
    starts = torch.zeros(1, 3, 1, dtype=torch.int64, device="cuda")
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True  # must not reach the engine
        out, lse, path = toeplitz_fwd(kernel, starts, None, value, None, n, True, 0, 0, "auto")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert path.tolist() == [[guard.SINGLE, guard.DOUBLE, guard.WEIGHT_BY_WEIGHT]]
    want, want_lse = dense_toeplitz(*(t.cpu() for t in (kernel, value, starts)), None, n, True, 0)
    assert ((out.cpu() - want).norm(dim=-1) / want.norm(dim=-1)).max() <= 1e-4
    assert (lse.cpu() - want_lse).abs().max() <= 1e-4


def test_fallback_and_same_bits():
    q, k, v = (torch.randn(1, 4, 5000, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    k = 3 * k
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    got = run(q, k, v, ConvBasisConfig())
    want = exact_attention_with_lse(q, k, v, is_causal=True)
    torch.testing.assert_close(got.output, want.output, rtol=2e-2, atol=2e-2)

    def once():
        out = run(q, k, v, ConvBasisConfig(on_violation="return")).output
        return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))

    for a, b in zip(once(), once(), strict=True):
        assert torch.equal(a, b)
        assert torch.isfinite(a).all()


def test_compiles_whole():
    q, k, v = (torch.randn(1, 2, 4500, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def function(q, k, v):
        return run(q, k, v, ConvBasisConfig(near_window=16)).output

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), function(q, k, v))


def rough(n, groups=5, heads=4):
    """Log-kernels that decay, grow and jump, over some nats; borders at any place."""
    generator = torch.Generator().manual_seed(1)
    lag = torch.arange(n) / n
    slopes = torch.tensor([-6.0, 4.0, 0.0, -1.0])[:heads, None, None]
    kernel = slopes * lag + 0.3 * torch.randn(heads, groups, n, generator=generator)
    starts = torch.randint(1, n, (heads, groups), generator=generator).sort(-1).values
    starts[:, 0] = 0
    starts[-1, -1] = n  # an empty group
    return kernel[None].cuda(), starts[None].cuda()


@pytest.mark.parametrize("dim", [20, 128])
@pytest.mark.parametrize(("n", "block"), [(2048, None), (4099, None), (4099, 256)])
@pytest.mark.parametrize(("dtype", "offset"), [(torch.bfloat16, False), (torch.float16, True)])
def test_half_engine_row_by_row(dim, n, block, dtype, offset, monkeypatch, nan_scratch):
    from longspan.conv_basis.impl.triton import half

    monkeypatch.setattr(half, "BLOCK", block)
    kernel, starts = rough(n)
    value = torch.randn(1, n, 2, dim, device="cuda").to(dtype).transpose(1, 2)
    key_offset = 0.5 * torch.randn(1, 4, n, device="cuda") if offset else None
    out, lse, path = toeplitz_fwd(kernel, starts, key_offset, value, None, n, True, 0, 0, "auto")
    assert (path == guard.HALF).all()
    want, want_lse = dense_toeplitz(kernel, value, starts, key_offset, n, True, 0)
    rounded = (want.to(dtype).double() - want).norm(dim=-1) / want.norm(dim=-1)
    error = (out.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert (error - rounded).max() <= 3e-3
    assert (out.double() - want).norm() <= (
        2.5e-3 if dtype is torch.bfloat16 else 1e-3
    ) * want.norm()
    assert (lse - want_lse).abs().max() <= 1e-4


def test_half_engine_leaves_heads_it_cannot_hold():
    n = 3000
    kernel, starts = rough(n)
    kernel[:, 1] = torch.where(torch.arange(n) < 600, -12.0, 12.0)
    value = torch.randn(1, 4, n, 64, device="cuda", dtype=torch.bfloat16)
    out, _, path = toeplitz_fwd(kernel, starts, None, value, None, n, True, 0, 0, "auto")
    assert (path == guard.HALF).tolist() == [[True, False, True, True]]
    want, _ = dense_toeplitz(kernel, value, starts, None, n, True, 0)
    assert ((out.double() - want).norm(dim=-1) / want.norm(dim=-1)).max() <= 6e-3


def test_half_engine_sizes_of_values():
    """Values of a head that differ by orders of magnitude from block to block."""
    n = 2500
    kernel, starts = rough(n)
    value = (
        torch.randn(1, 4, n, 64, device="cuda") * torch.logspace(-6, 6, n, device="cuda")[:, None]
    )
    value = value.bfloat16()
    out, _, path = toeplitz_fwd(kernel, starts, None, value, None, n, True, 0, 0, "auto")
    assert (path == guard.HALF).all()
    want, _ = dense_toeplitz(kernel, value, starts, None, n, True, 0)
    assert ((out.double() - want).norm(dim=-1) / want.norm(dim=-1)).max() <= 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [20, 128])
def test_columns_and_their_gradients(dtype, dim, nan_scratch):
    n = 3000
    q, k = (torch.randn(2, n, h, dim, device="cuda").to(dtype).transpose(1, 2) for h in (4, 2))
    starts = torch.tensor([0, 3, 700, 2999, n], device="cuda").expand(2, 4, -1).contiguous()
    leaves = [q.requires_grad_(), k.requires_grad_()]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    got, want = score_columns(*leaves, starts, 0.3), shifted_columns(*wide, starts, 0.3)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)
    upstream = torch.randn_like(want) * (want > float("-inf"))
    grads = torch.autograd.grad(got, leaves, upstream.float())
    expected = torch.autograd.grad(want, wide, upstream)
    for a, b in zip(grads, expected, strict=True):
        assert (a.double() - b).norm() <= (3e-3 if dtype is torch.bfloat16 else 5e-4) * b.norm()


@pytest.mark.parametrize(("dtype", "dim", "offset", "block"), [
    (torch.bfloat16, 128, False, 256), (torch.bfloat16, 20, True, None),
    (torch.float16, 64, True, None),
])  # fmt: skip
def test_half_gradients(dtype, dim, offset, block, monkeypatch, nan_scratch):
    from longspan.conv_basis.impl.triton import half

    monkeypatch.setattr(half, "BLOCK", block)
    n = 3001
    kernel, starts = rough(n)
    value = torch.randn(1, n, 2, dim, device="cuda").to(dtype).transpose(1, 2)
    key_offset = 0.5 * torch.randn(1, 4, n, device="cuda") if offset else None
    leaves = [t.requires_grad_() for t in (kernel, value, key_offset) if t is not None]
    out, lse, path = toeplitz_fwd(kernel, starts, key_offset, value, None, n, True, 0, 0, "auto")
    assert (path == guard.HALF).all()
    upstream, upstream_lse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out, lse), leaves, (upstream, upstream_lse), retain_graph=True)
    again = torch.autograd.grad((out, lse), leaves, (upstream, upstream_lse))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = dense_toeplitz(wide[0], wide[1], starts, wide[2] if offset else None, n, True, 0)
    want = torch.autograd.grad(want, wide, (upstream.double(), upstream_lse.double()))
    for a, b, c in zip(got, want, again, strict=True):
        assert (a.double() - b).norm() <= 4e-3 * b.norm()
        assert torch.equal(a, c)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_distances_of_sampled_rows(dtype, nan_scratch):
    n = 3000
    query, key = (torch.randn(2, h, n, 64, device="cuda").to(dtype) for h in (4, 2))
    lengths = torch.tensor([n, 1700], device="cuda")
    key[1, :, 1700:] = float("nan")
    starts = torch.tensor([0, 300, 1801], device="cuda").expand(2, 4, -1).contiguous()
    kernel, row_offset = torch.randn(2, 4, 3, n, device="cuda"), torch.randn(2, 4, n, device="cuda")
    lse = 7 + torch.rand(2, 4, n, device="cuda")
    arguments = (query, key, lengths, kernel, starts, None, row_offset, lse, 0.125, 9, 2, 64, 0)
    got, want = sample_distances(*arguments), sample_distances(*arguments, impl="eager")
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got[2], want[2], rtol=1e-3, atol=1e-3)
