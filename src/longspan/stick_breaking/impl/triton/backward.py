"""Backward kernels of stick-breaking attention: deterministic, bounded workspace.

Supported: everything the forward supports, but float32 only to head dim 128. Two passes over the
visited tiles, 7 products in all:

1. `_stick_breaking_dq_bwd_kernel` walks each query tile near to far, as the forward did and as far
   as it did, makes dq, and stores the stick and the gradient mass that enter each visited tile.
2. `_stick_breaking_dkv_bwd_kernel` owns a key tile, loops over the query tiles that visited it and
   over the query heads of its group, and makes dk and dv in float32 registers.

The stored pairs are what bounds memory: heads, and at extreme length ranges of query tiles, are
processed in chunks under `workspace_bytes`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import interpreting, unit_last_stride
from ....errors import UnsupportedError
from .common import (
    KEY_TILE,
    Config,
    _key_of_column,
    _load_columns,
    _tile_gradient,
    _tile_replay,
)
from .forward import _LOG2E, _row_bounds, _visible, bhn_strides, block_dim, forward_config

__all__ = ["WORKSPACE_BYTES", "stick_backward"]

#: Upper bound of the memory that one call takes besides its results.
WORKSPACE_BYTES = 448 * 2**20


@triton.jit
def _cell(row_tile, key_tile, row_lo, cells_first, cells_growth):
    """Index of a (query tile, key tile) pair in the workspace; query tile r has room for
    cells_first + cells_growth * r key tiles."""
    r, r0 = row_tile.to(tl.int64), tl.cast(row_lo, tl.int64)
    start = cells_first * r + cells_growth * (r * (r - 1) // 2)
    start0 = cells_first * r0 + cells_growth * (r0 * (r0 - 1) // 2)
    return start - start0 + key_tile


@triton.jit
def _window_start(
    pid_m,
    query_offset,
    window,
    ATTEND_CURRENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """First key tile a query tile can see under a window."""
    first = pid_m * BLOCK_M + query_offset
    if ATTEND_CURRENT:
        first += 1
    return tl.maximum(first - window, 0) // BLOCK_N


@triton.jit
def _visit_for_dq(
    acc, rest, far, dz_sum, q, do, far_end, k_base, v_base, stride_kn, stride_vn,
    k_offsets, v_offsets, ws_ptrs, tile, cell_lo, limit, key_length, window,
    scale_log2, bias_log2, mask_d, mask_dv,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr,
    PAD_D: tl.constexpr, PAD_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of logits, its share of dq, and the pair stored for the second pass."""
    first_key = tile * BLOCK_N
    k_ptrs = k_base + first_key.to(tl.int64) * stride_kn + k_offsets
    v_ptrs = v_base + first_key.to(tl.int64) * stride_vn + v_offsets
    keys = first_key + _key_of_column()
    if MASKED:
        in_range = keys < key_length
        k = tl.load(k_ptrs, mask=in_range[:, None] & mask_d[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=in_range[:, None] & mask_dv[None, :], other=0.0)
    else:
        k = _load_columns(k_ptrs, mask_d, PAD_D)
        v = _load_columns(v_ptrs, mask_dv, PAD_DV)
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    # a spent stick leaves exactly the gradient of log_rest: drop the rounding left in `far`
    far = tl.where(rest < 1e-9, far_end, far)
    cell = (tile - cell_lo).to(tl.int64) * (2 * BLOCK_M)
    tl.store(ws_ptrs + cell, rest)
    tl.store(ws_ptrs + cell + BLOCK_M, far)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + bias_log2
    if MASKED:
        x = tl.where(_visible(limit, keys, key_length, WINDOW, window), x, float("-inf"))
    weights, beta, factor = _tile_replay(x, rest, k.dtype, BLOCK_M, APPROX)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # late: its registers come free late
    dz, near = _tile_gradient(weights, beta, dp, far, BLOCK_M)
    acc = tl.dot(dz.to(k.dtype), k, acc, input_precision=PRECISION)
    if HAS_BIAS:
        dz_sum += tl.sum(dz, 1)
    return acc, rest * factor, far - near, dz_sum


@triton.jit(do_not_specialize=["unit_lo", "row_lo", "row_hi", "cells_first", "cells_growth"])
def _stick_breaking_dq_bwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, residual_ptr, do_ptr, grad_rest_ptr, visited_ptr,
    dq_ptr, dbias_ptr, ws_ptr,
    bias_ptr, key_lengths_ptr, cu_q_ptr, cu_k_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    stride_dob, stride_doh, stride_don, stride_lb, stride_lh, stride_ln,
    stride_dqb, stride_dqh, stride_dqn, stride_ws,
    scale, scale_log2, n_q, n_k, query_offset, window, H, group, num_m, num_seqs,
    unit_lo, row_lo, row_hi, cells_first, cells_growth,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ATTEND_CURRENT: tl.constexpr, WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, VARLEN: tl.constexpr, RESIDUAL: tl.constexpr,
    HAS_GRAD_REST: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """One program: dq of BLOCK_M queries of one head."""
    pid = tl.program_id(0)
    num_rows = row_hi - row_lo
    if VARLEN:
        num_rows = num_m
    pid_m = num_rows - 1 - pid % num_rows
    unit = pid // num_rows
    q_row, k_row = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    if VARLEN:
        b, h = unit % num_seqs, unit_lo + unit // num_seqs
        unit = unit // num_seqs
        q_row = tl.load(cu_q_ptr + b).to(tl.int64)
        k_row = tl.load(cu_k_ptr + b).to(tl.int64)
        n_q = (tl.load(cu_q_ptr + b + 1) - q_row).to(tl.int32)
        n_k = (tl.load(cu_k_ptr + b + 1) - k_row).to(tl.int32)
        query_offset = n_k - n_q
        row_tile = (q_row // BLOCK_M).to(tl.int32) + b + pid_m
        if (pid_m * BLOCK_M >= n_q) | (row_tile < row_lo) | (row_tile >= row_hi):
            return
    else:
        pid_m += row_lo
        row_tile = pid_m
        b, h = (unit_lo + unit) // H, (unit_lo + unit) % H
    key_length = n_k
    if HAS_LENGTHS:
        key_length = min(tl.load(key_lengths_ptr + b), n_k)
    bias_log2 = 0.0
    if HAS_BIAS:
        bias_log2 = tl.load(bias_ptr + h) * 1.4426950408889634

    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    h_kv = (h // group).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = q_row + offs_m
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_m = offs_m < n_q
    mask_d, mask_dv = offs_d < D, offs_dv < DV
    PAD_D: tl.constexpr = D != BLOCK_D
    PAD_DV: tl.constexpr = DV != BLOCK_DV

    _, lo_full, full, hi = _row_bounds(
        pid_m, n_q, n_k, key_length, query_offset, ATTEND_CURRENT, WINDOW, window, BLOCK_M, BLOCK_N
    )
    stop = hi - tl.load(visited_ptr + (b * H + h) * num_m + pid_m)
    lo_full = tl.maximum(lo_full, stop)
    cell_lo = 0
    if WINDOW:
        cell_lo = _window_start(pid_m, query_offset, window, ATTEND_CURRENT, BLOCK_M, BLOCK_N)
    limit = offs_m + query_offset
    if ATTEND_CURRENT:
        limit += 1

    mask_md = mask_m[:, None] & mask_d[None, :]
    mask_mv = mask_m[:, None] & mask_dv[None, :]
    q = tl.load(
        q_ptr + b64 * stride_qb + h64 * stride_qh + rows[:, None].to(tl.int64) * stride_qn + offs_d[None, :],
        mask=mask_md, other=0.0,
    )  # fmt: skip
    do = tl.load(
        do_ptr + b64 * stride_dob + h64 * stride_doh + rows[:, None].to(tl.int64) * stride_don + offs_dv[None, :],
        mask=mask_mv, other=0.0,
    )  # fmt: skip
    o_offsets = (
        b64 * stride_ob
        + h64 * stride_oh
        + rows[:, None].to(tl.int64) * stride_on
        + offs_dv[None, :]
    )
    o = tl.load(o_ptr + o_offsets, mask=mask_mv, other=0.0).to(tl.float32)
    if RESIDUAL:
        o += tl.load(residual_ptr + o_offsets, mask=mask_mv, other=0.0).to(tl.float32)
    far = tl.sum(o * do.to(tl.float32), 1)
    far_end = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if HAS_GRAD_REST:
        far_end += tl.load(
            grad_rest_ptr + b64 * stride_lb + h64 * stride_lh + rows.to(tl.int64) * stride_ln,
            mask=mask_m, other=0.0,
        )  # fmt: skip
        far += far_end
    if UPCAST:
        q = q.to(tl.float32)
        do = do.to(tl.float32)

    columns = _key_of_column()
    k_base = k_ptr + b64 * stride_kb + h_kv * stride_kh + k_row * stride_kn
    v_base = v_ptr + b64 * stride_vb + h_kv * stride_vh + k_row * stride_vn
    k_offsets = columns[:, None] * stride_kn + offs_d[None, :]
    v_offsets = columns[:, None] * stride_vn + offs_dv[None, :]
    first_cell = _cell(row_tile, 0, row_lo, cells_first, cells_growth) * (2 * BLOCK_M)
    ws_ptrs = ws_ptr + unit.to(tl.int64) * stride_ws + first_cell + tl.arange(0, BLOCK_M)

    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    rest = tl.where(mask_m, 1.0, 0.0)  # rows beyond the end get no weight in the second pass
    dz_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for i in tl.range(0, hi - full):
        acc, rest, far, dz_sum = _visit_for_dq(
            acc, rest, far, dz_sum, q, do, far_end, k_base, v_base, stride_kn, stride_vn,
            k_offsets, v_offsets, ws_ptrs, hi - 1 - i, cell_lo, limit, key_length,
            window, scale_log2, bias_log2, mask_d, mask_dv, True, WINDOW, HAS_BIAS, PAD_D, PAD_DV,
            BLOCK_M, BLOCK_N, UPCAST, PRECISION, APPROX,
        )  # fmt: skip
    for i in tl.range(0, full - lo_full):
        acc, rest, far, dz_sum = _visit_for_dq(
            acc, rest, far, dz_sum, q, do, far_end, k_base, v_base, stride_kn, stride_vn,
            k_offsets, v_offsets, ws_ptrs, full - 1 - i, cell_lo, limit, key_length,
            window, scale_log2, bias_log2, mask_d, mask_dv, False, WINDOW, HAS_BIAS, PAD_D, PAD_DV,
            BLOCK_M, BLOCK_N, UPCAST, PRECISION, APPROX,
        )  # fmt: skip
    if WINDOW:
        for i in tl.range(0, lo_full - stop):
            acc, rest, far, dz_sum = _visit_for_dq(
                acc, rest, far, dz_sum, q, do, far_end, k_base, v_base, stride_kn, stride_vn,
                k_offsets, v_offsets, ws_ptrs, lo_full - 1 - i, cell_lo, limit,
                key_length, window, scale_log2, bias_log2, mask_d, mask_dv, True, WINDOW, HAS_BIAS,
                PAD_D, PAD_DV, BLOCK_M, BLOCK_N, UPCAST, PRECISION, APPROX,
            )  # fmt: skip

    dq_ptrs = (
        dq_ptr
        + b64 * stride_dqb
        + h64 * stride_dqh
        + rows[:, None].to(tl.int64) * stride_dqn
        + offs_d[None, :]
    )
    tl.store(dq_ptrs, (acc * scale).to(dq_ptr.dtype.element_ty), mask=mask_md)
    if HAS_BIAS:
        tl.store(dbias_ptr + (b * H + h) * num_m + pid_m, tl.sum(dz_sum, 0))


@triton.jit
def _visitors_bwd_kernel(
    visited_ptr, list_ptr, count_ptr, key_lengths_ptr, cu_q_ptr, cu_k_ptr,
    n_q, n_k, query_offset, window, H, num_m, num_n, num_seqs, unit_lo, row_lo, row_hi,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    ATTEND_CURRENT: tl.constexpr, WINDOW: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """For one key tile of one query head: which query tiles beyond the diagonal visited it.

    Compacted, those that need no mask first; the two counts are stored beside the list.
    """
    tile = tl.program_id(0)
    unit = tl.program_id(1)
    q_row = tl.cast(0, tl.int64)
    if VARLEN:
        b, h = unit % num_seqs, unit_lo + unit // num_seqs
        q_row = tl.load(cu_q_ptr + b).to(tl.int64)
        n_q = (tl.load(cu_q_ptr + b + 1) - q_row).to(tl.int32)
        n_k = (tl.load(cu_k_ptr + b + 1) - tl.load(cu_k_ptr + b)).to(tl.int32)
        query_offset = n_k - n_q
        first_tile = (q_row // BLOCK_M).to(tl.int32) + b
        m_begin, m_end = row_lo - first_tile, row_hi - first_tile
    else:
        b, h = (unit_lo + unit) // H, (unit_lo + unit) % H
        m_begin, m_end = row_lo, row_hi
    key_length = n_k
    if HAS_LENGTHS:
        key_length = min(tl.load(key_lengths_ptr + b), n_k)
    _, m_full, m_stop, m_last = _column_bounds(
        tile, n_q, key_length, query_offset, m_begin, m_end, ATTEND_CURRENT, WINDOW, window,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip
    position = tl.cast(0, tl.int32)
    out = list_ptr + (unit.to(tl.int64) * num_n + tile) * num_m
    for part in tl.static_range(2):
        low, high = (m_full, m_stop) if part == 0 else (m_stop, m_last)
        before = position
        for start in range(0, num_m, BLOCK_R):
            m = start + tl.arange(0, BLOCK_R)
            last = tl.minimum(m * BLOCK_M + BLOCK_M, n_q) - 1 + query_offset
            if ATTEND_CURRENT:
                last += 1
            end = tl.maximum(tl.minimum(last, key_length), 0)
            visited = tl.load(visited_ptr + (b * H + h) * num_m + m, mask=m < num_m, other=0)
            came = (m >= low) & (m < high) & ((end + BLOCK_N - 1) // BLOCK_N - visited <= tile)
            came = came.to(tl.int32)
            tl.store(out + position + tl.cumsum(came, 0) - came, m, mask=came > 0)
            position += tl.sum(came, 0)
        tl.store(count_ptr + (unit * num_n + tile) * 2 + part, position - before)


@triton.jit
def _column_bounds(
    tile, n_q, key_length, query_offset, m_begin, m_end,
    ATTEND_CURRENT: tl.constexpr, WINDOW: tl.constexpr, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Query tiles that see a key tile: [first, full) masked, [full, stop) whole, [stop, end) masked.

    Masked at the end are the edge of a window and a last query tile that is not full.
    """
    shift = query_offset
    if ATTEND_CURRENT:
        shift += 1
    num_m = (n_q + BLOCK_M - 1) // BLOCK_M
    m_begin = tl.maximum(m_begin, 0)
    m_end = tl.minimum(m_end, num_m)
    key = tile * BLOCK_N
    # row j sees key i if i < j + shift
    first = tl.maximum(key - shift + 1, 0) // BLOCK_M
    full = (tl.maximum(key + BLOCK_N - shift, 0) + BLOCK_M - 1) // BLOCK_M
    if key + BLOCK_N > key_length:  # a ragged key tile is masked for every row
        full = num_m
    if (key >= key_length) | (key - shift + 1 >= n_q):  # no row sees this tile
        m_end = m_begin
    end = m_end
    stop = tl.minimum(m_end, n_q // BLOCK_M)
    if WINDOW:
        # and if i >= j + shift - window
        end = tl.minimum(
            end, tl.maximum(key + BLOCK_N - 1 + window - shift + BLOCK_M, 0) // BLOCK_M
        )
        stop = tl.minimum(stop, tl.maximum(key + window - shift + 1, 0) // BLOCK_M)
    first = tl.minimum(tl.maximum(first, m_begin), end)
    full = tl.minimum(tl.maximum(full, first), end)
    stop = tl.minimum(tl.maximum(stop, full), end)
    return first, full, stop, end


@triton.jit
def _visit_for_dkv(
    dk, dv, k, v, q_base, do_base, stride_qn, stride_don, ws, first_tile, row_lo,
    cells_first, cells_growth, m, tile, n_q, key_length, query_offset, window, scale_log2,
    bias_log2, offs_d, offs_dv,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, ATTEND_CURRENT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """One query tile's share of dk and dv."""
    inside = tl.arange(0, BLOCK_M)
    offs_m = m * BLOCK_M + inside
    mask_m = offs_m < n_q
    first_row = (m * BLOCK_M).to(tl.int64)
    # narrow: row offsets stay in registers across the loop; wide: there is no room for them
    NARROW: tl.constexpr = k.shape[1] <= 64 and v.shape[1] <= 64
    if NARROW:
        q_ptrs = q_base + first_row * stride_qn + (inside[:, None] * stride_qn + offs_d[None, :])
        do_ptrs = (
            do_base + first_row * stride_don + (inside[:, None] * stride_don + offs_dv[None, :])
        )
    else:
        q_ptrs = q_base + (first_row + inside)[:, None] * stride_qn + offs_d[None, :]
        do_ptrs = do_base + (first_row + inside)[:, None] * stride_don + offs_dv[None, :]
    if MASKED:
        q = tl.load(q_ptrs, mask=mask_m[:, None] & (offs_d < D)[None, :], other=0.0)
        do = tl.load(do_ptrs, mask=mask_m[:, None] & (offs_dv < DV)[None, :], other=0.0)
    else:
        q = _load_columns(q_ptrs, offs_d < D, PAD_D)
        do = _load_columns(do_ptrs, offs_dv < DV, PAD_DV)
    key_cell = tile
    if WINDOW:
        key_cell = tile - _window_start(m, query_offset, window, ATTEND_CURRENT, BLOCK_M, BLOCK_N)
    cell = _cell(first_tile + m, key_cell, row_lo, cells_first, cells_growth) * (2 * BLOCK_M)
    rest = tl.load(ws + cell + inside)
    far = tl.load(ws + cell + BLOCK_M + inside)
    if UPCAST:
        q = q.to(tl.float32)
        do = do.to(tl.float32)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + bias_log2
    if MASKED:
        limit = offs_m + query_offset
        if ATTEND_CURRENT:
            limit += 1
        keys = tile * BLOCK_N + _key_of_column()
        x = tl.where(_visible(limit, keys, key_length, WINDOW, window), x, float("-inf"))
    weights, beta, _ = _tile_replay(x, rest, k.dtype, BLOCK_M, APPROX)
    # the order of the last three products decides how many registers live at once
    if NARROW:
        dv = tl.dot(tl.trans(weights.to(k.dtype)), do, dv, input_precision=PRECISION)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    dz, _ = _tile_gradient(weights, beta, dp, far, BLOCK_M)
    if not NARROW:
        dv = tl.dot(tl.trans(weights.to(k.dtype)), do, dv, input_precision=PRECISION)
    dk = tl.dot(tl.trans(dz.to(k.dtype)), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "unit_lo",
        "row_lo",
        "row_hi",
        "cells_first",
        "cells_growth",
        "add_to_previous",
    ]
)
def _stick_breaking_dkv_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, ws_ptr, list_ptr, count_ptr,
    bias_ptr, key_lengths_ptr, cu_q_ptr, cu_k_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn, stride_ws,
    scale, scale_log2, n_q, n_k, query_offset, window, H_kv, group, num_m, num_n, num_seqs,
    unit_lo, row_lo, row_hi, cells_first, cells_growth, add_to_previous,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ATTEND_CURRENT: tl.constexpr, WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, VARLEN: tl.constexpr, LISTED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BLOCK_N keys of one key head. Heavy tiles (early keys) start first."""
    pid = tl.program_id(0)
    tile = pid % num_n
    unit_kv = pid // num_n
    q_row, k_row = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    first_tile = tl.cast(0, tl.int32)
    m_begin, m_end = row_lo, row_hi
    if VARLEN:
        b, h_kv = unit_kv % num_seqs, unit_lo // group + unit_kv // num_seqs
        q_row = tl.load(cu_q_ptr + b).to(tl.int64)
        k_row = tl.load(cu_k_ptr + b).to(tl.int64)
        n_q = (tl.load(cu_q_ptr + b + 1) - q_row).to(tl.int32)
        n_k = (tl.load(cu_k_ptr + b + 1) - k_row).to(tl.int32)
        query_offset = n_k - n_q
        first_tile = (q_row // BLOCK_M).to(tl.int32) + b
        m_begin, m_end = row_lo - first_tile, row_hi - first_tile
        if tile * BLOCK_N >= n_k:
            return
    else:
        b, h_kv = (unit_lo // group + unit_kv) // H_kv, (unit_lo // group + unit_kv) % H_kv
    key_length = n_k
    if HAS_LENGTHS:
        key_length = min(tl.load(key_lengths_ptr + b), n_k)

    b64, h_kv64 = b.to(tl.int64), h_kv.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    PAD_D: tl.constexpr = D != BLOCK_D
    PAD_DV: tl.constexpr = DV != BLOCK_DV
    keys = tile * BLOCK_N + _key_of_column()
    mask_n = keys < n_k
    mask_kd = mask_n[:, None] & (offs_d < D)[None, :]
    mask_kv = mask_n[:, None] & (offs_dv < DV)[None, :]
    key_rows = (k_row + keys)[:, None].to(tl.int64)
    valid = (keys < key_length)[:, None]  # padding may hold NaN, and 0 * NaN is NaN
    k = tl.load(
        k_ptr + b64 * stride_kb + h_kv64 * stride_kh + key_rows * stride_kn + offs_d[None, :],
        mask=mask_kd & valid, other=0.0,
    )  # fmt: skip
    v = tl.load(
        v_ptr + b64 * stride_vb + h_kv64 * stride_vh + key_rows * stride_vn + offs_dv[None, :],
        mask=mask_kv & valid, other=0.0,
    )  # fmt: skip
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)

    first, full, stop, end = _column_bounds(
        tile, n_q, key_length, query_offset, m_begin, m_end, ATTEND_CURRENT, WINDOW, window,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), dtype=tl.float32)
    for g in range(0, group):
        h = h_kv64 * group + g
        bias_log2 = 0.0
        if HAS_BIAS:
            bias_log2 = tl.load(bias_ptr + h) * 1.4426950408889634
        q_base = q_ptr + b64 * stride_qb + h * stride_qh + q_row * stride_qn
        do_base = do_ptr + b64 * stride_dob + h * stride_doh + q_row * stride_don
        if VARLEN:
            unit_ws = (unit_kv // num_seqs) * group + g
            unit_list = unit_ws * num_seqs + b
        else:
            unit_ws = unit_kv * group + g
            unit_list = unit_ws
        ws = ws_ptr + unit_ws.to(tl.int64) * stride_ws
        whole, edge = stop - full, end - stop
        list_base = list_ptr
        if LISTED:
            list_base += (unit_list.to(tl.int64) * num_n + tile) * num_m
            whole = tl.load(count_ptr + (unit_list * num_n + tile) * 2)
            edge = tl.load(count_ptr + (unit_list * num_n + tile) * 2 + 1)
        diagonal = full - first
        for i in tl.range(0, diagonal + edge):
            m = first + i
            if LISTED:
                m = tl.load(list_base + whole + i - diagonal, mask=i >= diagonal, other=m)
            else:
                m = tl.where(i < diagonal, m, stop + i - diagonal)
            dk, dv = _visit_for_dkv(
                dk, dv, k, v, q_base, do_base, stride_qn, stride_don, ws, first_tile,
                row_lo, cells_first, cells_growth, m, tile, n_q, key_length, query_offset, window,
                scale_log2, bias_log2, offs_d, offs_dv, True, WINDOW, ATTEND_CURRENT, D, DV,
                PAD_D, PAD_DV, BLOCK_M, BLOCK_N, UPCAST, PRECISION, APPROX,
            )  # fmt: skip
        for i in tl.range(0, whole):
            m = tl.load(list_base + i) if LISTED else full + i
            dk, dv = _visit_for_dkv(
                dk, dv, k, v, q_base, do_base, stride_qn, stride_don, ws, first_tile,
                row_lo, cells_first, cells_growth, m, tile, n_q, key_length, query_offset, window,
                scale_log2, bias_log2, offs_d, offs_dv, False, WINDOW, ATTEND_CURRENT, D, DV,
                PAD_D, PAD_DV, BLOCK_M, BLOCK_N, UPCAST, PRECISION, APPROX,
            )  # fmt: skip

    dk = dk * scale
    dk_ptrs = (
        dk_ptr + b64 * stride_dkb + h_kv64 * stride_dkh + key_rows * stride_dkn + offs_d[None, :]
    )
    dv_ptrs = (
        dv_ptr + b64 * stride_dvb + h_kv64 * stride_dvh + key_rows * stride_dvn + offs_dv[None, :]
    )
    if add_to_previous:
        dk += tl.load(dk_ptrs, mask=mask_kd, other=0.0).to(tl.float32)
        dv += tl.load(dv_ptrs, mask=mask_kv, other=0.0).to(tl.float32)
    tl.store(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), mask=mask_kd)
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=mask_kv)


class _Plan(NamedTuple):
    """How a backward pass is cut to stay under its memory bound.

    cells_first, cells_growth: query tile r has room for cells_first + cells_growth * r key tiles.
    units: query heads (dense: of all batch entries) per chunk, a multiple of the group.
    row_ranges: ranges of query tiles; more than one only if one group of heads exceeds the bound.
    cells: key-tile cells per unit, for the largest range.
    """

    cells_first: int
    cells_growth: int
    units: int
    row_ranges: tuple[tuple[int, int], ...]
    cells: int


def plan_backward(
    *, num_rows: int, num_n: int, units: int, group: int, query_offset: int, window: int | None,
    triangular: bool, block_m: int, block_n: int, workspace_bytes: int,
) -> _Plan:  # fmt: skip
    """Choose the workspace's shape and its chunks.

    num_rows: query tiles in all (of one head); num_n: key tiles; triangular: rows of tiles grow
    with the query position (dense causal), else every row may need all key tiles.
    """
    first, growth = num_n, 0
    if window is not None:
        first = min(first, triton.cdiv(window + block_m, block_n) + 1)
    elif triangular:
        ratio = block_m // block_n if block_m >= block_n else 1
        start = triton.cdiv(max(query_offset, 0) + block_m, block_n)
        rows = num_rows
        if start * rows + ratio * (rows * (rows - 1) // 2) < first * rows:
            first, growth = start, ratio

    def total(lo: int, hi: int) -> int:
        return first * (hi - lo) + growth * (hi * (hi - 1) // 2 - lo * (lo - 1) // 2)

    cell_bytes = 8 * block_m
    budget = max(workspace_bytes // cell_bytes, 1)  # cells
    if total(0, num_rows) * group <= budget:
        kept = min(units, budget // max(total(0, num_rows), 1) // group * group)
        chunks = triton.cdiv(units, kept)  # even chunks: no nearly empty last launch
        kept = triton.cdiv(units // group, chunks) * group
        return _Plan(first, growth, kept, ((0, num_rows),), total(0, num_rows))
    ranges, lo = [], 0
    while lo < num_rows:
        hi = lo + 1
        while hi < num_rows and total(lo, hi + 1) * group <= budget:
            hi += 1
        ranges.append((lo, hi))
        lo = hi
    return _Plan(first, growth, group, tuple(ranges), max(total(*r) for r in ranges))


def backward_configs(dtype: torch.dtype, head_dim: int, value_dim: int) -> tuple[Config, Config]:
    """Launch configurations of the dq and the dkv kernel; they share block_m with the forward."""
    block_m = forward_config(dtype, head_dim, value_dim).block_m
    wide = max(head_dim, value_dim)
    if interpreting() or dtype is torch.float32:
        return Config(block_m, 4, 1), Config(block_m, 4, 1)
    if wide > 128:
        return Config(block_m, 8, 1), Config(block_m, 8, 1)
    if wide > 64:
        return Config(block_m, 8, 3), Config(block_m, 8, 2)
    return Config(block_m, 4, 3), Config(block_m, 4, 3)


def stick_backward(
    grad_output: Tensor,
    grad_log_rest: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    residual: Tensor | None,
    log_rest: Tensor,
    visited: Tensor,
    *,
    scale: float,
    logit_bias: Tensor | None,
    query_offset: int,
    key_lengths: Tensor | None,
    attend_current: bool,
    window: int | None,
    early_stop: float | None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    configs: tuple[Config, Config] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients (dq, dk, dv, dlogit_bias) of `stick_forward`, called with the same settings.

    Args:
        grad_output, grad_log_rest: gradients of the two results; the second may be None.
        output, residual, log_rest, visited: what the forward returned with need_grad=True.
        workspace_bytes: bound on the memory used between the two passes.
        configs: launch configurations of the two kernels; block_m must be the forward's.

    Deterministic: no atomics; sums run in a fixed order.
    """
    del log_rest  # the sticks are walked again: recovering them from their total would drift
    q, k, v = unit_last_stride(q), unit_last_stride(k), unit_last_stride(v)
    grad_output, output = unit_last_stride(grad_output), output.contiguous()
    residual = None if residual is None else residual.contiguous()
    packed = cu_seqlens_q is not None
    heads, kv_heads = (q.shape[1], k.shape[1])
    group = heads // kv_heads
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    if q.dtype is torch.float32 and max(head_dim, value_dim) > 128:
        raise UnsupportedError(
            f"stick_backward: float32 with head dim {head_dim} and value dim {value_dim}; two tiles "
            'of keys and values do not fit into shared memory beyond 128. Use impl="eager", or '
            "bfloat16 or float16 inputs."
        )
    dq_config, dkv_config = configs or backward_configs(q.dtype, head_dim, value_dim)
    block_m, block_n = dq_config.block_m, KEY_TILE
    if cu_seqlens_q is not None:
        batch, n_q, n_k = cu_seqlens_q.numel() - 1, max_seqlen_q, max_seqlen_k
        num_rows = q.shape[0] // block_m + batch
        units, per_unit = heads, batch
    else:
        batch, n_q, n_k = q.shape[0], q.shape[2], k.shape[2]
        num_rows = triton.cdiv(n_q, block_m)
        units, per_unit = batch * heads, 1
    num_m, num_n = triton.cdiv(n_q, block_m), triton.cdiv(n_k, block_n)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))  # contiguous, as the fake says
    partial_bias = None
    if logit_bias is not None:
        partial_bias = q.new_zeros((batch, heads, num_m), dtype=torch.float32)
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        empty_bias = None if partial_bias is None else partial_bias.sum((0, 2))
        return dq.zero_(), dk.zero_(), dv.zero_(), empty_bias

    plan = plan_backward(
        num_rows=num_rows, num_n=num_n, units=units, group=group, query_offset=query_offset,
        window=window, triangular=not packed, block_m=block_m, block_n=block_n,
        workspace_bytes=workspace_bytes,
    )  # fmt: skip
    split = len(plan.row_ranges) > 1
    dk_sum = torch.empty(k.shape, dtype=torch.float32, device=k.device) if split else dk
    dv_sum = torch.empty(v.shape, dtype=torch.float32, device=v.device) if split else dv
    stride_ws = plan.cells * 2 * block_m
    workspace = q.new_empty((plan.units, stride_ws), dtype=torch.float32)
    listed = early_stop is not None
    visitors = counts = None
    if listed:
        visitors = torch.empty(
            (plan.units * per_unit, num_n, num_m), dtype=torch.int32, device=q.device
        )
        counts = torch.empty((plan.units * per_unit, num_n, 2), dtype=torch.int32, device=q.device)
    log_strides = (0, 0, 0)
    if grad_log_rest is not None:
        grad_log_rest = grad_log_rest.to(torch.float32)
        log_strides = bhn_strides(grad_log_rest, packed)
    interpreted = interpreting()
    shape = dict(
        D=head_dim, DV=value_dim, BLOCK_D=block_dim(head_dim), BLOCK_DV=block_dim(value_dim),
        BLOCK_M=block_m, BLOCK_N=block_n, ATTEND_CURRENT=attend_current,
        WINDOW=window is not None, HAS_BIAS=logit_bias is not None,
        HAS_LENGTHS=key_lengths is not None, VARLEN=packed,
        UPCAST=interpreted, PRECISION="ieee" if interpreted else "tf32x3", APPROX=not interpreted,
    )  # fmt: skip
    tensors = (logit_bias, key_lengths, cu_seqlens_q, cu_seqlens_k)
    inputs = (*bhn_strides(q, packed), *bhn_strides(k, packed), *bhn_strides(v, packed))
    scales = (scale, scale * _LOG2E)
    problem = (n_q, n_k, query_offset, window or 0)
    cells = (plan.cells_first, plan.cells_growth)
    for unit_lo in range(0, units, plan.units):
        count = min(plan.units, units - unit_lo)
        for index, (row_lo, row_hi) in enumerate(plan.row_ranges):
            tiles = num_m if packed else row_hi - row_lo
            _stick_breaking_dq_bwd_kernel[(tiles * count * per_unit,)](
                q, k, v, output, residual, grad_output, grad_log_rest, visited,
                dq, partial_bias, workspace, *tensors,
                *inputs, *bhn_strides(output, packed), *bhn_strides(grad_output, packed),
                *log_strides, *bhn_strides(dq, packed), stride_ws,
                *scales, *problem, heads, group, num_m, batch, unit_lo, row_lo, row_hi, *cells,
                RESIDUAL=residual is not None, HAS_GRAD_REST=grad_log_rest is not None, **shape,
                **dq_config.options(),
            )  # fmt: skip
            if listed:
                _visitors_bwd_kernel[(num_n, count * per_unit)](
                    visited, visitors, counts, *tensors[1:],
                    *problem, heads, num_m, num_n, batch, unit_lo, row_lo, row_hi,
                    BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=min(1024, triton.next_power_of_2(num_m)),
                    ATTEND_CURRENT=attend_current, WINDOW=window is not None,
                    HAS_LENGTHS=key_lengths is not None, VARLEN=packed, num_warps=4,
                )  # fmt: skip
            _stick_breaking_dkv_bwd_kernel[(num_n * (count // group) * per_unit,)](
                q, k, v, grad_output, dk_sum, dv_sum, workspace, visitors, counts, *tensors,
                *inputs, *bhn_strides(grad_output, packed),
                *bhn_strides(dk_sum, packed), *bhn_strides(dv_sum, packed), stride_ws,
                *scales, *problem, kv_heads, group, num_m, num_n, batch,
                unit_lo, row_lo, row_hi, *cells, int(index > 0),
                LISTED=listed, **shape,
                **dkv_config.options(),
            )  # fmt: skip
    if split:
        dk.copy_(dk_sum)
        dv.copy_(dv_sum)
    dbias = None if partial_bias is None else partial_bias.sum((0, 2))
    return dq, dk, dv, dbias
