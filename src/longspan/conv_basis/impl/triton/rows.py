"""Rows of the output: the near blocks weight by weight, on top of the far part."""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton.launch import KernelConfig

__all__ = ["ROW_TILE", "row_kernel"]

ROW_TILE = KernelConfig(32, 64, 4, 1)  # rows, keys


@triton.jit
def _scores(
    log_kernel_ptr, offset_ptr, group_ptr, row, key, n, length, HAS_OFFSET: tl.constexpr
):  # fmt: skip
    """c_g(i - j) + beta_j of a tile; -inf where there is none."""
    exists = key < n
    group = tl.load(group_ptr + key, mask=exists, other=0)
    lag = row[:, None] - key[None, :]
    seen = (lag >= 0) & (lag < length) & exists[None, :]
    kernel = log_kernel_ptr + group.to(tl.int64) * length
    score = tl.load(kernel[None, :] + lag, mask=seen, other=float("-inf"))
    if HAS_OFFSET:
        score += tl.load(offset_ptr + key, mask=exists, other=float("-inf"))[None, :]
    return score


@triton.jit(do_not_specialize=["n", "row_blocks", "length"])
def row_kernel(
    far_value_ptr, far_ptr, top_ptr, near_top_ptr, far_scale_ptr, unit_ptr, log_kernel_ptr,
    offset_ptr, group_ptr, hidden_ptr, value_ptr, output_ptr, lse_ptr, least_ptr,
    stride_vb, stride_vh, stride_vn,
    n, row_blocks, length, heads, groups, first_problem, load_scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_OFFSET: tl.constexpr,
    HAS_HIDDEN: tl.constexpr, ONE_PASS: tl.constexpr,
):  # fmt: skip
    """output = (far numerator + near numerator) / (far + near denominator), and lse.

    One pass over the scores finds the row's scale, a second one multiplies, in float16 and with
    values / `unit`: nothing is rescaled. ONE_PASS (bfloat16): the scale is a bound for the whole
    block, and weights are multiplied in bfloat16, whose exponents reach far enough. least: the
    smallest lse of a row that sees keys, -inf if a bound was so loose that a row is lost.
    """
    tiles: tl.constexpr = BLOCK // BLOCK_M
    program = tl.program_id(0)
    tile = program % tiles
    a = (program // tiles) % row_blocks
    problem = (program // tiles // row_blocks).to(tl.int64)
    actual = problem + first_problem
    value_ptr += actual // heads * stride_vb + (actual % heads) // GROUP * stride_vh
    log_kernel_ptr += problem * groups * length
    group_ptr += problem * n
    offset_ptr += problem * n
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = a * BLOCK + place
    c = tl.arange(0, BLOCK_C)
    step = tl.arange(0, BLOCK_N)
    begin = tl.maximum(a - 1, 0) * BLOCK
    end = tl.minimum(a * BLOCK + tile * BLOCK_M + BLOCK_M, n)

    block = problem * row_blocks + a
    far = tl.load(far_ptr + block * BLOCK + place)
    far_top = tl.where(far > 0.0, tl.load(top_ptr + block), float("-inf"))
    if ONE_PASS:
        bound = tl.maximum(tl.load(near_top_ptr + block), tl.load(top_ptr + block))
        top = tl.zeros((BLOCK_M,), tl.float32) + bound
    else:
        best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
        for first in range(begin, end, BLOCK_N):
            score = _scores(log_kernel_ptr, offset_ptr, group_ptr, row, first + step, n, length,
                            HAS_OFFSET)  # fmt: skip
            best = tl.maximum(best, score)
        top = tl.maximum(far_top, tl.max(best, 1))
    safe = tl.where(top == float("-inf"), 0.0, top)
    far_share = tl.where(far > 0.0, tl.exp(far_top - safe), 0.0)
    unit = 1.0 if ONE_PASS else tl.load(unit_ptr + block)
    far_value = tl.load(far_value_ptr + (block * BLOCK + place[:, None]) * BLOCK_C + c[None, :])
    scale = load_scale * (tl.load(far_scale_ptr + block) / unit)
    acc = far_value.to(tl.float32) * (far_share * scale)[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    rounded = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # divides the sum of the rounded weights
    for first in range(begin, end, BLOCK_N):
        key = first + step
        weight = tl.exp(_scores(log_kernel_ptr, offset_ptr, group_ptr, row, key, n, length,
                                HAS_OFFSET) - safe[:, None])  # fmt: skip
        sums += weight
        exists = key < n
        if HAS_OFFSET:  # values of hidden keys may be of any size
            offset = tl.load(offset_ptr + key, mask=exists, other=float("-inf"))
            exists &= offset > float("-inf")
        value = tl.load(value_ptr + key[:, None].to(tl.int64) * stride_vn + c[None, :],
                        mask=exists[:, None] & (c < DIM)[None, :], other=0.0)  # fmt: skip
        if not ONE_PASS:
            value = (value.to(tl.float32) * (1.0 / unit)).to(tl.float16)
        narrow = weight.to(value.dtype)
        rounded += narrow.to(tl.float32)
        acc = tl.dot(narrow, value, acc)
    far_total = tl.where(far > 0.0, far * far_share, 0.0)
    total = tl.sum(sums, 1) + far_total
    inside = row < n
    if HAS_HIDDEN:
        hidden = tl.load(hidden_ptr + actual // heads * n + row, mask=inside, other=1)
        total = tl.where(hidden != 0, 0.0, total)
    empty = total == 0.0
    lost = inside & empty & (top > float("-inf")) if ONE_PASS else inside & (row < 0)
    if HAS_HIDDEN:
        lost &= hidden == 0
    total = tl.where(empty, 1.0, total)
    share = tl.sum(rounded, 1) + far_total
    share = unit / tl.where(share > 0.0, share, 1.0)
    acc = tl.where(empty[:, None], 0.0, acc * share[:, None])
    lse = tl.where(empty, float("-inf"), top + tl.log(total))
    into = output_ptr + (problem * n + row[:, None]) * DIM + c[None, :]
    tl.store(into, acc.to(output_ptr.dtype.element_ty), mask=inside[:, None] & (c < DIM)[None, :])
    tl.store(lse_ptr + problem * n + row, lse, mask=inside)
    least = tl.where(inside & (empty == 0), lse, float("inf"))
    tl.store(least_ptr + program, tl.min(tl.where(lost, float("-inf"), least), 0))
