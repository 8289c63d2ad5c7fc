"""Read the memory, and mix with local attention, in one pass; and its backward.

out = g sigma(q) M / (sigma(q) z) + (1 - g) local. Backward, with dA = g dO, U = dA / den and
w = -(U . read): dsigma(q) = U M^T + w z^T, dM = sigma(q)^T U, dz = sigma(q)^T w,
dlocal = (1 - g) dO, dgate = g (1 - g) sum dO . (read - local). The read is computed again.

dtypes float16 and bfloat16 (float32 where interpreted); head dims up to 128; grouped heads; sm_80
and later; deterministic: one program owns the gradient of a segment's memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import KernelConfig, interpreting, pick
from .configs import TILES, major_of, memory_bwd_config, mix_bwd_config, mix_config
from .tiles import (
    block_dim,
    full_grid,
    kernel_input,
    load_rows,
    phi,
    split_dot,
    store_rows,
    upcasts,
)

__all__ = ["Layout", "mix", "mix_backward"]


class Layout(NamedTuple):
    """Where rows stand and which memory they read."""

    length: int  # tokens of a segment
    lag: int
    query_offset: int
    n_k: int
    local_first: bool  # no gate where there is no memory


@triton.jit
def _place(
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
    slot, g = _place(segment, b, h, kv_heads, last, written_ptr, lengths_ptr, gate_ptr, n_k,
                     length, lag, GROUP, HAS_LENGTHS, LOCAL_FIRST)  # fmt: skip
    cols_d, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m = load_rows(m_ptr + slot * DIM * VALUE_DIM, VALUE_DIM, cols_d, cols_d < DIM, cols_v,
                  VALUE_DIM, False)  # fmt: skip
    z = tl.load(z_ptr + slot * DIM + cols_d, mask=cols_d < DIM, other=0.0)
    q_ptr += b * stride_qb + h * stride_qh
    local_ptr += b * stride_lb + h * stride_lh
    o_ptr += (b * heads + h) * n_q * VALUE_DIM
    for i in range(0, TILES):
        rows = begin + i * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (rows >= low) & (rows < high)
        q = load_rows(q_ptr, stride_qn, rows, inside, cols_d, DIM, UPCAST)
        near = load_rows(local_ptr, stride_ln, rows, inside, cols_v, VALUE_DIM, UPCAST)
        f = phi(q, inside, cols_d, DIM)
        if HALF:  # numerator and denominator with the same features
            f = f.to(tl.bfloat16).to(tl.float32)
        den = tl.sum(f * z[None, :], 1)
        inverse = tl.where(den > 0, 1.0 / tl.where(den > 0, den, 1.0), 0.0)
        read = split_dot(f, m, tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), HALF, False, True)
        out = g * (read * inverse[:, None]) + (1.0 - g) * near.to(tl.float32)
        store_rows(o_ptr, VALUE_DIM, rows, inside, cols_v, out, VALUE_DIM)


@triton.jit(do_not_specialize=["n_q", "n_k", "query_offset", "first", "segments", "last"])
def _infini_mix_bwd_kernel(
    q_ptr, local_ptr, m_ptr, z_ptr, gate_ptr, written_ptr, lengths_ptr, do_ptr,
    dq_ptr, dlocal_ptr, share_ptr, w_ptr, dgate_ptr,
    stride_qb, stride_qh, stride_qn, stride_lb, stride_lh, stride_ln,
    stride_ob, stride_oh, stride_on,
    heads, kv_heads, n_q, n_k, query_offset, first, segments, last, length, lag,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, LOCAL_FIRST: tl.constexpr, HALF: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows, and g / den and w of each row for the gradient of the memory."""
    runs = tl.cdiv(length, BLOCK_M * TILES)
    run = tl.program_id(0) % runs
    rest = tl.program_id(0) // runs
    segment = first + (rest % segments).to(tl.int64)
    b = (rest // segments // heads).to(tl.int64)
    h = (rest // segments % heads).to(tl.int64)
    start = segment * length - query_offset
    low = tl.maximum(start, 0)
    high = tl.minimum(start + length, n_q)
    begin = start + run * BLOCK_M * TILES
    if (begin >= high) | (begin + BLOCK_M * TILES <= low):
        return
    slot, g = _place(segment, b, h, kv_heads, last, written_ptr, lengths_ptr, gate_ptr, n_k,
                     length, lag, GROUP, HAS_LENGTHS, LOCAL_FIRST)  # fmt: skip
    cols_d, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m = load_rows(m_ptr + slot * DIM * VALUE_DIM, VALUE_DIM, cols_d, cols_d < DIM, cols_v,
                  VALUE_DIM, False)  # fmt: skip
    z = tl.load(z_ptr + slot * DIM + cols_d, mask=cols_d < DIM, other=0.0)
    q_ptr += b * stride_qb + h * stride_qh
    local_ptr += b * stride_lb + h * stride_lh
    do_ptr += b * stride_ob + h * stride_oh
    out = (b * heads + h) * n_q
    dgate = tl.zeros([BLOCK_M], tl.float32)
    for i in range(0, TILES):
        rows = begin + i * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (rows >= low) & (rows < high)
        do = load_rows(do_ptr, stride_on, rows, inside, cols_v, VALUE_DIM, UPCAST).to(tl.float32)
        store_rows(dlocal_ptr + out * VALUE_DIM, VALUE_DIM, rows, inside, cols_v, (1.0 - g) * do,
                   VALUE_DIM)  # fmt: skip
        q = load_rows(q_ptr, stride_qn, rows, inside, cols_d, DIM, UPCAST).to(tl.float32)
        f = phi(q, inside, cols_d, DIM)
        if HALF:
            f = f.to(tl.bfloat16).to(tl.float32)
        den = tl.sum(f * z[None, :], 1)
        inverse = tl.where(den > 0, 1.0 / tl.where(den > 0, den, 1.0), 0.0)
        read = split_dot(f, m, tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), HALF, False, True)
        read = read * inverse[:, None]
        near = load_rows(local_ptr, stride_ln, rows, inside, cols_v, VALUE_DIM, UPCAST)
        dgate += tl.sum(do * (read - near.to(tl.float32)), 1)
        u = do * (g * inverse)[:, None]
        if HALF:  # w from the same u as the products: their errors cancel as they do
            u = u.to(tl.bfloat16).to(tl.float32)
        w = -tl.sum(u * read, 1)
        df = split_dot(u, tl.trans(m), w[:, None] * z[None, :], HALF, False, True)
        dq = df * tl.where(q > 0, 1.0, f)
        store_rows(dq_ptr + out * DIM, DIM, rows, inside, cols_d, dq, DIM)
        tl.store(share_ptr + out + rows, g * inverse, mask=inside)
        tl.store(w_ptr + out + rows, w, mask=inside)
    tl.store(dgate_ptr + ((b * heads + h) * segments + segment - first) * runs + run,
             tl.sum(dgate, 0))  # fmt: skip


@triton.jit(do_not_specialize=["n_q", "query_offset", "first", "segments"])
def _infini_memory_bwd_kernel(
    q_ptr, do_ptr, share_ptr, w_ptr, dm_ptr, dz_ptr,
    stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on,
    heads, kv_heads, n_q, query_offset, first, segments, length,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dM = sigma(Q)^T U and dz = sigma(Q)^T w of one segment of one key head, over its group."""
    index = (tl.program_id(0) % segments).to(tl.int64)
    b = (tl.program_id(0) // segments // kv_heads).to(tl.int64)
    kv = (tl.program_id(0) // segments % kv_heads).to(tl.int64)
    start = (first + index) * length - query_offset
    low = tl.maximum(start, 0)
    high = tl.minimum(start + length, n_q)
    cols_d, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    dm = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    dz = tl.zeros([BLOCK_D], tl.float32)
    for j in range(0, GROUP):
        h = kv * GROUP + j
        out = (b * heads + h) * n_q
        for begin in range(low, high, BLOCK_M):
            rows = begin + tl.arange(0, BLOCK_M)
            inside = rows < high
            q = load_rows(q_ptr + b * stride_qb + h * stride_qh, stride_qn, rows, inside, cols_d,
                          DIM, UPCAST)  # fmt: skip
            do = load_rows(do_ptr + b * stride_ob + h * stride_oh, stride_on, rows, inside,
                           cols_v, VALUE_DIM, UPCAST).to(tl.float32)  # fmt: skip
            share = tl.load(share_ptr + out + rows, mask=inside, other=0.0)
            w = tl.load(w_ptr + out + rows, mask=inside, other=0.0)
            f = phi(q, inside, cols_d, DIM)
            if HALF:
                f = f.to(tl.bfloat16).to(tl.float32)
            dm = split_dot(tl.trans(f), do * share[:, None], dm, HALF, False, False)
            dz += tl.sum(f * w[:, None], 0)
    at = (b * kv_heads + kv) * segments + index
    store_rows(dm_ptr + at * DIM * VALUE_DIM, VALUE_DIM, cols_d, cols_d < DIM, cols_v, dm,
               VALUE_DIM)  # fmt: skip
    tl.store(dz_ptr + at * DIM + cols_d, dz, mask=cols_d < DIM)


def mix(
    query: Tensor, local: Tensor, memory: Tensor, normaliser: Tensor, gate: Tensor,
    written: Tensor, key_lengths: Tensor | None, layout: Layout,
    kernel: KernelConfig | None = None,
) -> Tensor:  # fmt: skip
    """Output (B, H, N_q, D_v); memory (B, H_kv, R, D, D_v), normaliser (B, H_kv, R, D)."""
    query, local = kernel_input(query), kernel_input(local)
    batch, heads, n_q, _ = query.shape
    output = local.new_empty(local.shape)
    first, segments = _segments(layout, n_q)
    output[:, :, : max(0, -layout.query_offset)] = 0
    if output.numel() == 0 or segments == 0:
        return output
    sizes = kernel or pick(
        [mix_config(query.shape[-1], local.shape[-1], query.dtype, major_of(query.device))]
    )
    runs = triton.cdiv(layout.length, sizes.block_m * TILES)
    _infini_mix_kernel[full_grid(runs * segments * batch * heads)](
        query, local, memory.contiguous(), normaliser.contiguous(), gate, written, key_lengths,
        output, *query.stride()[:3], *local.stride()[:3], heads, memory.shape[1], n_q, layout.n_k,
        layout.query_offset, first, segments, memory.shape[2] - 1, layout.length, layout.lag,
        TILES=TILES, **_constants(query, local, memory, key_lengths, layout, sizes),
        **sizes.options(),
    )  # fmt: skip
    return output


def mix_backward(
    grad: Tensor, query: Tensor, local: Tensor, memory: Tensor, normaliser: Tensor, gate: Tensor,
    written: Tensor, key_lengths: Tensor | None, layout: Layout,
    kernel: KernelConfig | None = None, memory_kernel: KernelConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, local, memory, normaliser and gate."""
    grad, query, local = kernel_input(grad), kernel_input(query), kernel_input(local)
    batch, heads, n_q, dim = query.shape
    kv_heads, slots, value_dim = memory.shape[1], memory.shape[2], local.shape[-1]
    dq, dlocal = query.new_empty(query.shape), local.new_empty(local.shape)
    first, segments = _segments(layout, n_q)
    blank = max(0, -layout.query_offset)
    dq[:, :, :blank], dlocal[:, :, :blank] = 0, 0
    if local.numel() == 0 or segments == 0:
        nothing, no_total, no_gate = (torch.zeros_like(t) for t in (memory, normaliser, gate))
        return dq, dlocal, nothing, no_total, no_gate
    dm = memory.new_empty((batch, kv_heads, segments, dim, value_dim))
    dz = memory.new_empty((batch, kv_heads, segments, dim))
    sizes = kernel or pick([mix_bwd_config(dim, value_dim, query.dtype)])
    runs = triton.cdiv(layout.length, sizes.block_m * TILES)
    dgate = memory.new_zeros((batch, heads, segments, runs))
    share, w = (memory.new_empty((batch, heads, n_q)) for _ in range(2))
    _infini_mix_bwd_kernel[full_grid(runs * segments * batch * heads)](
        query, local, memory.contiguous(), normaliser.contiguous(), gate, written, key_lengths,
        grad, dq, dlocal, share, w, dgate, *query.stride()[:3], *local.stride()[:3],
        *grad.stride()[:3], heads, kv_heads, n_q, layout.n_k, layout.query_offset, first, segments,
        slots - 1, layout.length, layout.lag, TILES=TILES,
        **_constants(query, local, memory, key_lengths, layout, sizes), **sizes.options(),
    )  # fmt: skip
    sizes = memory_kernel or pick([memory_bwd_config(dim, value_dim, query.dtype)])
    constants = _constants(query, local, memory, key_lengths, layout, sizes)
    del constants["HAS_LENGTHS"], constants["LOCAL_FIRST"]
    _infini_memory_bwd_kernel[full_grid(segments * batch * kv_heads)](
        query, grad, share, w, dm, dz, *query.stride()[:3], *grad.stride()[:3], heads, kv_heads,
        n_q, layout.query_offset, first, segments, layout.length, **constants, **sizes.options(),
    )  # fmt: skip
    seen = _has_gate(layout, first, segments, written, key_lengths)  # (B, S)
    open_ = torch.sigmoid(gate)
    summed = (dgate.sum(3) * seen[:, None]).sum((0, 2)) * open_ * (1 - open_)
    return (
        dq,
        dlocal,
        _to_slots(dm, layout, first, slots),
        _to_slots(dz, layout, first, slots),
        summed,
    )


def _has_gate(
    layout: Layout, first: int, segments: int, written: Tensor, key_lengths: Tensor | None
) -> Tensor:
    """(B, segments) float32: 1 where the rows of a segment take the gate."""
    index = torch.arange(first, first + segments, device=written.device)
    if not layout.local_first:
        return torch.ones(1, segments, device=written.device)
    held = ((index - layout.lag).clamp(min=0) * layout.length).clamp(max=layout.n_k)[None]
    if key_lengths is not None:
        held = torch.minimum(held, key_lengths[:, None])
    return ((held + written[:, None]) > 0).float()


def _to_slots(grads: Tensor, layout: Layout, first: int, slots: int) -> Tensor:
    """Gradients per segment to gradients per state; several segments may read the first or last."""
    segments = grads.shape[2]
    start = first - layout.lag  # state read by segment 0 of these, before clamping
    if start >= 0 and start + segments <= slots:
        if start == 0 and segments == slots:
            return grads
        made = grads.new_zeros((*grads.shape[:2], slots, *grads.shape[3:]))
        made[:, :, start : start + segments] = grads
        return made
    made = grads.new_zeros((*grads.shape[:2], slots, *grads.shape[3:]))
    low = min(max(1 - start, 0), segments)  # these read state 0
    if low:
        made[:, :, 0] += grads[:, :, :low].sum(2)
    high = max(min(slots - start, segments), low)
    middle = slice(start + low, start + high)
    made[:, :, middle] += grads[:, :, low:high]
    if high < segments:
        made[:, :, -1] += grads[:, :, high:].sum(2)
    return made


def _segments(layout: Layout, n_q: int) -> tuple[int, int]:
    """First segment that a row stands in, and how many there are."""
    last = layout.query_offset + n_q - 1
    if n_q == 0 or last < 0:
        return 0, 0
    first = max(layout.query_offset, 0) // layout.length
    return first, last // layout.length - first + 1


def _constants(
    query: Tensor, local: Tensor, memory: Tensor, key_lengths: Tensor | None, layout: Layout,
    sizes: KernelConfig,
) -> dict[str, int | bool]:  # fmt: skip
    dim, value_dim = query.shape[-1], local.shape[-1]
    upcast = upcasts(query.dtype, interpreting())
    return {
        "GROUP": query.shape[1] // memory.shape[1], "DIM": dim, "VALUE_DIM": value_dim,
        "BLOCK_D": block_dim(dim), "BLOCK_DV": block_dim(value_dim), "BLOCK_M": sizes.block_m,
        "HAS_LENGTHS": key_lengths is not None, "LOCAL_FIRST": layout.local_first,
        "HALF": query.dtype is not torch.float32 and not upcast, "UPCAST": upcast,
    }  # fmt: skip
