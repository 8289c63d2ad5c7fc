"""Frequency by frequency: blocks of rows from runs of keys, and in the backward the reverse."""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton.launch import KernelConfig

__all__ = ["MIX_TILE", "mix_kernel"]

MIX_TILE = KernelConfig(64, 32, 4, 2)  # outputs, inputs


@triton.jit(do_not_specialize=["row_blocks", "runs", "extra", "outputs", "inputs"])
def mix_kernel(
    weight_ptr, input_ptr, run_block_ptr, mixed_ptr,
    row_blocks, runs, extra, outputs, inputs, width, store_scale,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_BACK: tl.constexpr,
):  # fmt: skip
    """mixed[r, o, f] = store_scale sum_k weight[r, f, o, k] input[r, k, f], complex.

    Float16 in and out, sums in float32. `weight_kernel` says which tiles exist.
    """
    tiles = tl.cdiv(outputs, BLOCK_O)
    program = tl.program_id(0)
    tile = program % tiles
    f = (program // tiles) % BLOCK
    problem = (program // tiles // BLOCK).to(tl.int64)
    weight_ptr += (problem * BLOCK + f) * 2 * outputs * width
    input_ptr += problem * inputs * (2 * BLOCK * BLOCK_C) + f * (2 * BLOCK_C)
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = o < outputs
    c = tl.arange(0, BLOCK_C)
    step = tl.arange(0, BLOCK_K)
    if IS_BACK:
        block = tl.load(run_block_ptr + problem * runs + o, mask=inside, other=row_blocks)
        begin = (tl.min(block, 0) + 2) // BLOCK_K * BLOCK_K
        end = row_blocks
    else:
        begin = 0
        end = tl.minimum(runs, tl.minimum(tile * BLOCK_O + BLOCK_O, row_blocks) - 2 + extra)
    real = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    opposite = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    imaginary = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    for first in range(begin, end, BLOCK_K):
        k = first + step
        w = weight_ptr + o[:, None] * width + k[None, :]
        w_real = tl.load(w, mask=inside[:, None], other=0.0)
        w_imaginary = tl.load(w + outputs * width, mask=inside[:, None], other=0.0)
        x = input_ptr + k[:, None].to(tl.int64) * (2 * BLOCK * BLOCK_C) + c[None, :]
        exists = (k < inputs)[:, None]
        x_real = tl.load(x, mask=exists, other=0.0)
        x_imaginary = tl.load(x + BLOCK_C, mask=exists, other=0.0)
        real = tl.dot(w_real, x_real, real)
        opposite = tl.dot(w_imaginary, x_imaginary, opposite)
        imaginary = tl.dot(w_real, x_imaginary, imaginary)
        imaginary = tl.dot(w_imaginary, x_real, imaginary)
    real -= opposite
    into = mixed_ptr + (problem * outputs + o[:, None]) * (2 * BLOCK * BLOCK_C)
    into += f * (2 * BLOCK_C) + c[None, :]
    tl.store(into, (real * store_scale).to(tl.float16), mask=inside[:, None])
    tl.store(into + BLOCK_C, (imaginary * store_scale).to(tl.float16), mask=inside[:, None])
