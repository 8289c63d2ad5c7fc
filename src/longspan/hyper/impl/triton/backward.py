"""Backward kernels of HyperAttention's recursion: no atomics, so the bits repeat.

With p = exp(s + bias - lse), lse that of the whole row, and dp = dO v^T: ds = p (dp - delta),
delta = rowsum(dO * O) - dlse. In this order:

1. delta.
2. dq of the nodes (a program per tile of sorted queries), one partial gradient a row and level;
   dq of the leaves, which starts from the partial ones.
3. dk and dv of the nodes' blocks (a program per tile of sorted keys): block i of keys meets block i
   of queries, so both are runs of the sorted orders. Partial gradients as for dq.
4. The samples: every query of a node meets them. A program sums over a run of query tiles, a second
   kernel adds up runs, heads and repeated samples in a fixed order onto the partial gradients.
5. dk and dv of the leaves, which start from the partial ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import KernelConfig, interpreting, pick
from ...._validation import Call
from ...config import HyperConfig
from ...plan import SortedIndex
from .configs import DELTA_ROWS, SAMPLE_RUN, SUM_ROWS, config_of, shared_class
from .plan import is_full, key_tiles, leaf_tiles, make_plan, query_runs, query_tiles
from .tiles import (
    LOG2E,
    block_dim,
    gather_rows,
    grid_of,
    kernel_input,
    load_rows,
    sample_columns,
    scatter_rows,
    upcasts,
)

__all__ = ["triton_backward"]


@triton.jit(do_not_specialize=["n_q"])
def _hyper_delta_bwd_kernel(
    o_ptr, do_ptr, dlse_ptr, delta_ptr,
    stride_ob, stride_oh, stride_on, stride_dob, stride_doh, stride_don,
    heads, n_q,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) - dlse; delta and dlse are contiguous (B, H, N_q)."""
    tiles = tl.cdiv(n_q, BLOCK_M)
    start = tl.program_id(0) % tiles * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_DV)
    o_ptr += b * stride_ob + h * stride_oh
    do_ptr += b * stride_dob + h * stride_doh
    o = load_rows(o_ptr, stride_on, start, n_q, offs_m, offs_d, VALUE_DIM, BLOCK_DV, True, True)
    do = load_rows(do_ptr, stride_don, start, n_q, offs_m, offs_d, VALUE_DIM, BLOCK_DV, True, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    rows = bh * n_q + start + offs_m
    mask = start + offs_m < n_q
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + rows, mask=mask, other=0.0)
    tl.store(delta_ptr + rows, delta, mask=mask)


@triton.jit
def _node_query_step(
    dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, keys, exists, bias, offs_d, offs_dv,
    scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq += ds k over the rows `keys`; where BIASED, `bias` may be -inf."""
    k = gather_rows(k_ptr, stride_kn, keys, exists, offs_d, DIM, BLOCK_D, UPCAST, MASKED)
    v = gather_rows(v_ptr, stride_vn, keys, exists, offs_dv, VALUE_DIM, BLOCK_DV, UPCAST, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None]
    if BIASED:
        s += bias[None, :]
    w = tl.math.exp2(s)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = w * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["tiles", "q_rows", "k_rows", "sampled"])
def _hyper_node_query_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_order_ptr, k_order_ptr, samples_ptr, bias_ptr, owner_ptr, tiles_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
    stride_dqb, stride_dqh, stride_dqn,
    scale, heads, n_q, tiles, q_rows, k_rows, sampled,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    FULL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M sorted queries over their block of keys and their node's samples.

    FULL: every block of keys is a multiple of BLOCK_N long.
    """
    entry = tl.program_id(0) % tiles
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    kv = b * (heads // GROUP) + h // GROUP
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    do_ptr += b * stride_dob + h * stride_doh
    dq_ptr += b * stride_dqb + h * stride_dqh
    q_order_ptr += bh * q_rows
    k_order_ptr += kv * k_rows
    samples_ptr += kv * sampled
    bias_ptr += kv * sampled
    owner_ptr += kv * sampled

    tiles_ptr += entry * 7
    node = tl.load(tiles_ptr)
    q_begin, q_end = tl.load(tiles_ptr + 1), tl.load(tiles_ptr + 2)
    k_begin, k_end = tl.load(tiles_ptr + 3), tl.load(tiles_ptr + 4)
    shift, block = tl.load(tiles_ptr + 5), tl.load(tiles_ptr + 6)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    is_query = q_begin + offs_m < q_end
    rows = tl.load(q_order_ptr + q_begin + offs_m, mask=is_query, other=0)
    # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV], [BLOCK_M], [BLOCK_M]
    q = gather_rows(q_ptr, stride_qn, rows, is_query, offs_d, DIM, BLOCK_D, UPCAST)
    do = gather_rows(do_ptr, stride_don, rows, is_query, offs_dv, VALUE_DIM, BLOCK_DV, UPCAST)
    lse = tl.load(lse_ptr + bh * n_q + rows, mask=is_query, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + bh * n_q + rows, mask=is_query, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for start in range(k_begin, k_end, BLOCK_N):
        exists = start + offs_n < k_end
        keys = tl.load(k_order_ptr + start + offs_n, mask=exists, other=0)
        bias = tl.where(exists, 0.0, float("-inf"))
        dq = _node_query_step(
            dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, keys, exists, bias, offs_d,
            offs_dv, scale * LOG2E, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, not FULL, not FULL,
            UPCAST)  # fmt: skip
    for start in range(0, SAMPLES, BLOCK_N):
        keys, exists, bias = sample_columns(samples_ptr, bias_ptr, owner_ptr, node * SAMPLES, start,
                                         block, offs_n, SAMPLES)  # fmt: skip
        dq = _node_query_step(
            dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, keys, exists, bias, offs_d,
            offs_dv, scale * LOG2E, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, True,
            SAMPLES % BLOCK_N != 0, UPCAST)  # fmt: skip
    scatter_rows(dq_ptr, stride_dqn, rows + shift, is_query, offs_d, dq * scale, DIM)


@triton.jit
def _sum_parts(
    part_ptr, stride, tiles_ptr, parts, start, end, offs_n, offs_d,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of the partial gradients of rows start .. end, [BLOCK_N, BLOCK_D] float32."""
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(0, parts):
        first = tl.load(tiles_ptr + 5 + i) + start
        part = load_rows(part_ptr, stride, first, first + end - start, offs_n, offs_d, DIM, BLOCK_D,
                         True, False)  # fmt: skip
        total += part.to(tl.float32)
    return total


@triton.jit
def _leaf_query_step(
    dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, start, k_end, p, offs_n, offs_d,
    offs_dv, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq += ds k over keys start .. of a leaf; causal where MASKED."""
    k = load_rows(k_ptr, stride_kn, start, k_end, offs_n, offs_d, DIM, BLOCK_D, MASKED, UPCAST)
    v = load_rows(
        v_ptr, stride_vn, start, k_end, offs_n, offs_dv, VALUE_DIM, BLOCK_DV, MASKED, UPCAST
    )
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    w = tl.math.exp2(s * scale - lse[:, None])
    if MASKED:
        j = start + offs_n
        w = tl.where((j[None, :] <= p[:, None]) & (j < k_end)[None, :], w, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = w * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["tiles", "width", "query_offset"])
def _hyper_leaf_query_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, part_ptr, dq_ptr, tiles_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
    stride_dqb, stride_dqh, stride_dqn, stride_pb, stride_ph, stride_pn,
    scale, heads, n_q, tiles, width, query_offset,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries: partial gradients of all levels and their leaf."""
    entry = tl.program_id(0) % tiles
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    do_ptr += b * stride_dob + h * stride_doh
    dq_ptr += b * stride_dqb + h * stride_dqh
    part_ptr += b * stride_pb + h * stride_ph

    tiles_ptr += entry * width
    start_m, end_m = tl.load(tiles_ptr), tl.load(tiles_ptr + 1)
    k_begin, k_end = tl.load(tiles_ptr + 2), tl.load(tiles_ptr + 3)
    parts = tl.load(tiles_ptr + 4)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_m = start_m + offs_m < end_m
    # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV], [BLOCK_M], [BLOCK_M]
    q = load_rows(q_ptr, stride_qn, start_m, end_m, offs_m, offs_d, DIM, BLOCK_D, True, UPCAST)
    do = load_rows(
        do_ptr, stride_don, start_m, end_m, offs_m, offs_dv, VALUE_DIM, BLOCK_DV, True, UPCAST
    )
    lse = tl.load(lse_ptr + bh * n_q + start_m + offs_m, mask=mask_m, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + bh * n_q + start_m + offs_m, mask=mask_m, other=0.0)
    # Partial gradients carry the scale already.
    before = _sum_parts(part_ptr, stride_pn, tiles_ptr, parts, start_m, end_m, offs_m, offs_d,
                        DIM, BLOCK_M, BLOCK_D)  # fmt: skip
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    first = start_m + query_offset  # key index of the first row
    p = first + offs_m
    end = tl.minimum(end_m + query_offset, k_end)
    full_end = k_begin + tl.maximum(tl.minimum(first + 1, k_end) - k_begin, 0) // BLOCK_N * BLOCK_N
    for start in range(k_begin, full_end, BLOCK_N):
        dq = _leaf_query_step(
            dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, start, k_end, p, offs_n,
            offs_d, offs_dv, scale * LOG2E, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, False,
            UPCAST)  # fmt: skip
    for start in range(full_end, end, BLOCK_N):
        dq = _leaf_query_step(
            dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, start, k_end, p, offs_n,
            offs_d, offs_dv, scale * LOG2E, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, True,
            UPCAST)  # fmt: skip
    scatter_rows(dq_ptr, stride_dqn, start_m + offs_m, mask_m, offs_d, before + dq * scale, DIM)


@triton.jit
def _key_step(
    dk, dv, k, v, q, do, lse, delta, bias, seen, scale, MASKED: tl.constexpr,
):  # fmt: skip
    """dv += p^T dO and dk += ds^T q; scores transposed, [keys, queries]: the weights are the left
    side of both products."""
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    w = tl.math.exp2(s * scale + (bias[:, None] - lse[None, :]))
    if MASKED:
        w = tl.where(seen, w, 0.0)
    dv = tl.dot(w.to(do.dtype), do, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    ds = w * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["tiles", "q_rows", "k_rows"])
def _hyper_node_key_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, q_order_ptr, k_order_ptr,
    tiles_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    scale, kv_heads, n_q, tiles, q_rows, k_rows,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N sorted keys over their block of queries, of all heads of the group."""
    entry = tl.program_id(0) % tiles
    kv = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = kv // kv_heads, kv % kv_heads
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    dk_ptr += b * stride_dkb + h * stride_dkh
    dv_ptr += b * stride_dvb + h * stride_dvh

    tiles_ptr += entry * 7
    k_begin, k_end = tl.load(tiles_ptr + 1), tl.load(tiles_ptr + 2)
    q_begin, q_end = tl.load(tiles_ptr + 3), tl.load(tiles_ptr + 4)
    shift = tl.load(tiles_ptr + 5)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    is_key = k_begin + offs_n < k_end
    keys = tl.load(k_order_ptr + kv * k_rows + k_begin + offs_n, mask=is_key, other=0)
    k = gather_rows(k_ptr, stride_kn, keys, is_key, offs_d, DIM, BLOCK_D, UPCAST)
    v = gather_rows(v_ptr, stride_vn, keys, is_key, offs_dv, VALUE_DIM, BLOCK_DV, UPCAST)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    no_bias = tl.zeros([BLOCK_N], tl.float32)
    for g in range(GROUP):
        head = h * GROUP + g
        bh = kv * GROUP + g
        q_g = q_ptr + b * stride_qb + head * stride_qh
        do_g = do_ptr + b * stride_dob + head * stride_doh
        for start in range(q_begin, q_end, BLOCK_M):
            is_query = start + offs_m < q_end
            rows = tl.load(q_order_ptr + bh * q_rows + start + offs_m, mask=is_query, other=0)
            q = gather_rows(q_g, stride_qn, rows, is_query, offs_d, DIM, BLOCK_D, UPCAST)
            do = gather_rows(do_g, stride_don, rows, is_query, offs_dv, VALUE_DIM, BLOCK_DV, UPCAST)
            # Rows beyond the block are zeros and add nothing.
            lse = tl.load(lse_ptr + bh * n_q + rows, mask=is_query, other=0.0) * LOG2E
            delta = tl.load(delta_ptr + bh * n_q + rows, mask=is_query, other=0.0)
            dk, dv = _key_step(dk, dv, k, v, q, do, lse, delta, no_bias, is_key, scale * LOG2E,
                               False)  # fmt: skip
    scatter_rows(dk_ptr, stride_dkn, keys + shift, is_key, offs_d, dk * scale, DIM)
    scatter_rows(dv_ptr, stride_dvn, keys + shift, is_key, offs_dv, dv, VALUE_DIM)


@triton.jit(do_not_specialize=["runs", "sample_tiles", "q_rows", "sampled"])
def _hyper_sample_key_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, part_k_ptr, part_v_ptr,
    q_order_ptr, samples_ptr, bias_ptr, owner_ptr, runs_ptr, tiles_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
    scale, heads, n_q, runs, sample_tiles, q_rows, sampled,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """What one run of query tiles of one head adds to dk and dv of BLOCK_N samples of its node.

    The partial sums are (B, H, runs, SAMPLES, D or D_v), float32, contiguous.
    """
    sample_tile = tl.program_id(0) % sample_tiles
    run = tl.program_id(0) // sample_tiles % runs
    bh = (tl.program_id(0) // sample_tiles // runs).to(tl.int64)
    b, h = bh // heads, bh % heads
    kv = b * (heads // GROUP) + h // GROUP
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    do_ptr += b * stride_dob + h * stride_doh
    q_order_ptr += bh * q_rows
    lse_ptr += bh * n_q
    delta_ptr += bh * n_q

    runs_ptr += run * 3
    node = tl.load(runs_ptr)
    first, past = tl.load(runs_ptr + 1), tl.load(runs_ptr + 2)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    i = sample_tile * BLOCK_N + offs_n
    is_key = i < SAMPLES
    at = kv * sampled + node * SAMPLES + i
    keys = tl.load(samples_ptr + at, mask=is_key, other=0)
    bias = tl.load(bias_ptr + at, mask=is_key, other=0.0) * LOG2E
    owner = tl.load(owner_ptr + at, mask=is_key, other=-1)
    k = gather_rows(k_ptr, stride_kn, keys, is_key, offs_d, DIM, BLOCK_D, UPCAST)
    v = gather_rows(v_ptr, stride_vn, keys, is_key, offs_dv, VALUE_DIM, BLOCK_DV, UPCAST)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for t in range(first, past):
        begin, end = tl.load(tiles_ptr + t * 7 + 1), tl.load(tiles_ptr + t * 7 + 2)
        block = tl.load(tiles_ptr + t * 7 + 6)
        is_query = begin + offs_m < end
        rows = tl.load(q_order_ptr + begin + offs_m, mask=is_query, other=0)
        q = gather_rows(q_ptr, stride_qn, rows, is_query, offs_d, DIM, BLOCK_D, UPCAST)
        do = gather_rows(do_ptr, stride_don, rows, is_query, offs_dv, VALUE_DIM, BLOCK_DV, UPCAST)
        lse = tl.load(lse_ptr + rows, mask=is_query, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + rows, mask=is_query, other=0.0)
        shown = tl.where(owner == block, float("-inf"), bias)
        dk, dv = _key_step(dk, dv, k, v, q, do, lse, delta, shown, is_key, scale * LOG2E,
                           False)  # fmt: skip
    part = (bh * runs + run) * SAMPLES
    scatter_rows(part_k_ptr + part * DIM, DIM, i, is_key, offs_d, dk * scale, DIM)
    scatter_rows(part_v_ptr + part * VALUE_DIM, VALUE_DIM, i, is_key, offs_dv, dv, VALUE_DIM)


@triton.jit(do_not_specialize=["nodes", "runs", "sampled"])
def _hyper_sample_sum_bwd_kernel(
    part_ptr, grad_ptr, samples_ptr, node_runs_ptr, stride_gb, stride_gh, stride_gn,
    kv_heads, nodes, runs, sampled,
    GROUP: tl.constexpr, DIM: tl.constexpr, SAMPLES: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of BLOCK_N samples of one node onto the gradients of their keys.

    The first of several samples of the same key adds up all of them; the others do nothing.
    """
    sample_tiles = (SAMPLES + BLOCK_N - 1) // BLOCK_N
    sample_tile = tl.program_id(0) % sample_tiles
    node = tl.program_id(0) // sample_tiles % nodes
    kv = (tl.program_id(0) // sample_tiles // nodes).to(tl.int64)
    b, h = kv // kv_heads, kv % kv_heads
    grad_ptr += b * stride_gb + h * stride_gh
    first, past = tl.load(node_runs_ptr + node * 3), tl.load(node_runs_ptr + node * 3 + 1)
    shift = tl.load(node_runs_ptr + node * 3 + 2)

    offs_d = tl.arange(0, BLOCK_D)
    i = sample_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_S)
    samples_ptr += kv * sampled + node * SAMPLES
    keys = tl.load(samples_ptr + i, mask=i < SAMPLES, other=-1)
    others = tl.load(samples_ptr + j, mask=j < SAMPLES, other=-2)
    same = keys[:, None] == others[None, :]  # [BLOCK_N, BLOCK_S]
    earlier = tl.max(tl.where(same & (j[None, :] < i[:, None]), 1, 0), 1)
    is_first = (i < SAMPLES) & (earlier == 0)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    at = tl.where(is_first, i, SAMPLES)
    while tl.min(at, 0) < SAMPLES:
        mask = (at < SAMPLES)[:, None] & (offs_d < DIM)[None, :]
        for g in range(GROUP):
            for run in range(first, past):
                row = ((kv * GROUP + g) * runs + run) * SAMPLES + at
                total += tl.load(part_ptr + row[:, None] * DIM + offs_d[None, :], mask=mask,
                                 other=0.0)  # fmt: skip
        after = same & (j[None, :] > at[:, None])
        at = tl.min(tl.where(after, j[None, :], SAMPLES), 1)
    before = gather_rows(grad_ptr, stride_gn, keys + shift, is_first, offs_d, DIM, BLOCK_D, False)
    scatter_rows(grad_ptr, stride_gn, keys + shift, is_first, offs_d,
                 before.to(tl.float32) + total, DIM)  # fmt: skip


@triton.jit(do_not_specialize=["tiles", "width", "query_offset"])
def _hyper_leaf_key_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, part_k_ptr, part_v_ptr, dk_ptr, dv_ptr,
    tiles_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    stride_pkb, stride_pkh, stride_pkn, stride_pvb, stride_pvh, stride_pvn,
    scale, kv_heads, n_q, tiles, width, query_offset,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys: partial gradients of all levels and their leaf."""
    entry = tl.program_id(0) % tiles
    kv = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = kv // kv_heads, kv % kv_heads
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    dk_ptr += b * stride_dkb + h * stride_dkh
    dv_ptr += b * stride_dvb + h * stride_dvh
    part_k_ptr += b * stride_pkb + h * stride_pkh
    part_v_ptr += b * stride_pvb + h * stride_pvh

    tiles_ptr += entry * width
    start_n, end_n = tl.load(tiles_ptr), tl.load(tiles_ptr + 1)
    q_begin, q_end = tl.load(tiles_ptr + 2), tl.load(tiles_ptr + 3)
    parts = tl.load(tiles_ptr + 4)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    j = start_n + offs_n
    is_key = j < end_n
    k = load_rows(k_ptr, stride_kn, start_n, end_n, offs_n, offs_d, DIM, BLOCK_D, True, UPCAST)
    v = load_rows(
        v_ptr, stride_vn, start_n, end_n, offs_n, offs_dv, VALUE_DIM, BLOCK_DV, True, UPCAST
    )
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    no_bias = tl.zeros([BLOCK_N], tl.float32)
    # Queries from the first key on see some of the keys, those from the last key on see all.
    begin = tl.minimum(tl.maximum(q_begin, start_n - query_offset), q_end)
    full = tl.minimum(tl.maximum(begin, end_n - 1 - query_offset), q_end)
    full = tl.minimum(begin + (full - begin + BLOCK_M - 1) // BLOCK_M * BLOCK_M, q_end)
    full_end = full + (q_end - full) // BLOCK_M * BLOCK_M
    for g in range(GROUP):
        head = h * GROUP + g
        q_g = q_ptr + b * stride_qb + head * stride_qh
        do_g = do_ptr + b * stride_dob + head * stride_doh
        lse_g = lse_ptr + (kv * GROUP + g) * n_q
        delta_g = delta_ptr + (kv * GROUP + g) * n_q
        for start in range(full, full_end, BLOCK_M):
            q = load_rows(q_g, stride_qn, start, q_end, offs_m, offs_d, DIM, BLOCK_D, False, UPCAST)
            do = load_rows(
                do_g, stride_don, start, q_end, offs_m, offs_dv, VALUE_DIM, BLOCK_DV, False, UPCAST
            )
            lse = tl.load(lse_g + start + offs_m) * LOG2E
            delta = tl.load(delta_g + start + offs_m)
            dk, dv = _key_step(dk, dv, k, v, q, do, lse, delta, no_bias, True, scale * LOG2E,
                               False)  # fmt: skip
        before = (full - begin + BLOCK_M - 1) // BLOCK_M
        for t in range(0, before + (q_end - full_end + BLOCK_M - 1) // BLOCK_M):
            start = tl.where(t < before, begin + t * BLOCK_M, full_end)
            end = tl.where(t < before, full, q_end)
            rows = start + offs_m
            q = load_rows(q_g, stride_qn, start, end, offs_m, offs_d, DIM, BLOCK_D, True, UPCAST)
            do = load_rows(
                do_g, stride_don, start, end, offs_m, offs_dv, VALUE_DIM, BLOCK_DV, True, UPCAST
            )
            # Rows beyond the end are zeros and add nothing.
            lse = tl.load(lse_g + rows, mask=rows < end, other=0.0) * LOG2E
            delta = tl.load(delta_g + rows, mask=rows < end, other=0.0)
            seen = j[:, None] <= (rows + query_offset)[None, :]
            dk, dv = _key_step(dk, dv, k, v, q, do, lse, delta, no_bias, seen, scale * LOG2E,
                               True)  # fmt: skip
    # Partial gradients carry the scale already.
    dk = dk * scale + _sum_parts(part_k_ptr, stride_pkn, tiles_ptr, parts, start_n, end_n, offs_n,
                                 offs_d, DIM, BLOCK_N, BLOCK_D)  # fmt: skip
    dv += _sum_parts(part_v_ptr, stride_pvn, tiles_ptr, parts, start_n, end_n, offs_n, offs_dv,
                     VALUE_DIM, BLOCK_N, BLOCK_DV)  # fmt: skip
    scatter_rows(dk_ptr, stride_dkn, j, is_key, offs_d, dk, DIM)
    scatter_rows(dv_ptr, stride_dvn, j, is_key, offs_dv, dv, VALUE_DIM)


def triton_backward(
    call: Call,
    config: HyperConfig,
    index: SortedIndex,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
    kernels: dict[str, KernelConfig] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous; `kernels` overrides tile sizes by kind."""
    q, k, v, do, out = (kernel_input(t) for t in (*call[:3], grad_output, output))
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if q.numel() == 0 or v.numel() == 0:
        grads = tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in call[:3])
        return grads  # type: ignore[return-value]
    run = _Run(call, config, index, (q, k, v, do), kernels or {})
    run.delta(out, lse, grad_lse)
    run.queries(dq)
    run.keys(dk, dv)
    return tuple(
        grad if grad.shape[-1] == like.shape[-1] else grad[..., : like.shape[-1]].contiguous()
        for grad, like in zip((dq, dk, dv), call[:3], strict=True)
    )  # type: ignore[return-value]


class _Run:
    """One backward pass: what its launches share."""

    def __init__(
        self,
        call: Call,
        config: HyperConfig,
        index: SortedIndex,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor],
        kernels: dict[str, KernelConfig],
    ) -> None:
        self.call, self.index, self.inputs, self.kernels = call, index, inputs, kernels
        self.plan = make_plan(call, config)
        q, k, v, do = inputs
        self.batch, self.heads, self.n_q, self.dim = q.shape
        self.kv_heads, self.value_dim, self.device = k.shape[1], v.shape[-1], q.device
        self.strides = [stride for t in (q, k, v, do) for stride in t.stride()[:3]]
        self.common = {
            "GROUP": self.heads // self.kv_heads, "DIM": self.dim, "VALUE_DIM": self.value_dim,
            "BLOCK_D": block_dim(self.dim, self.value_dim),
            "BLOCK_DV": block_dim(self.dim, self.value_dim),
            "UPCAST": upcasts(q.dtype, interpreting()),
        }  # fmt: skip
        self.shared = shared_class(q.device)

    def sizes(self, kind: str) -> tuple[KernelConfig, dict[str, int]]:
        """Configuration of a kernel, and the same as launch arguments."""
        chosen = self.kernels.get(kind) or pick(
            [config_of(kind, self.dim, self.value_dim, self.inputs[0].dtype, self.shared)]
        )
        return chosen, {"BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n,
                        "num_warps": chosen.num_warps, "num_stages": chosen.num_stages}  # fmt: skip

    def delta(self, output: Tensor, lse: Tensor, grad_lse: Tensor | None) -> None:
        """Row statistics, (B, H, N_q) float32."""
        do = self.inputs[3]
        delta = lse.new_empty(lse.shape, dtype=torch.float32)
        rows = 16 if interpreting() else DELTA_ROWS
        _hyper_delta_bwd_kernel[grid_of(triton.cdiv(self.n_q, rows), self.batch, self.heads)](
            output, do, None if grad_lse is None else grad_lse.contiguous(), delta,
            *output.stride()[:3], *do.stride()[:3], self.heads, self.n_q,
            VALUE_DIM=self.value_dim, BLOCK_M=rows, BLOCK_DV=block_dim(self.value_dim),
            HAS_DLSE=grad_lse is not None, num_warps=4,
        )  # fmt: skip
        self.rows = (lse.contiguous(), delta)

    def queries(self, dq: Tensor) -> None:
        """Fill dq."""
        plan, index, part = self.plan, self.index, dq
        q_rows, k_rows = plan.query_bases[-1], plan.key_bases[-1]
        if plan.leaves:
            part = dq.new_empty((self.batch, self.heads, q_rows, self.dim))
        if plan.nodes:
            sizes, tiling = self.sizes("node_query")
            tiles = query_tiles(plan, sizes.block_m, self.device)
            samples = index.samples.shape[-1]
            _hyper_node_query_bwd_kernel[grid_of(len(tiles), self.batch, self.heads)](
                *self.inputs, *self.rows, part, *index, tiles, *self.strides, *part.stride()[:3],
                self.call.scale, self.heads, self.n_q, len(tiles), q_rows, k_rows,
                len(plan.nodes) * samples, SAMPLES=samples, FULL=is_full(plan, sizes.block_n), **tiling,
                **self.common,
            )  # fmt: skip
        if plan.leaves:
            sizes, tiling = self.sizes("leaf_query")
            tiles = leaf_tiles(plan, sizes.block_m, False, self.device)
            _hyper_leaf_query_bwd_kernel[grid_of(len(tiles), self.batch, self.heads)](
                *self.inputs, *self.rows, part, dq, tiles, *self.strides, *dq.stride()[:3],
                *part.stride()[:3], self.call.scale, self.heads, self.n_q, len(tiles),
                tiles.shape[1], plan.query_offset, **tiling, **self.common,
            )  # fmt: skip

    def keys(self, dk: Tensor, dv: Tensor) -> None:
        """Fill dk and dv."""
        plan, index, part_k, part_v = self.plan, self.index, dk, dv
        q_rows, k_rows = plan.query_bases[-1], plan.key_bases[-1]
        if plan.leaves:
            part_k = dk.new_empty((self.batch, self.kv_heads, k_rows, self.dim))
            part_v = dv.new_empty((self.batch, self.kv_heads, k_rows, self.value_dim))
        if plan.nodes:
            sizes, tiling = self.sizes("node_key")
            tiles = key_tiles(plan, sizes.block_n, self.device)
            _hyper_node_key_bwd_kernel[grid_of(len(tiles), self.batch, self.kv_heads)](
                *self.inputs, *self.rows, part_k, part_v, index.query_order, index.key_order, tiles,
                *self.strides, *part_k.stride()[:3], *part_v.stride()[:3], self.call.scale,
                self.kv_heads, self.n_q, len(tiles), q_rows, k_rows, **tiling, **self.common,
            )  # fmt: skip
            self.samples(part_k, part_v)
        if plan.leaves:
            sizes, tiling = self.sizes("leaf_key")
            tiles = leaf_tiles(plan, sizes.block_n, True, self.device)
            _hyper_leaf_key_bwd_kernel[grid_of(len(tiles), self.batch, self.kv_heads)](
                *self.inputs, *self.rows, part_k, part_v, dk, dv, tiles, *self.strides,
                *dk.stride()[:3], *dv.stride()[:3], *part_k.stride()[:3], *part_v.stride()[:3],
                self.call.scale, self.kv_heads, self.n_q, len(tiles), tiles.shape[1],
                plan.query_offset, **tiling, **self.common,
            )  # fmt: skip

    def samples(self, grad_k: Tensor, grad_v: Tensor) -> None:
        """Add the samples' share to the gradients of the nodes' keys."""
        plan, index = self.plan, self.index
        count = index.samples.shape[-1]
        if count == 0:
            return
        sizes, tiling = self.sizes("sample_key")
        tiles = query_tiles(plan, sizes.block_m, self.device)
        in_run = 2 if interpreting() else SAMPLE_RUN // sizes.block_m
        runs, node_runs = query_runs(plan, sizes.block_m, in_run, self.device)
        shape = (self.batch, self.heads, len(runs), count)
        parts = [torch.empty((*shape, width), dtype=torch.float32, device=self.device)
                 for width in (self.dim, self.value_dim)]  # fmt: skip
        sample_tiles = triton.cdiv(count, sizes.block_n)
        sampled = len(plan.nodes) * count
        _hyper_sample_key_bwd_kernel[grid_of(sample_tiles, len(runs), self.batch, self.heads)](
            *self.inputs, *self.rows, *parts, index.query_order, *index[2:], runs, tiles,
            *self.strides, self.call.scale, self.heads, self.n_q, len(runs), sample_tiles,
            plan.query_bases[-1], sampled, SAMPLES=count, **tiling, **self.common,
        )  # fmt: skip
        rows = SUM_ROWS
        grid = grid_of(triton.cdiv(count, rows), len(plan.nodes), self.batch, self.kv_heads)
        for part, grad in zip(parts, (grad_k, grad_v), strict=True):
            _hyper_sample_sum_bwd_kernel[grid](
                part, grad, index.samples, node_runs, *grad.stride()[:3], self.kv_heads,
                len(plan.nodes), len(runs), sampled, GROUP=self.heads // self.kv_heads,
                DIM=part.shape[-1], SAMPLES=count, BLOCK_S=int(triton.next_power_of_2(count)),
                BLOCK_N=rows, BLOCK_D=block_dim(part.shape[-1]), num_warps=4,
            )  # fmt: skip
