"""Frequency by frequency, the blocks of rows as a product over the runs of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton.launch import KernelConfig

__all__ = ["MIX_TILE", "mix_kernel"]

MIX_TILE = KernelConfig(64, 16, 8, 2)  # row blocks, runs


@triton.jit(do_not_specialize=["runs", "row_blocks", "pieces", "extra"])
def mix_kernel(
    kernel_ptr, factor_ptr, value_ptr, value_scale_ptr, far_scale_ptr, weight_ptr, run_block_ptr,
    run_group_ptr, mixed_ptr, denominator_ptr,
    runs, row_blocks, pieces, extra, groups, store_scale,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """mixed[r, a, f] = sum_u G[a, u] value[r, u, f], G = kernel[g(u), a - block(u)] factor[a, u].

    Complex, runs two blocks and more before the row's. The denominator takes weight[r, f, u] in
    float32; the values are in float16, and so is G value_scale[u] / far_scale[a].
    """
    tiles = tl.cdiv(row_blocks, BLOCK_A)
    program = tl.program_id(0)
    tile = program % tiles
    f = (program // tiles) % BLOCK
    problem = (program // tiles // BLOCK).to(tl.int64)
    a = tile * BLOCK_A + tl.arange(0, BLOCK_A)
    kernel_ptr += (problem * BLOCK + f) * 2 * (groups * pieces)
    factor_ptr += problem * row_blocks * runs
    value_ptr += problem * runs * (2 * BLOCK * BLOCK_C) + f * (2 * BLOCK_C)
    weight_ptr += (problem * BLOCK + f) * 2 * runs
    run_block_ptr += problem * runs
    run_group_ptr += problem * runs
    value_scale_ptr += problem * runs
    row_scale = tl.load(far_scale_ptr + problem * row_blocks + a, mask=a < row_blocks, other=1.0)
    row_scale = 1.0 / (row_scale * BLOCK**0.5)
    c = tl.arange(0, BLOCK_C)
    real = tl.zeros((BLOCK_A, BLOCK_C), tl.float32)
    imaginary = tl.zeros((BLOCK_A, BLOCK_C), tl.float32)
    den_real = tl.zeros((BLOCK_A,), tl.float32)
    den_imaginary = tl.zeros((BLOCK_A,), tl.float32)
    # the last row block sees blocks up to two before it; `extra` runs share a block with others
    limit = tl.minimum(runs, tl.minimum(tile * BLOCK_A + BLOCK_A, row_blocks) - 2 + extra)
    for first in range(0, limit, BLOCK_U):
        u = first + tl.arange(0, BLOCK_U)
        exists = u < runs
        block = tl.load(run_block_ptr + u, mask=exists, other=row_blocks)
        group = tl.load(run_group_ptr + u, mask=exists, other=0)
        value_scale = tl.load(value_scale_ptr + u, mask=exists, other=0.0)
        piece = a[:, None] - block[None, :]
        far = (piece >= 2) & (a[:, None] < row_blocks)
        place = group[None, :] * pieces + piece
        factor = tl.load(factor_ptr + a[:, None] * runs + u[None, :], mask=far,
                         other=0.0)  # fmt: skip
        live = far & (factor > 0.0)
        g_real = tl.load(kernel_ptr + place, mask=live, other=0.0) * factor
        g_imaginary = tl.load(kernel_ptr + groups * pieces + place, mask=live, other=0.0) * factor
        w_real = tl.load(weight_ptr + u, mask=exists, other=0.0)[None, :]
        w_imaginary = tl.load(weight_ptr + runs + u, mask=exists, other=0.0)[None, :]
        den_real += tl.sum(g_real * w_real - g_imaginary * w_imaginary, 1)
        den_imaginary += tl.sum(g_real * w_imaginary + g_imaginary * w_real, 1)
        turn = value_scale[None, :] * row_scale[:, None]
        h_real = (g_real * turn).to(tl.float16)
        h_imaginary = (g_imaginary * turn).to(tl.float16)
        x = value_ptr + u[:, None].to(tl.int64) * (2 * BLOCK * BLOCK_C) + c[None, :]
        x_real = tl.load(x, mask=exists[:, None], other=0.0)
        x_imaginary = tl.load(x + BLOCK_C, mask=exists[:, None], other=0.0)
        real = tl.dot(h_real, x_real, real)
        real = tl.dot(-h_imaginary, x_imaginary, real)
        imaginary = tl.dot(h_real, x_imaginary, imaginary)
        imaginary = tl.dot(h_imaginary, x_real, imaginary)
    inside = a < row_blocks
    into = mixed_ptr + (problem * row_blocks + a[:, None]) * (2 * BLOCK * BLOCK_C)
    into += f * (2 * BLOCK_C) + c[None, :]
    tl.store(into, (real * store_scale).to(tl.float16), mask=inside[:, None])
    tl.store(into + BLOCK_C, (imaginary * store_scale).to(tl.float16), mask=inside[:, None])
    into_den = denominator_ptr + (problem * row_blocks + a) * (2 * BLOCK) + 2 * f
    tl.store(into_den, den_real, mask=inside)
    tl.store(into_den + 1, den_imaginary, mask=inside)
