"""Pairs of blocks of rows and runs of keys, and their sums: the gradient of the kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton.launch import KernelConfig

__all__ = ["PAIR_TILE", "SUM_TILE", "group_sum_kernel", "pair_kernel"]

PAIR_TILE = KernelConfig(16, 64, 4, 1)  # runs, row blocks
SUM_TILE = KernelConfig(16, 128, 4, 1)  # runs, pieces


@triton.jit(do_not_specialize=["runs", "row_blocks"])
def pair_kernel(
    factor_ptr, value_ptr, value_scale_ptr, weight_ptr, upstream_ptr, upstream_scale_ptr, last_ptr,
    run_block_ptr, pair_ptr,
    runs, row_blocks,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """pair[r, f, :, u, a] = factor[a, u] (upstream[a] . conj value[u] + last[a] conj weight[u])."""
    tiles_u = tl.cdiv(runs, BLOCK_U)
    tiles_a = tl.cdiv(row_blocks, BLOCK_A)
    program = tl.program_id(0)
    tile_a = program % tiles_a
    tile_u = (program // tiles_a) % tiles_u
    f = (program // tiles_a // tiles_u) % BLOCK
    problem = (program // tiles_a // tiles_u // BLOCK).to(tl.int64)
    u = tile_u * BLOCK_U + tl.arange(0, BLOCK_U)
    a = tile_a * BLOCK_A + tl.arange(0, BLOCK_A)
    exists = u < runs
    inside = a < row_blocks
    block = tl.load(run_block_ptr + problem * runs + u, mask=exists, other=row_blocks)
    if tl.min(block, 0) < tile_a * BLOCK_A + BLOCK_A:
        c = tl.arange(0, BLOCK_C)
        value_ptr += problem * runs * (2 * BLOCK * BLOCK_C) + f * (2 * BLOCK_C)
        upstream_ptr += problem * row_blocks * (2 * BLOCK * BLOCK_C) + f * (2 * BLOCK_C)
        x = value_ptr + u[:, None].to(tl.int64) * (2 * BLOCK * BLOCK_C) + c[None, :]
        x_real = tl.load(x, mask=exists[:, None], other=0.0)
        x_imaginary = tl.load(x + BLOCK_C, mask=exists[:, None], other=0.0)
        y = upstream_ptr + a[:, None].to(tl.int64) * (2 * BLOCK * BLOCK_C) + c[None, :]
        y_real = tl.trans(tl.load(y, mask=inside[:, None], other=0.0))
        y_imaginary = tl.trans(tl.load(y + BLOCK_C, mask=inside[:, None], other=0.0))
        real = tl.dot(x_real, y_real)
        real = tl.dot(x_imaginary, y_imaginary, real)
        imaginary = tl.dot(x_real, y_imaginary)
        imaginary = tl.dot(-x_imaginary, y_real, imaginary)
        v_scale = tl.load(value_scale_ptr + problem * runs + u, mask=exists, other=0.0)
        y_scale = tl.load(upstream_scale_ptr + problem * row_blocks + a, mask=inside, other=0.0)
        scale = (v_scale * BLOCK)[:, None] * y_scale[None, :]
        weight_ptr += (problem * BLOCK + f) * 2 * runs
        last_ptr += (problem * BLOCK + f) * 2 * row_blocks
        w_real = tl.load(weight_ptr + u, mask=exists, other=0.0)[:, None]
        w_imaginary = tl.load(weight_ptr + runs + u, mask=exists, other=0.0)[:, None]
        l_real = tl.load(last_ptr + a, mask=inside, other=0.0)[None, :]
        l_imaginary = tl.load(last_ptr + row_blocks + a, mask=inside, other=0.0)[None, :]
        real = real * scale + (w_real * l_real + w_imaginary * l_imaginary)
        imaginary = imaginary * scale + (w_real * l_imaginary - w_imaginary * l_real)
        valid = exists[:, None] & inside[None, :]
        factor_ptr += problem * row_blocks * runs
        factor = tl.load(factor_ptr + a[None, :] * runs + u[:, None], mask=valid, other=0.0)
        into = pair_ptr + (problem * BLOCK + f) * 2 * runs * row_blocks
        into += u[:, None] * row_blocks + a[None, :]
        tl.store(into, real * factor, mask=valid)
        tl.store(into + runs * row_blocks, imaginary * factor, mask=valid)


@triton.jit(do_not_specialize=["runs", "row_blocks", "pieces"])
def group_sum_kernel(
    pair_ptr, first_ptr, run_block_ptr, sum_ptr,
    runs, row_blocks, pieces, groups,
    BLOCK: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """sum[r, o, g, p] = sum of pair[r, o, u, block(u) + p] over the runs u of group g."""
    tiles = tl.cdiv(pieces, BLOCK_P)
    program = tl.program_id(0)
    tile = program % tiles
    g = (program // tiles) % groups
    o = (program // tiles // groups) % (2 * BLOCK)
    problem = (program // tiles // groups // (2 * BLOCK)).to(tl.int64)
    first = tl.load(first_ptr + problem * (groups + 1) + g)
    stop = tl.load(first_ptr + problem * (groups + 1) + g + 1)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    pair_ptr += (problem * (2 * BLOCK) + o) * runs * row_blocks
    total = tl.zeros((BLOCK_P,), tl.float32)
    for start in range(first, stop, BLOCK_U):
        u = start + tl.arange(0, BLOCK_U)
        exists = u < stop
        block = tl.load(run_block_ptr + problem * runs + u, mask=exists, other=row_blocks)
        a = block[:, None] + p[None, :]
        part = tl.load(pair_ptr + u[:, None] * row_blocks + a,
                       mask=exists[:, None] & (a < row_blocks), other=0.0)  # fmt: skip
        total += tl.sum(part, 0)
    into = sum_ptr + ((problem * (2 * BLOCK) + o) * groups + g) * pieces
    tl.store(into + p, total, mask=p < pieces)
