"""Spectra of blocks by tensor cores: a transform is a product with a fixed matrix.

Odd frequencies, theta_f = pi (2 f + 1) / (2 B), f < B: B complex numbers for 2 B real ones, no
special first and last one. A product of such spectra is a convolution whose ends wrap with the
sign turned; the wrapped part never reaches the B results that are kept.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import KernelConfig

__all__ = [
    "KERNEL_TILE",
    "VALUE_TILE",
    "kernel_spectra_kernel",
    "transform",
    "value_spectra_kernel",
]

KERNEL_TILE = KernelConfig(128, 64, 8, 1)  # outputs, pieces
VALUE_TILE = KernelConfig(64, 64, 8, 1)  # outputs, -


@functools.lru_cache(maxsize=8)
def transform(block: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """W (2 B, 2 B): rows cos(theta_f k), -sin(theta_f k) in turn. In float16, what float16 left
    out of it, and in float32. Its transpose over B, right half, goes back to the rows of a block.
    """
    frequency = torch.arange(block, dtype=torch.float64)[:, None]
    place = torch.arange(2 * block, dtype=torch.float64)
    # reduced in integers first: the angle stays exact
    turns = torch.remainder((2 * frequency + 1) * place, 4 * block) * (math.pi / (2 * block))
    wide = torch.stack((turns.cos(), -turns.sin()), 1).view(2 * block, 2 * block)
    high = wide.half()
    low = (wide - high.double()).half()
    return high.to(device), low.to(device), wide.float().to(device)


@triton.jit(do_not_specialize=["length", "pieces", "row_blocks"])
def kernel_spectra_kernel(
    log_kernel_ptr, block_max_ptr, starts_ptr, high_ptr, low_ptr, spectra_ptr, norm_ptr,
    length, pieces, row_blocks, groups,
    BLOCK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """spectra[r, o, g, p] = sum_k W[o, k] exp(c_g(p B - B + k) - scale_p), to float32 accuracy.

    scale_p: the largest value of the two blocks of lags; norm: root of the sum of squares.
    Pieces that no row can use are left out.
    """
    tiles_f: tl.constexpr = 2 * BLOCK // BLOCK_F
    program = tl.program_id(0)
    tile_f = program % tiles_f
    program = program // tiles_f
    tiles_p = tl.cdiv(pieces, BLOCK_P)
    tile_p = program % tiles_p
    entry = program // tiles_p  # problem * groups + group
    start = tl.load(starts_ptr + entry).to(tl.int32)
    if tile_p * BLOCK_P + start // BLOCK < row_blocks:
        group = entry % groups
        problem = (entry // groups).to(tl.int64)
        log_kernel_ptr += entry.to(tl.int64) * length
        block_max_ptr += entry.to(tl.int64) * pieces
        piece = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
        here = tl.load(block_max_ptr + piece, mask=piece < pieces, other=float("-inf"))
        before = tl.load(block_max_ptr + piece - 1, mask=(piece >= 1) & (piece <= pieces),
                         other=float("-inf"))  # fmt: skip
        scale = tl.maximum(here, before)
        scale = tl.where(scale == float("-inf"), 0.0, scale)
        output = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
        acc = tl.zeros((BLOCK_F, BLOCK_P), tl.float32)
        square = tl.zeros((BLOCK_P,), tl.float32)
        for first in range(0, 2 * BLOCK, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            lag = piece[None, :] * BLOCK - BLOCK + k[:, None]
            inside = (lag >= 0) & (lag < length) & (k[:, None] > 0)
            c = tl.load(log_kernel_ptr + lag, mask=inside, other=float("-inf"))
            weight = tl.exp(c - scale[None, :])
            square += tl.sum(weight * weight, 0)
            high = weight.to(tl.float16)
            low = (weight - high.to(tl.float32)).to(tl.float16)
            place = output[:, None] * (2 * BLOCK) + k[None, :]
            w_high = tl.load(high_ptr + place)
            w_low = tl.load(low_ptr + place)
            acc = tl.dot(w_high, low, acc)
            acc = tl.dot(w_low, high, acc)
            acc = tl.dot(w_high, high, acc)
        column = group * pieces + piece
        into = spectra_ptr + (problem * (2 * BLOCK) + output[:, None]) * (groups * pieces)
        tl.store(into + column[None, :], acc, mask=piece[None, :] < pieces)
        if tile_f == 0:
            tl.store(norm_ptr + entry.to(tl.int64) * pieces + piece, tl.sqrt(square),
                     mask=piece < pieces)  # fmt: skip


@triton.jit(do_not_specialize=["n", "runs"])
def value_spectra_kernel(
    value_ptr, offset_ptr, high_ptr, run_block_ptr, run_start_ptr, run_end_ptr,
    spectra_ptr, weight_ptr, run_scale_ptr, value_scale_ptr, value_bound_ptr, run_norm_ptr,
    run_group_ptr, group_ptr,
    stride_vb, stride_vh, stride_vn,
    n, runs, heads, first_problem,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr, HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    """spectra[r, u, o, c] = sum_k W[o, k] w_k v_k / (value_scale sqrt(B)), w = exp(beta - its max).

    One program for a run: keys of one block and one group. w is 0 outside of the run.
    value_bound: the largest |v|; run_norm: root of the sum of w^2; group: that of each key.
    """
    program = tl.program_id(0).to(tl.int64)
    problem = program // runs
    actual = problem + first_problem
    entry = actual // heads
    value_ptr += entry * stride_vb + (actual % heads) // GROUP * stride_vh
    start = tl.load(run_start_ptr + program)
    end = tl.minimum(tl.load(run_end_ptr + program), n)
    k = tl.arange(0, BLOCK)
    key = tl.load(run_block_ptr + program) * BLOCK + k
    mine = (key >= start) & (key < end)
    if HAS_OFFSET:
        offset = tl.load(offset_ptr + problem * n + key, mask=mine, other=float("-inf"))
    else:
        offset = tl.where(mine, 0.0, float("-inf"))
    top = tl.max(offset, 0)
    weight = tl.exp(offset - tl.where(top == float("-inf"), 0.0, top))
    tl.store(run_scale_ptr + program, top)
    tl.store(run_norm_ptr + program, tl.sqrt(tl.sum(weight * weight, 0)))
    own = tl.load(run_group_ptr + program)
    tl.store(group_ptr + problem * n + key, tl.zeros((BLOCK,), tl.int32) + own, mask=mine)
    tl.store(weight_ptr + program * BLOCK + k, weight)
    c = tl.arange(0, BLOCK_C)
    used = (weight > 0.0)[:, None] & (c < DIM)[None, :]
    value = tl.load(value_ptr + key[:, None].to(tl.int64) * stride_vn + c[None, :], mask=used,
                    other=0.0)  # fmt: skip
    value = value.to(tl.float32)
    tl.store(value_bound_ptr + program, tl.max(tl.max(tl.abs(value), 1), 0))
    scaled = value * weight[:, None]
    largest = tl.max(tl.max(tl.abs(scaled), 1), 0)
    tl.store(value_scale_ptr + program, largest)
    narrow = (scaled * (1.0 / tl.where(largest > 0.0, largest, 1.0))).to(tl.float16)
    spectra_ptr += program * (2 * BLOCK * BLOCK_C)
    for first in range(0, 2 * BLOCK, BLOCK_F):
        output = first + tl.arange(0, BLOCK_F)
        w = tl.load(high_ptr + output[:, None] * (2 * BLOCK) + k[None, :])
        part = tl.dot(w, narrow) * (1.0 / BLOCK**0.5)
        place = output[:, None] * BLOCK_C + c[None, :]
        tl.store(spectra_ptr + place, part.to(tl.float16))
