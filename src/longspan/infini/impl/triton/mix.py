"""Read the memory, and mix with local attention, in one pass.

out = g sigma(q) M / (sigma(q) z) + (1 - g) local. dtypes float16 and bfloat16 (float32 where
interpreted); head dims up to 128; grouped heads; sm_80 and later. mix_bwd.py holds the backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import KernelConfig, interpreting, pick
from .configs import major_of, mix_config
from .tiles import (
    block_dim,
    dot_halves,
    full_grid,
    halves,
    kernel_input,
    load_rows,
    phi,
    store_rows,
    upcasts,
)

__all__ = ["Layout", "constants_of", "mix", "place_of", "segments_of"]


class Layout(NamedTuple):
    """Where rows stand and which memory they read."""

    length: int  # tokens of a segment
    lag: int
    query_offset: int
    n_k: int
    local_first: bool  # no gate where there is no memory


@triton.jit
def place_of(
    segment, b, h, kv_heads, last, written_ptr, lengths_ptr, gate_ptr, n_k, length, lag,
    GROUP: tl.constexpr, HAS_LENGTHS: tl.constexpr, LOCAL_FIRST: tl.constexpr,
):  # fmt: skip
    """Slot of the memory that a segment reads, and the share of that memory."""
    before = tl.maximum(segment - lag, 0)
    slot = (b * kv_heads + h // GROUP) * (last + 1) + tl.minimum(before, last)
    g = tl.sigmoid(tl.load(gate_ptr + h))
    if LOCAL_FIRST:
        held = tl.minimum(before * length, n_k)
        if HAS_LENGTHS:
            held = tl.minimum(held, tl.load(lengths_ptr + b))
        g = tl.where(held + tl.load(written_ptr + b) > 0, g, 0.0)
    return slot, g


@triton.jit(do_not_specialize=["n_q", "n_k", "query_offset", "first", "segments", "last"])
def _infini_mix_kernel(
    q_ptr, local_ptr, m_ptr, z_ptr, gate_ptr, written_ptr, lengths_ptr, o_ptr,
    stride_qb, stride_qh, stride_qn, stride_lb, stride_lh, stride_ln,
    heads, kv_heads, n_q, n_k, query_offset, first, segments, last, length, lag,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, LOCAL_FIRST: tl.constexpr, HALF: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """TILES tiles of BLOCK_M rows of one segment of one head."""
    runs = tl.cdiv(length, BLOCK_M * TILES)
    run = tl.program_id(0) % runs
    rest = tl.program_id(0) // runs
    segment = first + (rest % segments).to(tl.int64)
    b = (rest // segments // heads).to(tl.int64)
    h = (rest // segments % heads).to(tl.int64)
    start = segment * length - query_offset  # row of the segment's first position
    low = tl.maximum(start, 0)
    high = tl.minimum(start + length, n_q)
    begin = start + run * BLOCK_M * TILES
    if (begin >= high) | (begin + BLOCK_M * TILES <= low):
        return
    slot, g = place_of(segment, b, h, kv_heads, last, written_ptr, lengths_ptr, gate_ptr, n_k,
                     length, lag, GROUP, HAS_LENGTHS, LOCAL_FIRST)  # fmt: skip
    cols_d, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m = load_rows(m_ptr + slot * DIM * VALUE_DIM, VALUE_DIM, cols_d, cols_d < DIM, cols_v,
                  VALUE_DIM, False)  # fmt: skip
    m_high, m_low = halves(m, HALF)
    z = tl.load(z_ptr + slot * DIM + cols_d, mask=cols_d < DIM, other=0.0)
    q_ptr += b * stride_qb + h * stride_qh
    local_ptr += b * stride_lb + h * stride_lh
    o_ptr += (b * heads + h) * n_q * VALUE_DIM
    begin = tl.maximum(begin, low)  # some other tile starts here, or none
    stop = tl.minimum(start + (run + 1) * BLOCK_M * TILES, high)
    for top in range(begin, stop, BLOCK_M):
        rows = top + tl.arange(0, BLOCK_M)
        inside = rows < stop
        q = load_rows(q_ptr, stride_qn, rows, inside, cols_d, DIM, UPCAST)
        near = load_rows(local_ptr, stride_ln, rows, inside, cols_v, VALUE_DIM, UPCAST)
        f = phi(q, inside, cols_d, DIM)
        f_high, f_low = halves(f, HALF)
        # numerator and denominator with the same features
        den = tl.sum(f_high.to(tl.float32) * z[None, :], 1)
        inverse = tl.where(den > 0, 1.0 / tl.where(den > 0, den, 1.0), 0.0)
        read = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        read = dot_halves(f_high, f_low, m_high, m_low, read, HALF, False, True)
        out = read * (g * inverse)[:, None] + (1.0 - g) * near.to(tl.float32)
        store_rows(o_ptr, VALUE_DIM, rows, inside, cols_v, out, VALUE_DIM)


def mix(
    query: Tensor, local: Tensor, memory: Tensor, normaliser: Tensor, gate: Tensor,
    written: Tensor, key_lengths: Tensor | None, layout: Layout,
    kernel: KernelConfig | None = None,
) -> Tensor:  # fmt: skip
    """Output (B, H, N_q, D_v); memory (B, H_kv, R, D, D_v), normaliser (B, H_kv, R, D)."""
    query, local = kernel_input(query), kernel_input(local)
    batch, heads, n_q, _ = query.shape
    output = local.new_empty(local.shape)
    first, segments = segments_of(layout, n_q)
    output[:, :, : max(0, -layout.query_offset)] = 0
    if output.numel() == 0 or segments == 0:
        return output
    sizes = kernel or pick(
        [mix_config(query.shape[-1], local.shape[-1], query.dtype, major_of(query.device))]
    )
    runs = triton.cdiv(layout.length, sizes.block_m * sizes.block_n)
    _infini_mix_kernel[full_grid(runs * segments * batch * heads)](
        query, local, memory.contiguous(), normaliser.contiguous(), gate, written, key_lengths,
        output, *query.stride()[:3], *local.stride()[:3], heads, memory.shape[1], n_q, layout.n_k,
        layout.query_offset, first, segments, memory.shape[2] - 1, layout.length, layout.lag,
        TILES=sizes.block_n, **constants_of(query, local, memory, key_lengths, layout, sizes),
        **sizes.options(),
    )  # fmt: skip
    return output


def segments_of(layout: Layout, n_q: int) -> tuple[int, int]:
    """First segment that a row stands in, and how many there are."""
    last = layout.query_offset + n_q - 1
    if n_q == 0 or last < 0:
        return 0, 0
    first = max(layout.query_offset, 0) // layout.length
    return first, last // layout.length - first + 1


def constants_of(
    query: Tensor, local: Tensor, memory: Tensor, key_lengths: Tensor | None, layout: Layout,
    sizes: KernelConfig,
) -> dict[str, int | bool]:  # fmt: skip
    """Compile-time arguments that the kernels of the mix share."""
    dim, value_dim = query.shape[-1], local.shape[-1]
    upcast = upcasts(query.dtype, interpreting())
    return {
        "GROUP": query.shape[1] // memory.shape[1], "DIM": dim, "VALUE_DIM": value_dim,
        "BLOCK_D": block_dim(dim), "BLOCK_DV": block_dim(value_dim), "BLOCK_M": sizes.block_m,
        "HAS_LENGTHS": key_lengths is not None, "LOCAL_FIRST": layout.local_first,
        "HALF": query.dtype is not torch.float32 and not upcast, "UPCAST": upcast,
    }  # fmt: skip
