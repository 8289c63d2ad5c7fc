"""The engine for half precision values in the interpreter, with small blocks."""

from __future__ import annotations

import pytest
import torch

from conv_cases import dense_toeplitz
from longspan import toeplitz_attention_with_lse
from longspan._triton.launch import KernelConfig
from longspan.conv_basis.impl import guard, half_guard
from longspan.conv_basis.impl.certificate import sample_distances
from longspan.conv_basis.impl.recover import shifted_columns
from longspan.conv_basis.impl.triton import half
from longspan.conv_basis.ops import score_columns, toeplitz_fwd

SMALL = {
    "BACK_ROW_TILE": (16, 16),
    "PAIR_TILE": (16, 16),
    "SUM_TILE": (4, 16),
    "TABLE_TILE": (0, 4),
    "UPSTREAM_TILE": (32, 0),
    "WEIGHT_TILE": (8, 0),
    "MIX_TILE": (16, 16),
    "ROW_TILE": (16, 32),
    "KERNEL_TILE": (32, 16),
    "VALUE_TILE": (32, 32),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(half, "BLOCK", 16)
    monkeypatch.setattr(half, "MIN_LENGTH", 32)
    for name, (m, n) in SMALL.items():
        monkeypatch.setattr(half, name, KernelConfig(m, n, 4, 1))


def draw(n, groups=3, heads=2, dim=12, dtype=torch.float16, lags=None):
    lag = torch.arange(lags or n).float()
    slopes = torch.tensor([-0.03, 0.02])[:, None, None]
    kernel = slopes * lag + 0.5 * torch.randn(heads, groups, len(lag))
    starts = torch.tensor([[0, 45, n], [0, 64, 131]])[:, :groups]
    value = torch.randn(1, 1, n, dim).to(dtype)
    return kernel[None], starts[None].contiguous(), value


@pytest.mark.parametrize(("n", "offset", "one_pass"), [
    (64, False, False), (153, True, False), (131, True, True),
])  # fmt: skip
def test_equals_the_definition(n, offset, one_pass, monkeypatch, nan_scratch):
    """One pass is for bfloat16, which the interpreter cannot multiply: float16 serves here."""
    monkeypatch.setattr(half, "ONE_PASS", (torch.float16,) if one_pass else ())
    kernel, starts, value = draw(n)
    key_offset = 0.5 * torch.randn(1, 2, n) if offset else None
    if offset:
        key_offset[..., 5:20] = float("-inf")
        value[..., 5:20, :] = 0.0
    out, lse, path = toeplitz_fwd(kernel, starts, key_offset, value, None, n, True, 0, 0, "auto")
    assert path.tolist() == [[guard.HALF] * 2]
    want, want_lse = dense_toeplitz(kernel, value, starts, key_offset, n, True, 0)
    error = (out.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert error.max() <= 4e-3  # the output itself is rounded to 5e-4
    assert (out.double() - want).norm() <= 1e-3 * want.norm()
    assert (lse - want_lse).abs().max() <= 1e-4


def test_values_of_any_size_and_strides():
    kernel, starts, value = draw(130, dtype=torch.float32)
    value = value * torch.logspace(-3, 3, 130)[:, None]
    wide = torch.empty(1, 1, 12, 131, dtype=torch.float16).mT[:, :, 1:]
    wide.copy_(value)
    for factor in (1.0, 10.0):  # sums beyond float16 in between
        out, _, path = toeplitz_fwd(kernel, starts, None, factor * wide, None, 130, True, 0, 0,
                                    "auto")  # fmt: skip
        assert (path == guard.HALF).all()
        want, _ = dense_toeplitz(kernel, factor * wide, starts, None, 130, True, 0)
        error = (out.double() - want).norm(dim=-1) / want.norm(dim=-1)
        assert error.max() <= 1e-2


def test_short_kernels_end():
    kernel, starts, value = draw(140, lags=75)
    out, lse, _ = toeplitz_fwd(kernel, starts, None, value, None, 140, True, 0, 0, "auto")
    want, want_lse = dense_toeplitz(kernel, value, starts, None, 140, True, 0)
    assert (out.double() - want).norm() <= 1e-3 * want.norm()
    assert (lse - want_lse).abs().max() <= 1e-3


def test_heads_beyond_half_precision_are_computed_in_float32():
    kernel, starts, value = draw(140)
    kernel[:, 1] = torch.where(torch.arange(140) < 70, -12.0, 12.0)  # rows differ by 24 nats
    out, lse, path = toeplitz_fwd(kernel, starts, None, value, None, 140, True, 0, 0, "auto")
    assert path[0, 0] == guard.HALF
    assert path[0, 1] != guard.HALF
    want, want_lse = dense_toeplitz(kernel, value, starts, None, 140, True, 0)
    assert ((out.double() - want).norm(dim=-1) / want.norm(dim=-1)).max() <= 4e-3
    assert (lse - want_lse).abs().max() <= 1e-3


def test_rows_without_keys_and_two_chunks(monkeypatch):
    monkeypatch.setattr(half, "_WORK_BYTES", 1)  # one head at a time
    kernel, starts, value = draw(130)
    key_offset = torch.zeros(1, 2, 130)
    key_offset[..., :97] = float("-inf")
    got = toeplitz_attention_with_lse(kernel, value, groups=starts, key_offset=key_offset)
    assert (got.output[:, :, :97] == 0).all()
    assert (got.lse[:, :, :97] == float("-inf")).all()
    want, want_lse = dense_toeplitz(kernel, value, starts, key_offset, 130, True, 0)
    assert (got.output.double() - want).norm() <= 1e-3 * want.norm()
    assert (got.lse - want_lse)[:, :, 97:].abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_columns_and_their_gradients(dtype, nan_scratch):
    query, key = torch.randn(2, 4, 71, 20).to(dtype), torch.randn(2, 2, 71, 20).to(dtype)
    starts = torch.tensor([0, 3, 70, 71]).expand(2, 4, -1).contiguous()
    key[:, :, 40:] *= 2
    leaves = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (query, key)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    got, want = score_columns(*leaves, starts, 0.3), shifted_columns(*wide, starts, 0.3)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    seen = want > float("-inf")
    upstream = torch.randn_like(want) * seen
    grads = torch.autograd.grad(got, leaves, upstream.float())
    expected = torch.autograd.grad(want, wide, upstream)
    for a, b in zip(grads, expected, strict=True):
        # the interpreter cuts off where the device rounds
        assert (a.double() - b).norm() <= (6e-3 if dtype is torch.bfloat16 else 5e-4) * b.norm()


@pytest.mark.parametrize(("n", "lags", "offset"), [(131, 75, True), (64, None, False)])
def test_gradients_are_those_of_the_definition(n, lags, offset, nan_scratch):
    kernel, starts, value = draw(n, lags=lags)
    key_offset = 0.5 * torch.randn(1, 2, n) if offset else None
    leaves = [t.requires_grad_() for t in (kernel, value, key_offset) if t is not None]
    out, lse, path = toeplitz_fwd(kernel, starts, key_offset, value, None, n, True, 0, 0, "auto")
    assert (path == guard.HALF).all()
    upstream, upstream_lse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out, lse), leaves, (upstream, upstream_lse))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = dense_toeplitz(wide[0], wide[1], starts, wide[2] if offset else None, n, True, 0)
    want = torch.autograd.grad(want, wide, (upstream.double(), upstream_lse.double()))
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= 2e-3 * b.norm()


def test_gradients_of_heads_that_spread_go_on_in_float32(monkeypatch):
    kernel, starts, value = draw(70)
    leaves = [kernel.requires_grad_(), value.requires_grad_()]
    out, _, _ = toeplitz_fwd(kernel, starts, None, value, None, 70, True, 0, 0, "auto")
    upstream = torch.randn_like(out)
    half_precision = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    monkeypatch.setattr(half_guard, "_MAX_SPREAD", 0.0)
    single = torch.autograd.grad(out, leaves, upstream)
    for a, b in zip(half_precision, single, strict=True):
        assert not torch.equal(a, b)
        assert (a.float() - b.float()).norm() <= 2e-3 * b.float().norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("near", "sinks", "offsets"), [(0, 0, False), (9, 2, True)])
def test_distances_of_sampled_rows(near, sinks, offsets, dtype, nan_scratch):
    n = 75
    query, key = torch.randn(2, 4, n, 20).to(dtype), torch.randn(2, 2, n, 20).to(dtype)
    lengths = torch.tensor([n, 44])
    key[1, :, 44:] = float("nan")
    starts = torch.tensor([0, 30, 61]).expand(2, 4, -1).contiguous()
    kernel = torch.randn(2, 4, 3, n)
    key_offset, row_offset = (torch.randn(2, 4, n) if offsets else None for _ in range(2))
    lse = 3 + torch.rand(2, 4, n)
    arguments = (query, key, lengths, kernel, starts, key_offset, row_offset, lse, 0.3, near,
                 sinks, 20, 0)  # fmt: skip
    got, want = sample_distances(*arguments), sample_distances(*arguments, impl="eager")
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[2], want[2], rtol=1e-4, atol=1e-4)
