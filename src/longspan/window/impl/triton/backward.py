"""Backward kernels of window attention: no atomics, so the bits repeat.

With p = exp(s - lse) and dp = dO v^T: ds = p (dp - delta), delta = rowsum(dO * O) - dlse. Four
kernels: delta; dq (a program per tile of queries); the share of the sinks outside of the window in
dk and dv (a program per run of `sink_rows` queries, float32 partial sums); dk and dv (a program per
tile of keys, which first adds up the partial sums of its sinks in a fixed order).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import KernelConfig, interpreting, pick
from ...._validation import Call
from ...config import WindowConfig
from .configs import (
    SINK_TILE,
    key_config,
    query_config,
    shared_class,
    sink_config,
    sink_rows,
)
from .tiles import (
    LOG2E,
    below,
    block_dim,
    copies_pay,
    copies_tiles,
    copy_tile,
    cut,
    descriptors,
    grid_of,
    kernel_input,
    kernel_settings,
    load_tile,
    masked_count,
    masked_tile,
    row_bounds,
    run_bounds,
    sequence_of,
    store_tile,
    tiles_of,
    upcasts,
    within,
)

__all__ = ["triton_backward"]

_UNSPECIALIZED = ["n_q", "n_k", "query_offset", "window", "num_sinks"]
_DELTA_ROWS = 64


@triton.jit(do_not_specialize=["n_q"])
def _window_delta_bwd_kernel(
    o_ptr, do_ptr, dlse_ptr, delta_ptr,
    stride_ob, stride_oh, stride_on, stride_dob, stride_doh, stride_don,
    heads, n_q,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) - dlse; lse, delta and dlse are contiguous (B, H, N_q)."""
    tiles = tl.cdiv(n_q, BLOCK_M)
    start = tl.program_id(0) % tiles * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_DV)
    o_ptr += b * stride_ob + h * stride_oh
    do_ptr += b * stride_dob + h * stride_doh
    o = load_tile(o_ptr, stride_on, start, n_q, offs_m, offs_d, VALUE_DIM, BLOCK_DV, True, True)
    do = load_tile(do_ptr, stride_don, start, n_q, offs_m, offs_d, VALUE_DIM, BLOCK_DV, True, True)
    delta = tl.sum(o * do, 1)
    rows = bh * n_q + start + offs_m
    mask = start + offs_m < n_q
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + rows, mask=mask, other=0.0)
    tl.store(delta_ptr + rows, delta, mask=mask)


@triton.jit
def _add_query_gradient(
    dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, k_desc, v_desc, b, h, start, limit, low,
    count, offs_n, offs_d, offs_dv, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    KIND: tl.constexpr, IS_TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq += ds k over one tile of keys; KIND "full", "masked" or "sink" as in the forward."""
    if IS_TMA:
        k = copy_tile(k_desc, b, h, start, offs_n.shape[0], BLOCK_D, UPCAST)
        v = copy_tile(v_desc, b, h, start, offs_n.shape[0], BLOCK_DV, UPCAST)
    else:
        k = load_tile(
            k_ptr, stride_kn, start, limit, offs_n, offs_d, DIM, BLOCK_D, KIND != "full", UPCAST
        )
        v = load_tile(
            v_ptr, stride_vn, start, limit, offs_n, offs_dv, VALUE_DIM, BLOCK_DV, KIND != "full",
            UPCAST,
        )  # fmt: skip
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    w = tl.math.exp2(s * scale - lse[:, None])
    if KIND == "sink":
        w = tl.where(below(low, limit, start, offs_n), w, 0.0)
    elif KIND == "masked":
        w = tl.where(within(low, count, start, offs_n), w, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = w * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _window_query_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, k_desc, v_desc,
    cu_q_ptr, cu_k_ptr, lengths_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
    stride_dqb, stride_dqh, stride_dqn, stride_lb, stride_lh,
    scale, heads, n_q, n_k, query_offset, window, num_sinks,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_PACKED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    IS_TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_M queries of one head."""
    tiles = tl.cdiv(n_q, BLOCK_M)
    start_m = tl.program_id(0) % tiles * BLOCK_M
    b = (tl.program_id(0) // tiles // heads).to(tl.int64)
    h = (tl.program_id(0) // tiles % heads).to(tl.int64)
    q_start, k_start, n_q, n_k, query_offset = sequence_of(
        b, cu_q_ptr, cu_k_ptr, lengths_ptr, n_q, n_k, query_offset, IS_PACKED, HAS_LENGTHS)  # fmt: skip
    if start_m >= n_q:
        return
    if IS_PACKED:
        b = b * 0
    q_ptr += b * stride_qb + h * stride_qh + q_start * stride_qn
    h_k = h // GROUP
    k_ptr += b * stride_kb + h_k * stride_kh + k_start * stride_kn
    v_ptr += b * stride_vb + h_k * stride_vh + k_start * stride_vn
    do_ptr += b * stride_dob + h * stride_doh + q_start * stride_don
    dq_ptr += b * stride_dqb + h * stride_dqh + q_start * stride_dqn
    rows = b * stride_lb + h * stride_lh + q_start + start_m

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_m = start_m + offs_m < n_q
    # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV], [BLOCK_M], [BLOCK_M]
    q = load_tile(q_ptr, stride_qn, start_m, n_q, offs_m, offs_d, DIM, BLOCK_D, True, UPCAST)
    do = load_tile(
        do_ptr, stride_don, start_m, n_q, offs_m, offs_dv, VALUE_DIM, BLOCK_DV, True, UPCAST
    )
    lse = tl.load(lse_ptr + rows + offs_m, mask=mask_m, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + rows + offs_m, mask=mask_m, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    first = start_m + query_offset  # key indices of the rows
    last = tl.minimum(start_m + BLOCK_M, n_q) - 1 + query_offset
    log2_scale = scale * LOG2E
    begin, full_begin, full_end, end, sink_end = run_bounds(
        first, last, n_k, window, num_sinks, IS_CAUSAL, BLOCK_N)  # fmt: skip
    low, count = row_bounds(first + offs_m, n_k, window, num_sinks, IS_CAUSAL)
    # The sinks first: their loads overlap with those of the queries.
    for start in range(0, sink_end, BLOCK_S):
        dq = _add_query_gradient(
            dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, k_desc, v_desc, b, h_k, start,
            sink_end, low, count, tl.arange(0, BLOCK_S), offs_d, offs_dv, log2_scale, DIM,
            VALUE_DIM, BLOCK_D, BLOCK_DV, "sink", False, UPCAST)  # fmt: skip
    for start in range(full_begin, full_end, BLOCK_N):
        dq = _add_query_gradient(
            dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, k_desc, v_desc, b, h_k, start,
            n_k, low, count, offs_n, offs_d, offs_dv, log2_scale, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
            "full", IS_TMA, UPCAST)  # fmt: skip
    for t in range(0, masked_count(begin, full_begin, full_end, end, BLOCK_N)):
        start = masked_tile(t, begin, full_begin, full_end, BLOCK_N)
        dq = _add_query_gradient(
            dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, k_desc, v_desc, b, h_k, start,
            n_k, low, count, offs_n, offs_d, offs_dv, log2_scale, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
            "masked", IS_TMA, UPCAST)  # fmt: skip
    store_tile(dq_ptr, stride_dqn, start_m, n_q, offs_m, offs_d, dq * scale, DIM)


@triton.jit
def _add_key_gradients(
    dk, dv, k, v, q_ptr, do_ptr, q_desc, do_desc, b, h, lse_ptr, delta_ptr, stride_qn, stride_don,
    start, n_q, query_offset, j, offs_m, offs_d, offs_dv, scale, window, num_sinks,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    IS_CAUSAL: tl.constexpr, KIND: tl.constexpr, IS_TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dv += p^T dO and dk += ds^T q over one tile of queries.

    KIND: "full" (no mask), "near" (pairs inside of the window), "sink" (sinks outside of it).
    """
    if IS_TMA:
        q = copy_tile(q_desc, b, h, start, offs_m.shape[0], BLOCK_D, UPCAST)
        do = copy_tile(do_desc, b, h, start, offs_m.shape[0], BLOCK_DV, UPCAST)
    else:
        q = load_tile(
            q_ptr, stride_qn, start, n_q, offs_m, offs_d, DIM, BLOCK_D, KIND != "full", UPCAST
        )
        do = load_tile(
            do_ptr, stride_don, start, n_q, offs_m, offs_dv, VALUE_DIM, BLOCK_DV, KIND != "full",
            UPCAST,
        )  # fmt: skip
    if KIND == "full":
        lse = tl.load(lse_ptr + start + offs_m) * LOG2E
        delta = tl.load(delta_ptr + start + offs_m)
    else:
        mask_m = start + offs_m < n_q
        lse = tl.load(lse_ptr + start + offs_m, mask=mask_m, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + start + offs_m, mask=mask_m, other=0.0)
    # Transposed, [keys, queries]: the weights are the left side of both products.
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    w = tl.math.exp2(s * scale - lse[None, :])
    # Rows outside of n_q are loaded as zeros and add nothing; keys outside are never stored.
    if KIND == "near":
        if IS_CAUSAL:  # rows j .. j + window - 1 have key j in their window
            low, count = j - query_offset, window + j * 0
        else:
            low, count = j - query_offset - window + 1, 2 * window - 1 + j * 0
        w = tl.where(within(low, count, start, offs_m), w, 0.0)
    elif KIND == "sink":
        gap = start + query_offset + offs_m[None, :] - j[:, None]  # p - j
        seen = gap >= window
        if not IS_CAUSAL:
            seen = seen | (gap <= -window)
        w = tl.where(seen & (j < num_sinks)[:, None], w, 0.0)
    dv = tl.dot(w.to(do.dtype), do, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    ds = w * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _window_sink_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, part_k_ptr, part_v_ptr,
    cu_q_ptr, cu_k_ptr, lengths_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don, stride_lb, stride_lh,
    scale, heads, n_q, n_k, query_offset, window, num_sinks,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_PACKED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """What ROWS queries of one head add to dk and dv of BLOCK_S sinks outside of their windows.

    The partial sums are (B, H, runs, num_sinks, D or D_v), float32, contiguous, without the scale.
    """
    runs = tl.cdiv(n_q, ROWS)
    sink_tiles = tl.cdiv(num_sinks, BLOCK_S)
    run = tl.program_id(0) % runs
    start_s = tl.program_id(0) // runs % sink_tiles * BLOCK_S
    bh = (tl.program_id(0) // runs // sink_tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    q_start, k_start, n_q, n_k, query_offset = sequence_of(
        b, cu_q_ptr, cu_k_ptr, lengths_ptr, n_q, n_k, query_offset, IS_PACKED, HAS_LENGTHS)  # fmt: skip
    if run * ROWS >= n_q:
        return
    part = (bh * runs + run) * num_sinks  # of the packed runs too: the key kernel counts alike
    if IS_PACKED:
        b = b * 0
    q_ptr += b * stride_qb + h * stride_qh + q_start * stride_qn
    k_ptr += b * stride_kb + h // GROUP * stride_kh + k_start * stride_kn
    v_ptr += b * stride_vb + h // GROUP * stride_vh + k_start * stride_vn
    do_ptr += b * stride_dob + h * stride_doh + q_start * stride_don
    rows = b * stride_lb + h * stride_lh + q_start

    offs_m = tl.arange(0, BLOCK_M)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    k = load_tile(k_ptr, stride_kn, start_s, n_k, offs_s, offs_d, DIM, BLOCK_D, True, UPCAST)
    v = load_tile(
        v_ptr, stride_vn, start_s, n_k, offs_s, offs_dv, VALUE_DIM, BLOCK_DV, True, UPCAST
    )
    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
    begin = run * ROWS
    end = tl.minimum(begin + ROWS, n_q)
    if IS_CAUSAL:  # rows whose window still holds the sinks add nothing
        apart = tl.maximum(start_s + window - query_offset, 0) // BLOCK_M * BLOCK_M
        begin = tl.maximum(begin, apart)
    for start in range(begin, end, BLOCK_M):
        dk, dv = _add_key_gradients(
            dk, dv, k, v, q_ptr, do_ptr, None, None, b, h, lse_ptr + rows, delta_ptr + rows, stride_qn,
            stride_don, start, n_q, query_offset, start_s + offs_s, offs_m, offs_d, offs_dv,
            scale * LOG2E, window, num_sinks, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
            IS_CAUSAL, "sink", False, UPCAST)  # fmt: skip
    store_tile(part_k_ptr + part * DIM, DIM, start_s, num_sinks, offs_s, offs_d, dk, DIM)
    store_tile(
        part_v_ptr + part * VALUE_DIM, VALUE_DIM, start_s, num_sinks, offs_s, offs_dv, dv, VALUE_DIM
    )


@triton.jit
def _sum_parts(
    part_ptr, n_q, runs, num_sinks, start_n, offs_n, offs_d,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Partial sums of the sinks of one tile of keys, over heads and runs, in a fixed order."""
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if start_n < num_sinks:
        for g in range(GROUP):
            for run in range(tl.cdiv(n_q, ROWS)):
                at = tl.cast(g * runs + run, tl.int64) * num_sinks * DIM
                total += load_tile(
                    part_ptr + at,
                    DIM,
                    start_n,
                    num_sinks,
                    offs_n,
                    offs_d,
                    DIM,
                    BLOCK_D,
                    True,
                    False,
                )
    return total


@triton.jit(do_not_specialize=[*_UNSPECIALIZED, "runs"])
def _window_key_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, part_k_ptr, part_v_ptr, dk_ptr, dv_ptr,
    q_desc, do_desc, cu_q_ptr, cu_k_ptr, lengths_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn, stride_lb, stride_lh,
    scale, kv_heads, n_q, n_k, query_offset, window, num_sinks, runs,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_PACKED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    ONE_LOOP: tl.constexpr, IS_TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values of one key head, over its GROUP query heads."""
    tiles = tl.cdiv(n_k, BLOCK_N)
    start_n = tl.program_id(0) % tiles * BLOCK_N
    entry = (tl.program_id(0) // tiles // kv_heads).to(tl.int64)
    h = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    n_stored = n_k
    q_start, k_start, n_q, n_k, query_offset = sequence_of(
        entry, cu_q_ptr, cu_k_ptr, lengths_ptr, n_q, n_k, query_offset, IS_PACKED, HAS_LENGTHS)  # fmt: skip
    b = entry
    if IS_PACKED:
        n_stored = n_k
        b = entry * 0
    if start_n >= n_stored:
        return
    k_ptr += b * stride_kb + h * stride_kh + k_start * stride_kn
    v_ptr += b * stride_vb + h * stride_vh + k_start * stride_vn
    dk_ptr += b * stride_dkb + h * stride_dkh + k_start * stride_dkn
    dv_ptr += b * stride_dvb + h * stride_dvh + k_start * stride_dvn

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    k = load_tile(k_ptr, stride_kn, start_n, n_k, offs_n, offs_d, DIM, BLOCK_D, True, UPCAST)
    v = load_tile(
        v_ptr, stride_vn, start_n, n_k, offs_n, offs_dv, VALUE_DIM, BLOCK_DV, True, UPCAST
    )
    part = (entry * kv_heads + h) * GROUP * runs * num_sinks
    dk = _sum_parts(part_k_ptr + part * DIM, n_q, runs, num_sinks, start_n, offs_n, offs_d,
                    GROUP, DIM, BLOCK_N, BLOCK_D, ROWS)  # fmt: skip
    dv = _sum_parts(part_v_ptr + part * VALUE_DIM, n_q, runs, num_sinks, start_n, offs_n, offs_dv,
                    GROUP, VALUE_DIM, BLOCK_N, BLOCK_DV, ROWS)  # fmt: skip

    # Rows begin .. end have a key of the tile in their window, full_begin .. full_end all keys.
    final = start_n + BLOCK_N - 1
    if IS_CAUSAL:
        begin, full_begin = start_n - query_offset, final - query_offset
    else:
        begin, full_begin = start_n - window + 1 - query_offset, final - window + 1 - query_offset
    begin = tl.maximum(begin, 0) // BLOCK_M * BLOCK_M
    end = tl.minimum(final + window - query_offset, n_q)
    end = tl.where(start_n < n_k, end, 0)
    full_begin = (tl.maximum(full_begin, 0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    full_end = tl.maximum(tl.minimum(start_n + window - query_offset, n_q), 0) // BLOCK_M * BLOCK_M
    full_end = tl.maximum(full_end, full_begin)
    if HAS_LENGTHS:  # a tile in the padding has no full tiles either
        full_end = tl.where(start_n < n_k, full_end, full_begin)
    masked = (tl.maximum(end - begin, 0) + BLOCK_M - 1) // BLOCK_M
    if not ONE_LOOP:
        masked = masked_count(begin, full_begin, full_end, end, BLOCK_M)
    log2_scale = scale * LOG2E
    for g in range(GROUP):
        head = h * GROUP + g
        q_g = q_ptr + b * stride_qb + head * stride_qh + q_start * stride_qn
        do_g = do_ptr + b * stride_dob + head * stride_doh + q_start * stride_don
        rows = b * stride_lb + head * stride_lh + q_start
        if not ONE_LOOP:
            for start in range(full_begin, full_end, BLOCK_M):
                dk, dv = _add_key_gradients(
                    dk, dv, k, v, q_g, do_g, q_desc, do_desc, b, head, lse_ptr + rows,
                    delta_ptr + rows, stride_qn, stride_don, start, n_q, query_offset,
                    start_n + offs_n, offs_m, offs_d, offs_dv, log2_scale, window, num_sinks, DIM,
                    VALUE_DIM, BLOCK_D, BLOCK_DV, IS_CAUSAL, "full", IS_TMA, UPCAST)  # fmt: skip
        for t in range(0, masked):
            start = begin + t * BLOCK_M
            if not ONE_LOOP:
                start = masked_tile(t, begin, full_begin, full_end, BLOCK_M)
            dk, dv = _add_key_gradients(
                dk, dv, k, v, q_g, do_g, q_desc, do_desc, b, head, lse_ptr + rows, delta_ptr + rows,
                stride_qn, stride_don, start, n_q, query_offset, start_n + offs_n, offs_m, offs_d,
                offs_dv, log2_scale, window, num_sinks, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
                IS_CAUSAL, "near", IS_TMA, UPCAST)  # fmt: skip
    if HAS_LENGTHS:  # no tile masks keys: clear what padding was given
        valid = (start_n + offs_n < n_k)[:, None]
        dk = tl.where(valid, dk, 0.0)
        dv = tl.where(valid, dv, 0.0)
    store_tile(dk_ptr, stride_dkn, start_n, n_stored, offs_n, offs_d, dk * scale, DIM)
    store_tile(dv_ptr, stride_dvn, start_n, n_stored, offs_n, offs_dv, dv, VALUE_DIM)


def triton_backward(
    call: Call,
    config: WindowConfig,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    query_kernel: KernelConfig | None = None,
    key_kernel: KernelConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous; the two last arguments override tile sizes."""
    q, k, v, do = (kernel_input(t) for t in (call.query, call.key, call.value, grad_output))
    dq, dk, dv = (t.new_zeros(t.shape) for t in (q, k, v))
    whole = (dq, dk, dv)
    dims = (call.query.shape[-1], call.key.shape[-1], call.value.shape[-1])
    if q.numel() == 0 or v.numel() == 0:
        return _cut(whole, dims)
    batch, heads, n_q, dim = q.shape
    kv_heads, n_k, value_dim = k.shape[1], k.shape[2], v.shape[-1]
    packed = cu_seqlens_q is not None
    entries, rows, keys = batch, n_q, n_k
    if cu_seqlens_q is not None:
        entries, rows, keys = len(cu_seqlens_q) - 1, max_seqlen_q, max_seqlen_k
    if rows == 0 or keys == 0:
        return _cut(whole, dims)
    delta = _delta(do, kernel_input(output), grad_lse)
    lse = lse.contiguous()
    shared = shared_class(q.device)
    common = {
        "GROUP": heads // kv_heads, "DIM": dim, "VALUE_DIM": value_dim,
        "BLOCK_D": block_dim(dim), "BLOCK_DV": block_dim(value_dim), "IS_CAUSAL": call.is_causal,
        "IS_PACKED": packed, "HAS_LENGTHS": call.key_lengths is not None,
        "UPCAST": upcasts(q.dtype, interpreting()),
    }  # fmt: skip
    inputs = (q, k, v, do, lse, delta)
    placing = (cu_seqlens_q, cu_seqlens_k, call.key_lengths)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    window, num_sinks = kernel_settings(config, keys)
    numbers = (rows, keys, call.query_offset, window, num_sinks)

    is_uniform = not packed and call.key_lengths is None  # as in the forward
    is_tma = is_uniform and copies_tiles(k, v)
    sizes = query_kernel or pick(
        [query_config(dim, value_dim, q.dtype, shared, is_tma and copies_pay(q))]
    )
    is_tma = is_tma and sizes.is_tma
    _window_query_bwd_kernel[grid_of(tiles_of(rows, sizes.block_m), entries, heads)](
        *inputs, dq, *descriptors(is_tma, k, v, sizes.block_n), *placing,
        *strides, *dq.stride()[:3], *lse.stride()[:2],
        call.scale, heads, *numbers, BLOCK_M=sizes.block_m, BLOCK_N=sizes.block_n,
        BLOCK_S=SINK_TILE, IS_TMA=is_tma, **sizes.options(), **common,
    )  # fmt: skip

    run_rows = 32 if interpreting() else sink_rows(config.num_sinks)
    runs = tiles_of(rows, run_rows)
    parts = [q.new_empty((entries, heads, runs, num_sinks, width), dtype=torch.float32)
             for width in (dim, value_dim)]  # fmt: skip
    if num_sinks > 0:
        sizes = pick([sink_config(dim, value_dim, q.dtype)])
        grid = grid_of(runs * tiles_of(num_sinks, sizes.block_n), entries, heads)
        _window_sink_bwd_kernel[grid](
            *inputs, *parts, *placing, *strides, *lse.stride()[:2],
            call.scale, heads, *numbers, BLOCK_M=sizes.block_m, BLOCK_S=sizes.block_n,
            ROWS=run_rows, **sizes.options(), **common,
        )  # fmt: skip

    is_tma = is_uniform and copies_tiles(q, do)
    sizes = key_kernel or pick(
        [key_config(dim, value_dim, q.dtype, shared, is_tma and copies_pay(q))]
    )
    is_tma = is_tma and sizes.is_tma
    _window_key_bwd_kernel[grid_of(tiles_of(keys, sizes.block_n), entries, kv_heads)](
        *inputs, *parts, dk, dv, *descriptors(is_tma, q, do, sizes.block_m), *placing, *strides, *dk.stride()[:3], *dv.stride()[:3],
        *lse.stride()[:2], call.scale, kv_heads, *numbers, runs, BLOCK_M=sizes.block_m,
        BLOCK_N=sizes.block_n, ROWS=run_rows, ONE_LOOP=sizes.is_one_loop, IS_TMA=is_tma,
        **sizes.options(), **common,
    )  # fmt: skip
    return _cut(whole, dims)


def _cut(
    grads: tuple[Tensor, Tensor, Tensor], dims: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients without the columns that `kernel_input` added, contiguous."""
    dq, dk, dv = (cut(grad, dim) for grad, dim in zip(grads, dims, strict=True))
    return dq, dk, dv


def _delta(grad_output: Tensor, output: Tensor, grad_lse: Tensor | None) -> Tensor:
    """(B, H, N_q) float32: rowsum(dO * O) - dlse."""
    batch, heads, n_q, value_dim = output.shape
    delta = output.new_empty((batch, heads, n_q), dtype=torch.float32)
    rows = 16 if interpreting() else _DELTA_ROWS
    _window_delta_bwd_kernel[grid_of(tiles_of(n_q, rows), batch, heads)](
        output, grad_output, None if grad_lse is None else grad_lse.contiguous(), delta,
        *output.stride()[:3], *grad_output.stride()[:3], heads, n_q,
        VALUE_DIM=value_dim, BLOCK_M=rows, BLOCK_DV=block_dim(value_dim),
        HAS_DLSE=grad_lse is not None, num_warps=4,
    )  # fmt: skip
    return delta
