"""RoPE depends on distances; ALiBi equals its bias."""

import math

import pytest
import torch

from longspan.models.key_bias import _BLOCK
from longspan.models.positions import (
    alibi_attention,
    alibi_slopes,
    make_rotation,
    rotate,
)
from longspan.testing import make_qkv


def test_rope_scores_depend_on_distance():
    q, k, _ = make_qkv(n_q=1, head_dim=32, dtype=torch.float64)

    def score(i, j):
        turned = [
            rotate(x, make_rotation(torch.tensor([p]), 32, 10_000.0)) for x, p in ((q, i), (k, j))
        ]
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(score(70, 40), score(30, 0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score(50_070, 50_040), score(30, 0), rtol=1e-5, atol=1e-5)
    assert (score(70, 41) - score(30, 0)).abs().max() > 1e-2
    torch.testing.assert_close(score(0, 0), (q * k).sum(-1))


def test_rope_angles():
    rotation = make_rotation(torch.tensor([0, 3]), 4, 100.0)
    torch.testing.assert_close(
        rotation.cos, torch.tensor([[1.0, 1.0], [math.cos(3.0), math.cos(0.3)]])
    )
    x = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    turned = rotate(x, make_rotation(torch.tensor([3]), 4, 100.0))
    torch.testing.assert_close(turned, torch.tensor([[math.cos(3.0), 0.0, math.sin(3.0), 0.0]]))


def test_rope_far_away_is_exact():
    position = 1_000_003
    found = make_rotation(torch.tensor([position]), 2, 10_000.0).cos.item()
    assert found == pytest.approx(math.cos(position), abs=1e-7)


def test_rope_keeps_dtype_and_norm():
    q, _, _ = make_qkv(n_q=9, head_dim=16, dtype=torch.bfloat16)
    turned = rotate(q, make_rotation(torch.arange(9), 16, 10_000.0))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(
        turned.float().norm(dim=-1), q.float().norm(dim=-1), rtol=0.02, atol=0
    )


def test_alibi_slopes():
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    twelve = alibi_slopes(12)
    assert len(set(twelve.tolist())) == 12
    torch.testing.assert_close(twelve[8:], 2.0 ** -torch.tensor([0.5, 1.5, 2.5, 3.5]))


def oracle(q, k, v, offset=0):
    """Softmax with the bias written out, in float64."""
    heads, n_q, dim = q.shape[1:]
    k, v = (t.double().repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    distance = torch.arange(n_q)[:, None] + offset - torch.arange(k.shape[2])[None, :]
    bias = -alibi_slopes(heads).double()[:, None, None] * distance
    scores = q.double() @ k.mT / math.sqrt(dim) + bias
    return scores.masked_fill(distance < 0, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("n_q", [1, 40, _BLOCK + 37])
@pytest.mark.parametrize("n_k", [None, 2 * _BLOCK])
def test_alibi_equals_its_bias(n_q, n_k):
    q, k, v = make_qkv(heads=4, kv_heads=2, n_q=n_q, n_k=n_k, head_dim=8)
    offset = k.shape[2] - n_q
    found = alibi_attention(q, k, v, query_offset=offset)
    torch.testing.assert_close(found.double(), oracle(q, k, v, offset), rtol=1e-4, atol=1e-4)


def test_alibi_far_along_keeps_its_precision():
    length = 30_000
    q, k, v = make_qkv(heads=2, n_q=5, n_k=length, head_dim=8)
    found = alibi_attention(q, k, v, query_offset=length - 5)
    torch.testing.assert_close(found.double(), oracle(q, k, v, length - 5), rtol=1e-4, atol=1e-5)


def test_alibi_in_bfloat16_and_under_autocast():
    q, k, v = make_qkv(heads=2, n_q=5000, head_dim=8, dtype=torch.bfloat16)
    found = alibi_attention(q, k, v)
    assert found.dtype == torch.bfloat16
    wanted = oracle(q[:, :, -300:], k, v, 4700)
    error = (found[:, :, -300:].double() - wanted).abs().max()
    assert error < 0.02
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = alibi_attention(q.float(), k.float(), v.float())
    assert again.dtype == torch.float32
    torch.testing.assert_close(again[:, :, -300:].double(), wanted, rtol=1e-4, atol=1e-4)


def test_alibi_packed_equals_apart():
    lengths = [30, 1, 700]
    parts = [make_qkv(heads=4, kv_heads=2, n_q=n, head_dim=8, seed=n) for n in lengths]
    packed = [torch.cat([p[i][0].transpose(0, 1) for p in parts]) for i in range(3)]
    cu = torch.tensor([0, 30, 31, 731], dtype=torch.int32)
    found = alibi_attention(*packed, cu_seqlens=cu, max_seqlen=700)
    apart = torch.cat([alibi_attention(*p)[0].transpose(0, 1) for p in parts])
    torch.testing.assert_close(found, apart, rtol=1e-4, atol=1e-4)


def test_alibi_packed_keeps_its_precision_far_along():
    count, length = 600, 100
    one = make_qkv(heads=2, n_q=length, head_dim=8)
    packed = [x[0].transpose(0, 1).repeat(count, 1, 1) for x in one]
    cu = torch.arange(count + 1, dtype=torch.int32) * length
    found = alibi_attention(*packed, cu_seqlens=cu, max_seqlen=length)
    last = found[-length:].transpose(0, 1)[None]
    torch.testing.assert_close(last, alibi_attention(*one), rtol=1e-5, atol=1e-5)


def test_alibi_gradients():
    q, k, v = make_qkv(heads=2, n_q=20, head_dim=4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(alibi_attention(q, k, v), (q, k, v), upstream)
    wanted = torch.autograd.grad(oracle(q, k, v), (q, k, v), upstream)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
