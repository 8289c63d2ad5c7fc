"""The matrices between blocks of rows and runs of keys, one complex one for each frequency."""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton.launch import KernelConfig

__all__ = ["WEIGHT_TILE", "weight_kernel"]

WEIGHT_TILE = KernelConfig(32, 0, 4, 1)  # outputs; inputs as the product


@triton.jit(do_not_specialize=["runs", "row_blocks", "pieces", "extra", "outputs", "inputs"])
def weight_kernel(
    kernel_ptr, factor_ptr, in_scale_ptr, out_scale_ptr, vector_ptr, run_block_ptr, run_group_ptr,
    weight_ptr, sum_ptr,
    runs, row_blocks, pieces, extra, groups, outputs, inputs, width,
    BLOCK: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    IS_BACK: tl.constexpr,
):  # fmt: skip
    """weight[r, f, :, o, k] = G in_scale[k] / (out_scale[o] sqrt(B)) in float16, and G @ vector.

    G[a, u] = kernel[g(u), a - block(u)] factor[a, u], runs two blocks and more before the row's.
    Forward: outputs are row blocks a, inputs runs u. IS_BACK: the conjugate transpose of G. The
    product has tiles of BLOCK_T outputs; what it does not visit is not written. vector (R, F, 2, inputs) and sums in float32.
    """
    tiles = tl.cdiv(outputs, BLOCK_O)
    program = tl.program_id(0)
    tile = program % tiles
    problem = (program // tiles // BLOCK).to(tl.int64)
    frequency = problem * BLOCK + (program // tiles) % BLOCK
    kernel_ptr += frequency * 2 * (groups * pieces)
    factor_ptr += problem * row_blocks * runs
    vector_ptr += frequency * 2 * inputs
    weight_ptr += frequency * 2 * outputs * width
    run_block_ptr += problem * runs
    run_group_ptr += problem * runs
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    step = tl.arange(0, BLOCK_K)
    inside = o < outputs
    scale = tl.load(out_scale_ptr + problem * outputs + o, mask=inside, other=1.0)
    scale = 1.0 / (scale * BLOCK**0.5)
    visited = tile * BLOCK_O // BLOCK_T * BLOCK_T  # first output of the product's tile
    if IS_BACK:
        block = tl.load(run_block_ptr + o, mask=inside, other=row_blocks)
        group = tl.load(run_group_ptr + o, mask=inside, other=0)
        begin = (tl.load(run_block_ptr + visited) + 2) // BLOCK_K * BLOCK_K
        end = row_blocks
    else:
        begin = 0
        end = tl.minimum(runs, tl.minimum(visited + BLOCK_T, row_blocks) - 2 + extra)
    sum_real = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    sum_imaginary = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    for first in range(begin, end, BLOCK_K):
        k = first + step
        exists = k < inputs
        if IS_BACK:
            piece = k[None, :] - block[:, None]
            place = group[:, None] * pieces + piece
            at = k[None, :] * runs + o[:, None]
        else:
            of_run = tl.load(run_block_ptr + k, mask=exists, other=row_blocks)
            own = tl.load(run_group_ptr + k, mask=exists, other=0)
            piece = o[:, None] - of_run[None, :]
            place = own[None, :] * pieces + piece
            at = o[:, None] * runs + k[None, :]
        far = (piece >= 2) & inside[:, None] & exists[None, :]
        factor = tl.load(factor_ptr + at, mask=far, other=0.0)
        live = far & (factor > 0.0)
        real = tl.load(kernel_ptr + place, mask=live, other=0.0) * factor
        imaginary = tl.load(kernel_ptr + groups * pieces + place, mask=live, other=0.0) * factor
        if IS_BACK:
            imaginary = -imaginary
        v_real = tl.load(vector_ptr + k, mask=exists, other=0.0)[None, :]
        v_imaginary = tl.load(vector_ptr + inputs + k, mask=exists, other=0.0)[None, :]
        sum_real += real * v_real - imaginary * v_imaginary
        sum_imaginary += real * v_imaginary + imaginary * v_real
        in_scale = tl.load(in_scale_ptr + problem * inputs + k, mask=exists, other=0.0)
        turn = in_scale[None, :] * scale[:, None]
        into = weight_ptr + o[:, None] * width + k[None, :]
        tl.store(into, (real * turn).to(tl.float16), mask=inside[:, None])
        into += outputs * width
        tl.store(into, (imaginary * turn).to(tl.float16), mask=inside[:, None])
    f = (program // tiles) % BLOCK
    into_sum = sum_ptr + (problem * outputs + o) * (2 * BLOCK) + 2 * f
    tl.store(into_sum, tl.sum(sum_real, 1), mask=inside)
    tl.store(into_sum + 1, tl.sum(sum_imaginary, 1), mask=inside)
