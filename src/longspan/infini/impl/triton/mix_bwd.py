"""Backward of the read and the mix: one pass for the rows, one for the memory.

With dA = g dO, U = dA / den and w = -(U . read): dsigma(q) = U M^T + w z^T, dM = sigma(q)^T U,
dz = sigma(q)^T w, dlocal = (1 - g) dO, dgate = g (1 - g) sum dO . (read - local). The read is
computed again. The passes are apart because dM, the read and dsigma(q) do not fit the registers
together: apart they read query and gradient twice and are faster.

Deterministic: one program owns dM of a segment, or of a part of it where segments are few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import KernelConfig, pick
from .configs import major_of, memory_bwd_config, mix_bwd_config
from .mix import Layout, constants_of, place_of, segments_of
from .tiles import (
    block_dim,
    dot_halves,
    full_grid,
    halves,
    high_half,
    kernel_input,
    load_rows,
    phi,
    rows_apart,
    store_rows,
    sum_rows,
)

__all__ = ["mix_backward"]

_PROGRAMS = 128  # fewer, and segments are cut into parts


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
    begin = tl.maximum(start + run * BLOCK_M * TILES, 0)
    stop = tl.minimum(start + tl.minimum((run + 1) * BLOCK_M * TILES, length), n_q)
    slot, g = place_of(segment, b, h, kv_heads, last, written_ptr, lengths_ptr, gate_ptr, n_k,
                       length, lag, GROUP, HAS_LENGTHS, LOCAL_FIRST)  # fmt: skip
    cols_d, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m = load_rows(m_ptr + slot * DIM * VALUE_DIM, VALUE_DIM, cols_d, cols_d < DIM, cols_v,
                  VALUE_DIM, False)  # fmt: skip
    m_high, m_low = halves(m, HALF)
    z = tl.load(z_ptr + slot * DIM + cols_d, mask=cols_d < DIM, other=0.0)
    q_ptr += b * stride_qb + h * stride_qh
    local_ptr += b * stride_lb + h * stride_lh
    do_ptr += b * stride_ob + h * stride_oh
    out = (b * heads + h) * n_q
    dgate = tl.zeros([BLOCK_M], tl.float32)
    for top in range(begin, stop, BLOCK_M):
        rows = top + tl.arange(0, BLOCK_M)
        inside = rows < stop
        q = load_rows(q_ptr, stride_qn, rows, inside, cols_d, DIM, UPCAST)
        do = load_rows(do_ptr, stride_on, rows, inside, cols_v, VALUE_DIM, UPCAST).to(tl.float32)
        near = load_rows(local_ptr, stride_ln, rows, inside, cols_v, VALUE_DIM, UPCAST)
        store_rows(dlocal_ptr + out * VALUE_DIM, VALUE_DIM, rows, inside, cols_v, (1.0 - g) * do,
                   VALUE_DIM)  # fmt: skip
        dgate -= tl.sum(do * near.to(tl.float32), 1)
        f = high_half(phi(q, inside, cols_d, DIM), HALF)
        den = tl.sum(f.to(tl.float32) * z[None, :], 1)
        inverse = tl.where(den > 0, 1.0 / tl.where(den > 0, den, 1.0), 0.0)
        share = g * inverse
        # w from the same u as the products: their errors cancel as they do
        u = high_half(do * share[:, None], HALF)
        read = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        read = dot_halves(f, f, m_high, m_low, read, HALF, False, True)
        w = -tl.sum(u.to(tl.float32) * read, 1) * inverse
        dgate -= tl.where(share > 0, w / tl.where(share > 0, share, 1.0), 0.0)  # dO . read
        df = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        df = dot_halves(u, u, tl.trans(m_high), tl.trans(m_low), df, HALF, False, True)
        # loaded again: 32 registers a thread less than to keep it in this layout
        df += w[:, None] * tl.load(z_ptr + slot * DIM + cols_d, mask=cols_d < DIM, other=0.0)
        dq = df * tl.minimum(f.to(tl.float32), 1.0)  # f > 1 only where q > 0
        store_rows(dq_ptr + out * DIM, DIM, rows, inside, cols_d, dq, DIM)
        tl.store(share_ptr + out + rows, share, mask=inside)
        tl.store(w_ptr + out + rows, w, mask=inside)
    tl.store(dgate_ptr + ((b * heads + h) * segments + segment - first) * runs + run,
             tl.sum(dgate, 0))  # fmt: skip


@triton.jit(do_not_specialize=["n_q", "query_offset", "first", "segments", "parts", "span", "slots",
                               "base"])  # fmt: skip
def _infini_memory_bwd_kernel(
    q_ptr, do_ptr, share_ptr, w_ptr, dm_ptr, dz_ptr,
    stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on,
    heads, kv_heads, n_q, query_offset, first, segments, length, parts, span, slots, base,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, APART: tl.constexpr, HALF: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dM = sigma(Q)^T U, dz = sigma(Q)^T w of `span` rows of a segment, over a key head's group.

    dm and dz have `slots` entries a head; those of the first segment are at `base`.
    """
    part = tl.program_id(0) % parts
    rest = tl.program_id(0) // parts
    index = (rest % segments).to(tl.int64)
    b = (rest // segments // kv_heads).to(tl.int64)
    kv = (rest // segments % kv_heads).to(tl.int64)
    start = (first + index) * length - query_offset
    low = tl.maximum(start + part * span, 0)
    high = tl.minimum(start + tl.minimum((part + 1) * span, length), n_q)
    cols_d, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    dm = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    dz = tl.zeros([APART, BLOCK_D], tl.float32)
    for j in range(0, GROUP):
        h = kv * GROUP + j
        out = (b * heads + h) * n_q
        q_rows = q_ptr + b * stride_qb + h * stride_qh
        do_rows = do_ptr + b * stride_ob + h * stride_oh
        for begin in range(low, high, BLOCK_M):
            rows = begin + tl.arange(0, BLOCK_M)
            inside = rows < high
            q = load_rows(q_rows, stride_qn, rows, inside, cols_d, DIM, UPCAST)
            do = load_rows(do_rows, stride_on, rows, inside, cols_v, VALUE_DIM, UPCAST)
            share = tl.load(share_ptr + out + rows, mask=inside, other=0.0)
            w = tl.load(w_ptr + out + rows, mask=inside, other=0.0)
            f = high_half(phi(q, inside, cols_d, DIM), HALF)
            u = high_half(do.to(tl.float32) * share[:, None], HALF)
            dm = dot_halves(tl.trans(f), tl.trans(f), u, u, dm, HALF, False, False)
            dz += sum_rows(f.to(tl.float32) * w[:, None], APART)
    at = (b * kv_heads + kv) * slots + base + index * parts + part
    store_rows(dm_ptr + at * DIM * VALUE_DIM, VALUE_DIM, cols_d, cols_d < DIM, cols_v, dm,
               VALUE_DIM)  # fmt: skip
    tl.store(dz_ptr + at * DIM + cols_d, tl.sum(dz, 0), mask=cols_d < DIM)


def mix_backward(
    grad: Tensor, query: Tensor, local: Tensor, memory: Tensor, normaliser: Tensor, gate: Tensor,
    written: Tensor, key_lengths: Tensor | None, layout: Layout,
    kernel: KernelConfig | None = None, memory_kernel: KernelConfig | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, local, memory, normaliser and gate."""
    grad, query, local = kernel_input(grad), kernel_input(query), kernel_input(local)
    batch, heads, n_q, dim = query.shape
    kv_heads, slots, value_dim = memory.shape[1], memory.shape[2], local.shape[-1]
    dq, dlocal = query.new_empty(query.shape), local.new_empty(local.shape)
    first, segments = segments_of(layout, n_q)
    blank = max(0, -layout.query_offset)
    dq[:, :, :blank], dlocal[:, :, :blank] = 0, 0
    if local.numel() == 0 or segments == 0:
        nothing, no_total, no_gate = (torch.zeros_like(t) for t in (memory, normaliser, gate))
        return dq, dlocal, nothing, no_total, no_gate
    major = major_of(query.device)
    sizes = kernel or pick([mix_bwd_config(dim, value_dim, query.dtype, major)])
    runs = triton.cdiv(layout.length, sizes.block_m * sizes.block_n)
    dgate = memory.new_empty((batch, heads, segments, runs))
    share, w = (memory.new_empty((batch, heads, n_q)) for _ in range(2))
    constants = constants_of(query, local, memory, key_lengths, layout, sizes)
    _infini_mix_bwd_kernel[full_grid(runs * segments * batch * heads)](
        query, local, memory.contiguous(), normaliser.contiguous(), gate, written, key_lengths,
        grad, dq, dlocal, share, w, dgate, *query.stride()[:3], *local.stride()[:3],
        *grad.stride()[:3], heads, kv_heads, n_q, layout.n_k, layout.query_offset, first, segments,
        slots - 1, layout.length, layout.lag, TILES=sizes.block_n, **constants, **sizes.options(),
    )  # fmt: skip
    sizes = memory_kernel or pick([memory_bwd_config(dim, value_dim, query.dtype, major)])
    if parts is None:
        parts = _parts(batch * kv_heads * segments, layout.length, sizes.block_m)
    span = triton.cdiv(triton.cdiv(layout.length, parts), sizes.block_m) * sizes.block_m
    base = first - layout.lag  # the state that the first of these segments reads, unless clamped
    as_states = parts == 1 and base >= 0 and base + segments <= slots
    count = slots if as_states else segments * parts
    dm = memory.new_empty((batch, kv_heads, count, dim, value_dim))
    dz = memory.new_empty((batch, kv_heads, count, dim))
    base = base if as_states else 0
    del constants["HAS_LENGTHS"], constants["LOCAL_FIRST"]
    constants["BLOCK_M"] = sizes.block_m
    _infini_memory_bwd_kernel[full_grid(parts * segments * batch * kv_heads)](
        query, grad, share, w, dm, dz, *query.stride()[:3], *grad.stride()[:3], heads, kv_heads,
        n_q, layout.query_offset, first, segments, layout.length, parts, span, count, base,
        APART=rows_apart(sizes.block_m, block_dim(dim), sizes.num_warps), **constants,
        **sizes.options(),
    )  # fmt: skip
    seen = _has_gate(layout, first, segments, written, key_lengths)  # (B, S)
    open_ = torch.sigmoid(gate)
    summed = (dgate.sum(3) * seen[:, None]).sum((0, 2)) * open_ * (1 - open_)
    if as_states:
        for made in (dm, dz):
            made[:, :, :base], made[:, :, base + segments :] = 0, 0
        return dq, dlocal, dm, dz, summed
    dm, dz = (t.unflatten(2, (segments, parts)).sum(3) for t in (dm, dz))
    return (
        dq,
        dlocal,
        _to_slots(dm, layout, first, slots),
        _to_slots(dz, layout, first, slots),
        summed,
    )


def _parts(programs: int, length: int, rows: int) -> int:
    """Parts of a segment: powers of two, enough to occupy a device, of at least four tiles."""
    parts = 1
    while parts * programs < _PROGRAMS and 2 * parts * 4 * rows <= length:
        parts *= 2
    return parts


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
