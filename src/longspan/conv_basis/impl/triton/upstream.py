"""Spectra of the incoming gradient, one program for each block of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton.launch import KernelConfig

__all__ = ["UPSTREAM_TILE", "upstream_kernel"]

UPSTREAM_TILE = KernelConfig(64, 0, 8, 1)  # outputs, -


@triton.jit(do_not_specialize=["n", "row_blocks"])
def upstream_kernel(
    grad_ptr, output_ptr, lse_ptr, grad_lse_ptr, least_ptr, high_ptr,
    spectra_ptr, scale_ptr, bound_ptr, last_ptr, damped_ptr,
    n, row_blocks,
    DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """spectra[r, a, o, c] = sum_k W[o, B + k] exp(least_a - lse_k) dO_k / (scale sqrt(B)).

    last = dlse - dO . O, as it is and damped likewise; bound: the largest |dO|.
    """
    program = tl.program_id(0).to(tl.int64)
    problem = program // row_blocks
    a = program % row_blocks
    k = tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK_C)
    row = a * BLOCK + k
    inside = (row < n)[:, None] & (c < DIM)[None, :]
    place = (problem * n + row[:, None]) * DIM + c[None, :]
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    output = tl.load(output_ptr + place, mask=inside, other=0.0).to(tl.float32)
    last = -tl.sum(grad * output, 1)
    lse = tl.load(lse_ptr + problem * n + row, mask=row < n, other=float("-inf"))
    seen = lse > float("-inf")
    if HAS_GRAD_LSE:
        last += tl.load(grad_lse_ptr + problem * n + row, mask=seen, other=0.0)
    last = tl.where(seen, last, 0.0)
    damp = tl.where(seen, tl.exp(tl.load(least_ptr + program) - lse), 0.0)
    tl.store(last_ptr + problem * n + row, last, mask=row < n)
    tl.store(damped_ptr + program * BLOCK + k, last * damp)
    tl.store(bound_ptr + program, tl.max(tl.max(tl.abs(grad), 1), 0))
    grad *= damp[:, None]
    largest = tl.max(tl.max(tl.abs(grad), 1), 0)
    tl.store(scale_ptr + program, largest)
    narrow = (grad * (1.0 / tl.where(largest > 0.0, largest, 1.0))).to(tl.float16)
    spectra_ptr += program * (2 * BLOCK * BLOCK_C)
    for first in range(0, 2 * BLOCK, BLOCK_F):
        out = first + tl.arange(0, BLOCK_F)
        w = tl.load(high_ptr + out[:, None] * (2 * BLOCK) + BLOCK + k[None, :])
        part = tl.dot(w, narrow) * (1.0 / BLOCK**0.5)
        tl.store(spectra_ptr + out[:, None] * BLOCK_C + c[None, :], part.to(tl.float16))
