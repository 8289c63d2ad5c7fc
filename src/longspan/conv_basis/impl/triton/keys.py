"""Gradients of values and key offsets: far rows from their spectra, near rows weight by weight."""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton.launch import KernelConfig

__all__ = ["BACK_ROW_TILE", "key_kernel"]

BACK_ROW_TILE = KernelConfig(64, 32, 8, 1)  # keys, rows


@triton.jit(do_not_specialize=["n", "row_blocks", "runs", "length"])
def key_kernel(
    far_value_ptr, back_scale_ptr, weight_ptr, last_far_ptr, unit_ptr, last_ptr, lse_ptr,
    log_kernel_ptr, offset_ptr, run_block_ptr, run_group_ptr, run_start_ptr, run_end_ptr,
    value_ptr, grad_ptr, grad_value_ptr, grad_key_ptr,
    stride_vb, stride_vh, stride_vn,
    n, row_blocks, runs, length, heads, groups, first_problem, load_scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    """dV_j = sum_i P_ij dO_i and dbeta_j = dV_j . V_j + sum_i P_ij last_i, the keys of one run."""
    tiles: tl.constexpr = BLOCK // BLOCK_M
    program = tl.program_id(0)
    tile = program % tiles
    run = (program // tiles).to(tl.int64)  # problem * runs + u
    problem = run // runs
    block = tl.load(run_block_ptr + run)
    start = tl.load(run_start_ptr + run)
    end = tl.minimum(tl.load(run_end_ptr + run), n)
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    key = block * BLOCK + place
    mine = (key >= start) & (key < end)
    first_key = block * BLOCK + tile * BLOCK_M
    if (start < first_key + BLOCK_M) & (end > first_key) & (start < end):
        group = tl.load(run_group_ptr + run)
        c = tl.arange(0, BLOCK_C)
        step = tl.arange(0, BLOCK_N)
        unit = tl.load(unit_ptr + problem * row_blocks + block)
        far_value = tl.load(far_value_ptr + (run * BLOCK + place[:, None]) * BLOCK_C + c[None, :])
        scale = load_scale * (tl.load(back_scale_ptr + run) / unit)
        weight = tl.load(weight_ptr + run * BLOCK + place)
        acc = far_value.to(tl.float32) * (weight * scale)[:, None]
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        kernel = log_kernel_ptr + (problem * groups + group) * length
        if HAS_OFFSET:
            offset = tl.load(offset_ptr + problem * n + key, mask=mine, other=float("-inf"))
        else:
            offset = tl.where(mine, 0.0, float("-inf"))
        for first in range(first_key, tl.minimum((block + 2) * BLOCK, n), BLOCK_N):
            row = first + step
            inside = row < n
            lag = row[None, :] - key[:, None]
            lse = tl.load(lse_ptr + problem * n + row, mask=inside, other=float("-inf"))
            live = inside & (lse > float("-inf"))
            seen = (lag >= 0) & (lag < length) & live[None, :] & mine[:, None]
            score = tl.load(kernel + lag, mask=seen, other=float("-inf")) + offset[:, None]
            p = tl.exp(score - tl.where(live, lse, 0.0)[None, :])
            last = tl.load(last_ptr + problem * n + row, mask=inside, other=0.0)
            sums += p * last[None, :]
            grad = tl.load(grad_ptr + (problem * n + row[:, None]) * DIM + c[None, :],
                           mask=inside[:, None] & (c < DIM)[None, :], other=0.0)  # fmt: skip
            narrow = (grad.to(tl.float32) * (1.0 / unit)).to(tl.float16)
            acc = tl.dot(p.to(tl.float16), narrow, acc)
        acc *= unit
        total = tl.sum(sums, 1) + weight * tl.load(last_far_ptr + run * BLOCK + place)
        actual = problem + first_problem
        value_ptr += actual // heads * stride_vb + (actual % heads) // GROUP * stride_vh
        used = mine[:, None] & (c < DIM)[None, :]
        value = tl.load(value_ptr + key[:, None].to(tl.int64) * stride_vn + c[None, :], mask=used,
                        other=0.0).to(tl.float32)  # fmt: skip
        total += tl.sum(acc * value, 1)
        into = grad_value_ptr + (problem * n + key[:, None]) * DIM + c[None, :]
        tl.store(into, acc.to(grad_value_ptr.dtype.element_ty), mask=used)
        tl.store(grad_key_ptr + problem * n + key, total, mask=mine)
