"""Scales that join pieces of kernels and runs of keys, one program for each block of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton.launch import KernelConfig

__all__ = ["TABLE_TILE", "table_kernel"]

TABLE_TILE = KernelConfig(0, 256, 4, 1)  # -, runs


@triton.jit
def _log_scales(
    block_max_ptr, run_scale_ptr, run_block_ptr, run_group_ptr, a, u, runs, row_blocks
):  # fmt: skip
    """Log-scale of piece and run for the runs u, -inf after the row block; the piece."""
    exists = u < runs
    block = tl.load(run_block_ptr + u, mask=exists, other=row_blocks)
    group = tl.load(run_group_ptr + u, mask=exists, other=0)
    piece = a - block
    seen = piece >= 0
    place = group * row_blocks + piece
    here = tl.load(block_max_ptr + place, mask=seen, other=float("-inf"))
    before = tl.load(block_max_ptr + place - 1, mask=piece >= 1, other=float("-inf"))
    scale = tl.load(run_scale_ptr + u, mask=exists, other=float("-inf"))
    logs = tl.where(seen, tl.maximum(here, before) + scale, float("-inf"))
    return logs, piece, place, seen


@triton.jit(do_not_specialize=["runs", "row_blocks", "extra"])
def table_kernel(
    block_max_ptr, norm_ptr, run_scale_ptr, run_norm_ptr, value_scale_ptr, value_bound_ptr,
    run_block_ptr, run_group_ptr, factor_ptr, logs_ptr, facts_ptr,
    runs, row_blocks, extra, groups, problems, noise_scale,
    BLOCK_U: tl.constexpr, HAS_LOGS: tl.constexpr,
):  # fmt: skip
    """factor[a, u] = exp(log-scale - top_a) of far runs, and five facts of each block of rows:

    top: largest log-scale of a far run; near_top: of the two near blocks; noise: estimated error
    of a denominator in units of exp(top); far_scale: largest factor * value_scale; unit: largest
    |value| of the near blocks.
    """
    program = tl.program_id(0)
    a = program % row_blocks
    problem = (program // row_blocks).to(tl.int64)
    block_max_ptr += problem * groups * row_blocks
    norm_ptr += problem * groups * row_blocks
    run_block_ptr += problem * runs
    run_group_ptr += problem * runs
    run_scale_ptr += problem * runs
    run_norm_ptr += problem * runs
    value_scale_ptr += problem * runs
    value_bound_ptr += problem * runs
    factor_ptr += (problem * row_blocks + a) * runs
    logs_ptr += (problem * row_blocks + a) * runs
    step = tl.arange(0, BLOCK_U)
    far_best = tl.full((BLOCK_U,), float("-inf"), tl.float32)
    near_best = tl.full((BLOCK_U,), float("-inf"), tl.float32)
    bound = tl.zeros((BLOCK_U,), tl.float32)
    limit = tl.minimum(runs, a + 1 + extra)
    for first in range(0, runs if HAS_LOGS else limit, BLOCK_U):
        u = first + step
        logs, piece, _, seen = _log_scales(block_max_ptr, run_scale_ptr, run_block_ptr,
                                           run_group_ptr, a, u, runs, row_blocks)  # fmt: skip
        if HAS_LOGS:
            tl.store(logs_ptr + u, logs, mask=u < runs)
        far_best = tl.maximum(far_best, tl.where(piece >= 2, logs, float("-inf")))
        near = seen & (piece < 2)
        near_best = tl.maximum(near_best, tl.where(near, logs, float("-inf")))
        bound = tl.maximum(bound, tl.load(value_bound_ptr + u, mask=near, other=0.0))
    top = tl.max(far_best, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    noise = tl.zeros((BLOCK_U,), tl.float32)
    largest = tl.zeros((BLOCK_U,), tl.float32)
    for first in range(0, limit, BLOCK_U):
        u = first + step
        logs, piece, place, _ = _log_scales(block_max_ptr, run_scale_ptr, run_block_ptr,
                                            run_group_ptr, a, u, runs, row_blocks)  # fmt: skip
        far = piece >= 2
        factor = tl.where(far, tl.exp(logs - safe), 0.0)
        tl.store(factor_ptr + u, factor, mask=u < runs)
        norm = tl.load(norm_ptr + place, mask=far, other=0.0)
        noise += factor * norm * tl.load(run_norm_ptr + u, mask=far, other=0.0)
        largest = tl.maximum(largest, factor * tl.load(value_scale_ptr + u, mask=far, other=0.0))
    far_scale = tl.max(largest, 0)
    far_scale = tl.where(far_scale > 0.0, far_scale, 1.0)
    unit = tl.max(bound, 0)
    unit = tl.where(unit > 0.0, tl.maximum(unit, 1e-30 * far_scale), far_scale)
    facts_ptr += problem * row_blocks + a
    stride = problems.to(tl.int64) * row_blocks
    tl.store(facts_ptr, top)
    tl.store(facts_ptr + stride, tl.max(near_best, 0))
    tl.store(facts_ptr + 2 * stride, tl.sum(noise, 0) * noise_scale)
    tl.store(facts_ptr + 3 * stride, far_scale)
    tl.store(facts_ptr + 4 * stride, unit)
