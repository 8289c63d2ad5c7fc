"""Rows of the output: the far part back from its spectra, the near blocks weight by weight."""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton.launch import KernelConfig

__all__ = ["ROW_TILE", "row_kernel"]

ROW_TILE = KernelConfig(128, 32, 8, 1)  # rows, keys or frequencies


@triton.jit(do_not_specialize=["n", "row_blocks", "length"])
def row_kernel(
    mixed_ptr, back_ptr, far_ptr, top_ptr, far_scale_ptr, unit_ptr, log_kernel_ptr, offset_ptr, group_ptr,
    value_ptr, output_ptr, lse_ptr,
    stride_vb, stride_vh, stride_vn,
    n, row_blocks, length, heads, groups, first_problem, load_scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    """output = (far numerator + near numerator) / (far + near denominator), and lse.

    The running maximum starts at the scale of the far part, as in an online softmax. Weights and
    values / `unit` are multiplied in float16.
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
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    top = tl.zeros((BLOCK_M,), tl.float32) + tl.load(top_ptr + problem * row_blocks + a)
    far = tl.load(far_ptr + (problem * row_blocks + a) * BLOCK + place)
    unit = tl.load(unit_ptr + problem * row_blocks + a)
    if a >= 2:
        mixed_ptr += (problem * row_blocks + a) * (2 * BLOCK * BLOCK_C)
        for first in range(0, 2 * BLOCK, BLOCK_N):
            back = tl.load(
                back_ptr + (BLOCK + place[:, None]) * (2 * BLOCK) + first + step[None, :]
            )
            mixed = tl.load(mixed_ptr + (first + step[:, None]) * BLOCK_C + c[None, :])
            acc = tl.dot(back, mixed, acc)
        acc *= load_scale * (tl.load(far_scale_ptr + problem * row_blocks + a) / unit)
    total = tl.where(far > 0.0, far, 0.0)
    acc = tl.where(far[:, None] > 0.0, acc, 0.0)
    top = tl.where(far > 0.0, top, float("-inf"))
    for first in range(tl.maximum(a - 1, 0) * BLOCK, a * BLOCK + tile * BLOCK_M + BLOCK_M, BLOCK_N):
        key = first + step
        exists = key < n
        group = tl.load(group_ptr + key, mask=exists, other=0)
        lag = row[:, None] - key[None, :]
        seen = (lag >= 0) & (lag < length) & exists[None, :]
        kernel = log_kernel_ptr + group.to(tl.int64) * length
        score = tl.load(kernel[None, :] + lag, mask=seen, other=float("-inf"))
        if HAS_OFFSET:
            offset = tl.load(offset_ptr + key, mask=exists, other=float("-inf"))
            score += offset[None, :]
            exists &= offset > float("-inf")
        higher = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(top - safe)
        weight = tl.exp(score - safe[:, None])
        total = total * shrink + tl.sum(weight, 1)
        value = tl.load(value_ptr + key[:, None].to(tl.int64) * stride_vn + c[None, :],
                        mask=exists[:, None] & (c < DIM)[None, :], other=0.0)  # fmt: skip
        narrow = (value.to(tl.float32) * (1.0 / unit)).to(tl.float16)
        acc = tl.dot(weight.to(tl.float16), narrow, acc * shrink[:, None])
        top = higher
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc * (unit / total)[:, None]
    lse = tl.where(empty, float("-inf"), top + tl.log(total))
    into = output_ptr + (problem * n + row[:, None]) * DIM + c[None, :]
    tl.store(
        into, acc.to(output_ptr.dtype.element_ty), mask=(row < n)[:, None] & (c < DIM)[None, :]
    )
    tl.store(lse_ptr + problem * n + row, lse, mask=row < n)
