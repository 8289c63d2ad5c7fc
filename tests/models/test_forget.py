"""Forgetting attention equals its definition in float64, whole, offset, packed and in gradients."""

import pytest
import torch
import torch.nn.functional as F

from longspan.models.forget import (
    decay_totals,
    forget_attention,
    forget_attention_packed,
    log_gates,
)
from longspan.models.key_bias import _BLOCK, _split, key_bias_attention
from longspan.testing import make_qkv


def gates(batch, heads, length, *, mean=2.0, seed=3, dtype=torch.float64):
    drawn = torch.randn(
        batch, heads, length, dtype=dtype, generator=torch.Generator().manual_seed(seed)
    )
    return F.logsigmoid(drawn + mean)


def oracle(q, k, v, log_forget, offset=0):
    """The paper's Eq. (4): D_ij = sum of log f over j+1 .. i, written out, in float64."""
    heads, n_q, dim = q.shape[1:]
    ratio = heads // k.shape[1]
    k, v, log_forget = (t.double().repeat_interleave(ratio, 1) for t in (k, v, log_forget))
    n_k = k.shape[2]
    rows = torch.arange(n_q)[:, None] + offset
    columns = torch.arange(n_k)[None, :]
    between = torch.zeros(*log_forget.shape[:2], n_q, n_k, dtype=torch.float64)
    totals = log_forget.cumsum(-1)
    between = totals[..., rows.flatten().clamp(max=n_k - 1), None] - totals[..., None, :]
    scores = q.double() @ k.mT / dim**0.5 + between
    return scores.masked_fill(columns > rows, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("n_q", [1, 40, _BLOCK + 37])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_equals_the_definition(n_q, heads):
    n_k = _BLOCK + 37 if n_q == 1 else n_q
    q, k, v = make_qkv(heads=heads[0], kv_heads=heads[1], n_q=n_q, n_k=n_k, head_dim=8)
    log_forget = gates(1, heads[1], n_k).expand(q.shape[0], -1, -1)
    found = forget_attention(q, k, v, decay_totals(log_forget), query_offset=n_k - n_q)
    wanted = oracle(q[:, :, -40:], k, v, log_forget, n_k - min(n_q, 40))
    torch.testing.assert_close(found[:, :, -40:].double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mean", [6.0, 2.0, -3.0])
def test_bfloat16_is_as_good_as_its_inputs(mean):
    """The bias alone adds no more error than bfloat16 attention has without it."""
    length = 6000
    q, k, v = make_qkv(heads=2, n_q=length, head_dim=64, dtype=torch.bfloat16)
    log_forget = gates(q.shape[0], 2, length, mean=mean)
    found = forget_attention(q, k, v, decay_totals(log_forget))
    assert found.dtype == torch.bfloat16
    wanted = oracle(q[:, :, -200:], k, v, log_forget, length - 200)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, -200:].double()
    exact = oracle(q[:, :, -200:], k, v, torch.zeros_like(log_forget), length - 200)
    floor = ((plain - exact).norm() / exact.norm()).item()
    error = ((found[:, :, -200:].double() - wanted).norm() / wanted.norm()).item()
    assert error < 2 * floor


def test_one_bfloat16_number_would_not_do():
    """Mutation: without the low parts the same check fails by far."""
    x = -1000 * torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = _split(x, torch.bfloat16)
    assert (sum(part.double() for part in parts) - x).abs().max() < 1000 * 2.0**-23
    assert (parts[0].double() - x).abs().max() > 1


def test_gradients():
    q, k, v = make_qkv(heads=4, kv_heads=2, n_q=20, head_dim=4, dtype=torch.float64,
                       requires_grad=True)  # fmt: skip
    log_forget = gates(q.shape[0], 2, 20).requires_grad_()
    upstream = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = (q, k, v, log_forget)
    found = torch.autograd.grad(
        forget_attention(q, k, v, decay_totals(log_forget)), inputs, upstream
    )
    wanted = torch.autograd.grad(oracle(q, k, v, log_forget), inputs, upstream)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_gates_in_bfloat16():
    q, k, v = make_qkv(heads=2, n_q=300, head_dim=16, dtype=torch.bfloat16)
    log_forget = gates(q.shape[0], 2, 300, mean=3.0).requires_grad_()
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    out = forget_attention(q, k, v, decay_totals(log_forget))
    (found,) = torch.autograd.grad(out, log_forget, upstream.to(out.dtype))
    (wanted,) = torch.autograd.grad(
        oracle(q, k, v, log_forget), log_forget, upstream.to(out.dtype).double()
    )
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_packed_equals_apart():
    lengths = [30, 1, 700]
    parts = [make_qkv(batch=1, heads=4, kv_heads=2, n_q=n, head_dim=8, seed=n) for n in lengths]
    logs = [gates(1, 2, n, seed=n) for n in lengths]
    packed = [torch.cat([p[i][0].transpose(0, 1) for p in parts]) for i in range(3)]
    cu = torch.tensor([0, 30, 31, 731], dtype=torch.int32)
    found = forget_attention_packed(*packed, torch.cat([x[0].mT for x in logs]), cu, 700)
    apart = [
        forget_attention(*p, decay_totals(x))[0].transpose(0, 1)
        for p, x in zip(parts, logs, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(apart), rtol=1e-4, atol=1e-4)


def test_row_factors_are_split_too():
    q, k, v = make_qkv(heads=3, kv_heads=1, n_q=64, head_dim=64, dtype=torch.bfloat16)
    bias = 300 * torch.rand(64, generator=torch.Generator().manual_seed(2))
    factor = torch.tensor([1 / 3, 0.7, 1.1])
    found = key_bias_attention(q, k, v, bias, row_factor=factor).double()
    scores = q.double() @ k.double().mT / 8 + factor.double()[:, None, None] * bias.double()
    hidden = torch.ones(64, 64, dtype=torch.bool).triu(1)
    wanted = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v.double()
    assert (found - wanted).norm() < 0.01 * wanted.norm()


def test_float16_is_computed_wide():
    q, k, v = make_qkv(heads=2, n_q=50, head_dim=8, dtype=torch.float16)
    log_forget = gates(q.shape[0], 2, 50, mean=-9.0) * 1e4
    found = forget_attention(q, k, v, decay_totals(log_forget))
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, v, rtol=1e-3, atol=1e-3)  # all but the own key is forgotten


def test_log_gates_stay_exact_for_float64():
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(log_gates(x), F.logsigmoid(x).mT, rtol=0, atol=0)
    assert log_gates(x.bfloat16()).dtype == torch.float32
