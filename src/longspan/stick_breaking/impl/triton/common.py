"""Pieces that the forward, backward and decoding kernels share: fast math, key order, tile scans.

Key order inside a tile. A tensor-core accumulator of 64 columns gives lane t of a quad the columns
8 j + 2 t + b (j = 0 .. 7, b = 0, 1). Column c therefore holds the key at distance
16 t + 2 j + b from the near end of the tile: every lane owns 16 consecutive keys, near to far, and
a scan along the keys is a running product in registers plus one step over the four lanes of a
quad. K and V rows are gathered in that order by their loads; nothing else knows about it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = ["KEY_TILE", "Config"]

#: Keys per tile: fixed by the register layout described above.
KEY_TILE = 64


class Config(NamedTuple):
    """Query rows per tile, warps, pipeline stages, and a cap on registers per thread (or None)."""

    block_m: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def options(self) -> dict[str, Any]:
        """Launch options for Triton."""
        chosen = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return chosen if self.max_registers is None else {**chosen, "maxnreg": self.max_registers}


@triton.jit
def _exp2(x, APPROX: tl.constexpr):
    if APPROX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def _log2(x, APPROX: tl.constexpr):
    if APPROX:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def _reciprocal(x, APPROX: tl.constexpr):
    if APPROX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _round_to(x, dtype: tl.constexpr, APPROX: tl.constexpr):
    """float32 `x`, rounded to what `dtype` can hold."""
    if dtype == tl.float32:
        return x
    elif APPROX and dtype == tl.bfloat16:
        # the packed conversion; going through a tensor of bfloat16 gives one slow F2F per element
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 pair;
            cvt.rn.bf16x2.f32 pair, $3, $2;
            shl.b32 $0, pair, 16;
            and.b32 $1, pair, 0xffff0000;
            }
            """,
            "=f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    elif APPROX and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 pair;
            .reg .b16 low, high;
            cvt.rn.f16x2.f32 pair, $3, $2;
            mov.b32 {low, high}, pair;
            cvt.f32.f16 $0, low;
            cvt.f32.f16 $1, high;
            }
            """,
            "=f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit
def _quad_product(own, BLOCK_M: tl.constexpr):
    """(BLOCK_M, 4): product over the nearer lanes of each lane, and (BLOCK_M,) over all four."""
    y = tl.reshape(own, (BLOCK_M, 2, 2))
    odd = (tl.arange(0, 2) == 1)[None, None, :]
    upper = (tl.arange(0, 2) == 1)[None, :]
    even_value = tl.sum(tl.where(odd, 0.0, y), 2)
    pair = tl.reduce(y, 2, _multiply)
    lower_pair = tl.sum(tl.where(upper, 0.0, pair), 1)
    total = tl.reduce(pair, 1, _multiply)
    before_pair = tl.where(upper, lower_pair[:, None], 1.0)
    before = tl.where(odd, even_value[:, :, None], 1.0) * before_pair[:, :, None]
    return tl.reshape(before, (BLOCK_M, 4)), total


@triton.jit
def _quad_sum(own, BLOCK_M: tl.constexpr):
    """(BLOCK_M, 4): sum over the nearer lanes of each lane, and (BLOCK_M,) over all four."""
    y = tl.reshape(own, (BLOCK_M, 2, 2))
    odd = (tl.arange(0, 2) == 1)[None, None, :]
    upper = (tl.arange(0, 2) == 1)[None, :]
    pair = tl.sum(y, 2)
    total = tl.sum(pair, 1)
    before_pair = tl.where(upper, total[:, None] - pair, 0.0)
    before = tl.where(odd, pair[:, :, None] - y, 0.0) + before_pair[:, :, None]
    return tl.reshape(before, (BLOCK_M, 4)), total


@triton.jit
def _key_of_column():
    """(64,) key offset inside its tile of each column, in the order described above."""
    c = tl.arange(0, 64)
    return 63 - (16 * ((c // 2) % 4) + 2 * (c // 8) + c % 2)


@triton.jit
def _load_columns(pointers, mask_columns, PADDED: tl.constexpr):
    """Rows that all exist; columns are masked only if the tile is wider than the tensor."""
    if PADDED:
        return tl.load(pointers, mask=mask_columns[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _split16(x, BLOCK_M: tl.constexpr):
    """(BLOCK_M, 64) -> 16 tensors (BLOCK_M, 4): piece p holds the p-th nearest key of each lane."""
    a, b = tl.split(tl.reshape(x, (BLOCK_M, 8, 4, 2)))
    a = tl.reshape(tl.permute(a, (0, 2, 1)), (BLOCK_M, 4, 4, 2))
    b = tl.reshape(tl.permute(b, (0, 2, 1)), (BLOCK_M, 4, 4, 2))
    a0, a1 = tl.split(a)
    b0, b1 = tl.split(b)
    a00, a01 = tl.split(tl.reshape(a0, (BLOCK_M, 4, 2, 2)))
    a10, a11 = tl.split(tl.reshape(a1, (BLOCK_M, 4, 2, 2)))
    b00, b01 = tl.split(tl.reshape(b0, (BLOCK_M, 4, 2, 2)))
    b10, b11 = tl.split(tl.reshape(b1, (BLOCK_M, 4, 2, 2)))
    # names: parity b of the column, then bits 0, 1, 2 of j
    p0, p8 = tl.split(a00)
    p2, p10 = tl.split(a10)
    p4, p12 = tl.split(a01)
    p6, p14 = tl.split(a11)
    p1, p9 = tl.split(b00)
    p3, p11 = tl.split(b10)
    p5, p13 = tl.split(b01)
    p7, p15 = tl.split(b11)
    return p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15


@triton.jit
def _join16(
    p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15, BLOCK_M: tl.constexpr
):
    """Inverse of `_split16`."""
    a00 = tl.join(p0, p8)
    a10 = tl.join(p2, p10)
    a01 = tl.join(p4, p12)
    a11 = tl.join(p6, p14)
    b00 = tl.join(p1, p9)
    b10 = tl.join(p3, p11)
    b01 = tl.join(p5, p13)
    b11 = tl.join(p7, p15)
    a0 = tl.reshape(tl.join(a00, a01), (BLOCK_M, 4, 4))
    a1 = tl.reshape(tl.join(a10, a11), (BLOCK_M, 4, 4))
    b0 = tl.reshape(tl.join(b00, b01), (BLOCK_M, 4, 4))
    b1 = tl.reshape(tl.join(b10, b11), (BLOCK_M, 4, 4))
    a = tl.permute(tl.reshape(tl.join(a0, a1), (BLOCK_M, 4, 8)), (0, 2, 1))
    b = tl.permute(tl.reshape(tl.join(b0, b1), (BLOCK_M, 4, 8)), (0, 2, 1))
    return tl.reshape(tl.join(a, b), (BLOCK_M, 64))


@triton.jit
def _group4(e0, e1, e2, e3, APPROX: tl.constexpr):
    """Four consecutive keys: weights up to the factor 1/G, and G = prod (1 + e)."""
    f3 = 1.0 + e3
    f23 = (1.0 + e2) * f3
    f123 = (1.0 + e1) * f23
    whole = (1.0 + e0) * f123
    return e0 * f123, e1 * f23, e2 * f3, e3, whole, _reciprocal(whole, APPROX)


@triton.jit
def _tile_weights(x, rest, BLOCK_M: tl.constexpr, APPROX: tl.constexpr):
    """Weights of one tile of 64 keys.

    Args:
        x: (BLOCK_M, 64) base-2 logits, invisible keys -inf.
        rest: (BLOCK_M,) the stick that enters the tile.

    Returns:
        weights (BLOCK_M, 64); the stick that leaves (BLOCK_M,); (BLOCK_M, 4) partial sums of
        log2 (1 + e), which stay finite where the stick underflows; (BLOCK_M, 4) the largest
        product of four factors, at least 2**30 wherever a logit was clamped.
    """
    # 30: four neighbours multiply to less than 2**127
    e = _exp2(tl.minimum(x, 30.0), APPROX)
    e0, e1, e2, e3, e4, e5, e6, e7, e8, e9, e10, e11, e12, e13, e14, e15 = _split16(e, BLOCK_M)
    w0, w1, w2, w3, g0, i0 = _group4(e0, e1, e2, e3, APPROX)
    w4, w5, w6, w7, g1, i1 = _group4(e4, e5, e6, e7, APPROX)
    w8, w9, w10, w11, g2, i2 = _group4(e8, e9, e10, e11, APPROX)
    w12, w13, w14, w15, g3, i3 = _group4(e12, e13, e14, e15, APPROX)
    lane_log = (_log2(g0, APPROX) + _log2(g1, APPROX)) + (_log2(g2, APPROX) + _log2(g3, APPROX))
    # the stick is carried as a product: its rounding is unbiased, that of lg2.approx is not
    before, left = _quad_product((i0 * i1) * (i2 * i3), BLOCK_M)
    r = rest[:, None] * before
    r0 = r * i0
    r1 = r0 * i1
    r2 = r1 * i2
    r3 = r2 * i3
    weights = _join16(
        w0 * r0, w1 * r0, w2 * r0, w3 * r0,
        w4 * r1, w5 * r1, w6 * r1, w7 * r1,
        w8 * r2, w9 * r2, w10 * r2, w11 * r2,
        w12 * r3, w13 * r3, w14 * r3, w15 * r3,
        BLOCK_M,
    )  # fmt: skip
    largest = tl.maximum(tl.maximum(g0, g1), tl.maximum(g2, g3))
    return weights, rest * left, lane_log, largest


@triton.jit
def _tile_replay(x, rest, dtype: tl.constexpr, BLOCK_M: tl.constexpr, APPROX: tl.constexpr):
    """Weights of one tile again, for the backward, with the sigmoids that it needs beside them.

    Args:
        x: (BLOCK_M, 64) base-2 logits, invisible keys -inf.
        rest: (BLOCK_M,) the stick that enters the tile.
        dtype: what the forward rounded its weights to; the gradient must see the same rounded
            weights, or far keys feel the difference (README "Backward").

    Returns:
        weights rounded to `dtype` but in float32, sigmoid(z), and the tile's stick factor.
    """
    e = _exp2(tl.minimum(x, 120.0), APPROX)
    u = _reciprocal(1.0 + e, APPROX)
    beta = e * u
    u0, u1, u2, u3, u4, u5, u6, u7, u8, u9, u10, u11, u12, u13, u14, u15 = _split16(u, BLOCK_M)
    c2 = u0 * u1
    c3 = c2 * u2
    c4 = c3 * u3
    c5 = c4 * u4
    c6 = c5 * u5
    c7 = c6 * u6
    c8 = c7 * u7
    c9 = c8 * u8
    c10 = c9 * u9
    c11 = c10 * u10
    c12 = c11 * u11
    c13 = c12 * u12
    c14 = c13 * u13
    c15 = c14 * u14
    lane = c15 * u15
    before, factor = _quad_product(lane, BLOCK_M)
    r = rest[:, None] * before
    stick = _join16(
        r, r * u0, r * c2, r * c3, r * c4, r * c5, r * c6, r * c7,
        r * c8, r * c9, r * c10, r * c11, r * c12, r * c13, r * c14, r * c15,
        BLOCK_M,
    )  # fmt: skip
    return _round_to(beta * stick, dtype, APPROX), beta, factor


@triton.jit
def _tile_gradient(weights, beta, dp, far, BLOCK_M: tl.constexpr):
    """Gradient of the logits of one tile.

    Let a = A (dO . v). With D the gradient mass at or beyond a key (dr r + the sum of a over it
    and everything farther), dz = a - sigmoid(z) D.

    Args:
        weights, beta: from `_tile_replay`.
        dp: (BLOCK_M, 64) dO V^T.
        far: (BLOCK_M,) the D that enters the tile.

    Returns:
        dz (BLOCK_M, 64) and the tile's sum of a.
    """
    a = weights * dp
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15 = _split16(a, BLOCK_M)
    s2 = a0 + a1
    s3 = s2 + a2
    s4 = s3 + a3
    s5 = s4 + a4
    s6 = s5 + a5
    s7 = s6 + a6
    s8 = s7 + a7
    s9 = s8 + a8
    s10 = s9 + a9
    s11 = s10 + a10
    s12 = s11 + a11
    s13 = s12 + a12
    s14 = s13 + a13
    s15 = s14 + a14
    lane_sum = s15 + a15
    nearer, near = _quad_sum(lane_sum, BLOCK_M)
    f = far[:, None] - nearer
    beyond = _join16(
        f, f - a0, f - s2, f - s3, f - s4, f - s5, f - s6, f - s7,
        f - s8, f - s9, f - s10, f - s11, f - s12, f - s13, f - s14, f - s15,
        BLOCK_M,
    )  # fmt: skip
    dz = a - beta * beyond
    return dz, near
