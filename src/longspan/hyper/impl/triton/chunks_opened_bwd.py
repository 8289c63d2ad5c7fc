"""Backward of opened clusters: a program per cluster walks the list of queries that opened it.

It adds up dk and dv of the cluster's keys (and takes off what its column counted for these
queries), and leaves each query's share of dq in the slot of the (query, probe) pair. At the end it
adds the near part and the column's gradient, spread over the keys. A second kernel sums the slots.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import KernelConfig, interpreting, pick
from ...._validation import Call
from ...config import HyperConfig
from ...plan import ChunkIndex
from .chunks_configs import JOIN_ROWS, chunks_config
from .chunks_lists import make_lists
from .chunks_means import Means
from .chunks_opened import heads_at_once
from .configs import shared_class
from .tiles import LOG2E, block_dim, gather_rows, grid_of, scatter_rows, upcasts

__all__ = ["opened_backward"]


@triton.jit
def _gather_members(
    ptr, stride_h, stride_n, first_head, entries, is_entry, n_q, offs_d,
    PROBES: tl.constexpr, DIM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows of the query heads first_head .. that the entries name."""
    head = first_head + (entries // PROBES // n_q).to(tl.int64)
    row = (entries // PROBES % n_q).to(tl.int64)
    ptrs = ptr + (head * stride_h + row * stride_n)[:, None] + offs_d[None, :]
    tile = tl.load(ptrs, mask=is_entry[:, None] & (offs_d < DIM)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit(do_not_specialize=["n_q", "clusters", "number", "ordered"])
def _hyper_opened_bwd_kernel(
    q_ptr, k_ptr, v_ptr, mean_k_ptr, mean_v_ptr, bias_ptr, do_ptr, lse_ptr, delta_ptr,
    d_mean_k_ptr, d_mean_v_ptr, dk_ptr, dv_ptr, slot_ptr, order_ptr, starts_ptr, counts_ptr,
    entries_ptr, begins_ptr, ends_ptr,
    stride_qh, stride_qn, stride_kh, stride_kn, stride_vh, stride_vn, stride_doh, stride_don,
    stride_dkh, stride_dkn, stride_dvh, stride_dvn,
    scale, n_q, clusters, number, ordered,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PROBES: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One cluster, BLOCK_M queries of its list at a time, BLOCK_N of its keys at a time."""
    c = tl.program_id(0).to(tl.int64)
    head = c // clusters
    first_head = head * GROUP
    k_ptr += head * stride_kh
    v_ptr += head * stride_vh
    dk_ptr += head * stride_dkh
    dv_ptr += head * stride_dvh
    order_ptr += head * ordered + tl.load(starts_ptr + c)
    entries_ptr += head * number
    slot_ptr += head * number * DIM
    lse_ptr += first_head * n_q
    delta_ptr += first_head * n_q
    count = tl.load(counts_ptr + c)
    begin, end = tl.load(begins_ptr + c), tl.load(ends_ptr + c)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_d = offs_d < DIM
    mask_dv = offs_dv < VALUE_DIM
    d_mean_k = tl.zeros([BLOCK_D], tl.float32)
    d_mean_v = tl.zeros([BLOCK_DV], tl.float32)
    share = 1.0 / tl.maximum(count, 1).to(tl.float32)

    if HAS_COLUMNS:
        # What the column counted for the queries of the list goes off again.
        mean_k = tl.load(mean_k_ptr + c * DIM + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        mean_v = tl.load(mean_v_ptr + c * VALUE_DIM + offs_dv, mask=mask_dv, other=0.0)
        mean_v = mean_v.to(tl.float32)
        bias = tl.load(bias_ptr + c)
        d_mean_k = tl.load(d_mean_k_ptr + c * DIM + offs_d, mask=mask_d, other=0.0)
        d_mean_v = tl.load(d_mean_v_ptr + c * VALUE_DIM + offs_dv, mask=mask_dv, other=0.0)
        for start in range(begin, end, BLOCK_M):
            is_entry = start + offs_m < end
            entries = tl.load(entries_ptr + start + offs_m, mask=is_entry, other=0)
            q = _gather_members(q_ptr, stride_qh, stride_qn, first_head, entries, is_entry, n_q,
                                offs_d, PROBES, DIM, True)  # fmt: skip
            do = _gather_members(do_ptr, stride_doh, stride_don, first_head, entries, is_entry,
                                 n_q, offs_dv, PROBES, VALUE_DIM, True)  # fmt: skip
            q, do = q.to(tl.float32), do.to(tl.float32)
            lse = tl.load(lse_ptr + entries // PROBES, mask=is_entry, other=0.0) * LOG2E
            delta = tl.load(delta_ptr + entries // PROBES, mask=is_entry, other=0.0)
            s = tl.sum(q * mean_k[None, :], 1) * (scale * LOG2E) + bias
            w = tl.where(is_entry, tl.math.exp2(s - lse), 0.0)
            ds = w * (tl.sum(do * mean_v[None, :], 1) - delta) * scale
            d_mean_k -= tl.sum(q * ds[:, None], 0)
            d_mean_v -= tl.sum(do * w[:, None], 0)
            slots = slot_ptr + entries.to(tl.int64)[:, None] * DIM + offs_d[None, :]
            tl.store(slots, (-ds[:, None] * mean_k[None, :]).to(slot_ptr.dtype.element_ty),
                     mask=is_entry[:, None] & mask_d[None, :])  # fmt: skip
        tl.debug_barrier()  # other threads read these slots below

    for i in range(0, count, BLOCK_N):
        exists = i + offs_n < count
        keys = tl.load(order_ptr + i + offs_n, mask=exists, other=0)
        k = gather_rows(k_ptr, stride_kn, keys, exists, offs_d, DIM, BLOCK_D, UPCAST)
        v = gather_rows(v_ptr, stride_vn, keys, exists, offs_dv, VALUE_DIM, BLOCK_DV, UPCAST)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        for start in range(begin, end, BLOCK_M):
            is_entry = start + offs_m < end
            entries = tl.load(entries_ptr + start + offs_m, mask=is_entry, other=0)
            q = _gather_members(q_ptr, stride_qh, stride_qn, first_head, entries, is_entry, n_q,
                                offs_d, PROBES, DIM, UPCAST)  # fmt: skip
            do = _gather_members(do_ptr, stride_doh, stride_don, first_head, entries, is_entry,
                                 n_q, offs_dv, PROBES, VALUE_DIM, UPCAST)  # fmt: skip
            lse = tl.load(lse_ptr + entries // PROBES, mask=is_entry, other=0.0) * LOG2E
            delta = tl.load(delta_ptr + entries // PROBES, mask=is_entry, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
            w = tl.math.exp2(s - lse[:, None])
            w = tl.where(is_entry[:, None] & exists[None, :], w, 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = w * (dp - delta[:, None])
            dv = tl.dot(tl.trans(w.to(do.dtype)), do, dv, input_precision="ieee")
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="ieee")
            dq = tl.dot(ds.to(k.dtype), k, input_precision="ieee") * scale
            slots = slot_ptr + entries.to(tl.int64)[:, None] * DIM + offs_d[None, :]
            mask = is_entry[:, None] & mask_d[None, :]
            if HAS_COLUMNS or i > 0:
                dq += tl.load(slots, mask=mask, other=0.0).to(tl.float32)
            tl.store(slots, dq.to(slot_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()
        near_k = gather_rows(dk_ptr, stride_dkn, keys, exists, offs_d, DIM, BLOCK_D, True)
        near_v = gather_rows(dv_ptr, stride_dvn, keys, exists, offs_dv, VALUE_DIM, BLOCK_DV, True)
        scatter_rows(dk_ptr, stride_dkn, keys, exists, offs_d,
                     near_k + dk * scale + (d_mean_k * share)[None, :], DIM)  # fmt: skip
        scatter_rows(dv_ptr, stride_dvn, keys, exists, offs_dv,
                     near_v + dv + (d_mean_v * share)[None, :], VALUE_DIM)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "n_q"])
def _hyper_join_bwd_kernel(
    dq_ptr, chosen_ptr, slot_ptr, stride_dqh, stride_dqn, rows, n_q,
    DIM: tl.constexpr, PROBES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq, in place: near part and slots of BLOCK_M of all `rows` = heads * n_q rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = dq_ptr + (row // n_q * stride_dqh + row % n_q * stride_dqn)[:, None] + offs_d[None, :]
    mask = exists[:, None] & (offs_d < DIM)[None, :]
    total = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    for i in range(PROBES):
        at = row * PROBES + i
        is_open = exists & (tl.load(chosen_ptr + at, mask=exists, other=-1) >= 0)
        part = tl.load(slot_ptr + at[:, None] * DIM + offs_d[None, :],
                       mask=is_open[:, None] & (offs_d < DIM)[None, :], other=0.0)  # fmt: skip
        total += part.to(tl.float32)
    tl.store(ptrs, total.to(dq_ptr.dtype.element_ty), mask=mask)


def opened_backward(
    call: Call,
    config: HyperConfig,
    index: ChunkIndex,
    means: Means,
    chosen: Tensor,
    grad_output: Tensor,
    lse: Tensor,
    delta: Tensor,
    d_mean: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    sizes: KernelConfig | None = None,
) -> None:
    """Adds opened clusters, and what columns give to their keys, to dq, dk and dv, in place."""
    query, key, value = call[:3]
    dq, dk, dv = grads
    batch, heads, n_q, dim = query.shape
    kv_heads, value_dim, probes = key.shape[1], value.shape[-1], chosen.shape[-1]
    clusters, group = means.bias.shape[2], heads // key.shape[1]
    if clusters == 0:
        return
    shared = shared_class(query.device)
    sizes = sizes or pick([chunks_config("opened_bwd", dim, value_dim, query.dtype, shared)])
    width = block_dim(dim, value_dim)
    at_once = heads_at_once(call, probes, dim)
    number = group * n_q * probes
    slots = query.new_empty((at_once * number, dim))
    for b in range(batch):
        for first in range(0, kv_heads, at_once):
            some = slice(first, min(first + at_once, kv_heads))
            ours = slice(some.start * group, some.stop * group)
            picks = chosen[b, ours].reshape(some.stop - some.start, number)
            lists = make_lists(picks, clusters, sizes.block_m)
            q, k, v, do = query[b, ours], key[b, some], value[b, some], grad_output[b, ours]
            dk_some, dv_some, dq_ours = dk[b, some], dv[b, some], dq[b, ours]
            _hyper_opened_bwd_kernel[grid_of(len(lists.begins))](
                q, k, v, *(t[b, some] for t in means), do, lse[b, ours], delta[b, ours],
                *(t[b, some] for t in d_mean), dk_some, dv_some, slots,
                index.order[b, some].contiguous(), index.starts[b, some].contiguous(),
                index.counts[b, some].contiguous(), *lists[:3],
                *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *do.stride()[:2],
                *dk_some.stride()[:2], *dv_some.stride()[:2],
                call.scale, n_q, clusters, number, index.order.shape[2],
                GROUP=group, DIM=dim, VALUE_DIM=value_dim, PROBES=max(probes, 1),
                HAS_COLUMNS=config.residual == "centroid", BLOCK_M=sizes.block_m,
                BLOCK_N=sizes.block_n, BLOCK_D=width, BLOCK_DV=width,
                UPCAST=upcasts(query.dtype, interpreting()), **sizes.options(),
            )  # fmt: skip
            if probes:
                rows = picks.numel() // probes
                _hyper_join_bwd_kernel[grid_of(triton.cdiv(rows, JOIN_ROWS))](
                    dq_ours, picks, slots, *dq_ours.stride()[:2], rows, n_q,
                    DIM=dim, PROBES=probes, BLOCK_M=JOIN_ROWS, BLOCK_D=width, num_warps=8,
                )  # fmt: skip
