"""Opened clusters, cluster by cluster: tiles of the queries that opened one, against its keys.

Each (query, probe) pair has a slot for its partial result: running maximum, mass and weighted
values of the cluster's keys, minus those of its column, which `chunks_near.py` counted. A second
kernel joins near part and slots, row by row. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import KernelConfig, interpreting, pick
from ...._validation import Call
from ...config import HyperConfig
from ...plan import ChunkIndex
from .chunks_configs import JOIN_ROWS, chunks_config
from .chunks_lists import Lists, make_lists
from .chunks_means import Means
from .configs import shared_class
from .tiles import LN2, LOG2E, block_dim, gather_rows, grid_of, upcasts

__all__ = ["add_opened", "heads_at_once"]

_SLOTS = 3 * 2**28  # short calls run all heads at once: fewer launches


@triton.jit
def list_tile(
    entries_ptr, begins_ptr, ends_ptr, tile_list_ptr, tile_ends_ptr, tile, clusters, number, offs_m,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """List c of a tile, its head, its entries [BLOCK_M] and which of them exist."""
    c = tl.load(tile_list_ptr + tile)
    before = tl.load(tile_ends_ptr + c - 1, mask=c > 0, other=0)
    begin = tl.load(begins_ptr + c) + (tile - before) * BLOCK_M
    is_entry = begin + offs_m < tl.load(ends_ptr + c)
    head = (c // clusters).to(tl.int64)
    entries = tl.load(entries_ptr + head * number + begin + offs_m, mask=is_entry, other=0)
    return c, head, entries, is_entry


@triton.jit(do_not_specialize=["n_q", "clusters", "number", "ordered", "lists"])
def _hyper_opened_fwd_kernel(
    q_ptr, k_ptr, v_ptr, mean_k_ptr, mean_v_ptr, bias_ptr, order_ptr, starts_ptr, counts_ptr,
    entries_ptr, begins_ptr, ends_ptr, tile_list_ptr, tile_ends_ptr, slot_ptr, top_ptr, mass_ptr,
    stride_qh, stride_qn, stride_kh, stride_kn, stride_vh, stride_vn,
    scale, n_q, clusters, number, ordered, lists,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PROBES: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Slots of BLOCK_M entries of one list. Heads count from the first one of this launch."""
    tile = tl.program_id(0)
    if tl.load(tile_list_ptr + tile) < lists:
        offs_m = tl.arange(0, BLOCK_M)
        offs_n = tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, BLOCK_D)
        offs_dv = tl.arange(0, BLOCK_DV)
        c, head, entries, is_entry = list_tile(
            entries_ptr, begins_ptr, ends_ptr, tile_list_ptr, tile_ends_ptr, tile, clusters, number,
            offs_m, BLOCK_M)  # fmt: skip
        rows = entries // PROBES % n_q
        member = (entries // PROBES // n_q).to(tl.int64)
        k_ptr += head * stride_kh
        v_ptr += head * stride_vh
        order_ptr += head * ordered + tl.load(starts_ptr + c)
        count = tl.load(counts_ptr + c)
        c = c.to(tl.int64)
        # [BLOCK_M, BLOCK_D]
        q_ptrs = (
            q_ptr + ((head * GROUP + member) * stride_qh + rows.to(tl.int64) * stride_qn)[:, None]
        )
        q = tl.load(q_ptrs + offs_d[None, :], mask=is_entry[:, None] & (offs_d < DIM)[None, :],
                    other=0.0)  # fmt: skip
        if UPCAST:
            q = q.to(tl.float32)
        scale = scale * LOG2E
        if HAS_COLUMNS:
            mean_k = tl.load(mean_k_ptr + c * DIM + offs_d, mask=offs_d < DIM, other=0.0)
            mean_v = tl.load(
                mean_v_ptr + c * VALUE_DIM + offs_dv, mask=offs_dv < VALUE_DIM, other=0.0
            )
            dot = tl.sum(q.to(tl.float32) * mean_k.to(tl.float32)[None, :], 1)
            m_i = dot * scale + tl.load(bias_ptr + c)
            l_i = tl.full([BLOCK_M], -1.0, tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32) - mean_v.to(tl.float32)[None, :]
        else:
            m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
            l_i = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        for i in range(0, count, BLOCK_N):
            exists = i + offs_n < count
            keys = tl.load(order_ptr + i + offs_n, mask=exists, other=0)
            k = gather_rows(k_ptr, stride_kn, keys, exists, offs_d, DIM, BLOCK_D, UPCAST)
            v = gather_rows(v_ptr, stride_vn, keys, exists, offs_dv, VALUE_DIM, BLOCK_DV, UPCAST)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            s = tl.where(exists[None, :], s, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(s, 1))
            w = tl.math.exp2(s - m_new[:, None])
            shrink = tl.math.exp2(m_i - m_new)
            l_i = l_i * shrink + tl.sum(w, 1)
            acc = tl.dot(w.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            m_i = m_new
        # Divided by the number of keys: values of the size of v fit any dtype.
        share = 1.0 / tl.maximum(count, 1).to(tl.float32)
        slots = head * number + entries
        tl.store(top_ptr + slots, m_i - tl.math.log2(share), mask=is_entry)
        tl.store(mass_ptr + slots, l_i * share, mask=is_entry)
        tl.store(slot_ptr + slots[:, None] * VALUE_DIM + offs_dv[None, :],
                 (acc * share).to(slot_ptr.dtype.element_ty),
                 mask=is_entry[:, None] & (offs_dv < VALUE_DIM)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["rows", "n_q"])
def _hyper_join_fwd_kernel(
    o_ptr, lse_ptr, chosen_ptr, slot_ptr, top_ptr, mass_ptr, stride_oh, stride_on, rows, n_q,
    VALUE_DIM: tl.constexpr, PROBES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """output and lse, in place: near part and slots of BLOCK_M of all `rows` = heads * n_q rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows
    offs_dv = tl.arange(0, BLOCK_DV)
    o_ptrs = o_ptr + (row // n_q * stride_oh + row % n_q * stride_on)[:, None] + offs_dv[None, :]
    mask = exists[:, None] & (offs_dv < VALUE_DIM)[None, :]
    acc = tl.load(o_ptrs, mask=mask, other=0.0).to(tl.float32)
    m_i = tl.load(lse_ptr + row, mask=exists, other=0.0) * LOG2E
    l_i = tl.full([BLOCK_M], 1.0, tl.float32)
    for i in range(PROBES):
        at = row * PROBES + i
        is_open = exists & (tl.load(chosen_ptr + at, mask=exists, other=-1) >= 0)
        top = tl.load(top_ptr + at, mask=is_open, other=float("-inf"))
        mass = tl.load(mass_ptr + at, mask=is_open, other=0.0)
        part = tl.load(slot_ptr + at[:, None] * VALUE_DIM + offs_dv[None, :],
                       mask=is_open[:, None] & (offs_dv < VALUE_DIM)[None, :], other=0.0)  # fmt: skip
        m_new = tl.maximum(m_i, top)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        w = tl.math.exp2(top - m_safe)
        shrink = tl.math.exp2(m_i - m_safe)
        l_i = l_i * shrink + mass * w
        acc = acc * shrink[:, None] + part.to(tl.float32) * w[:, None]
        m_i = m_new
    empty = m_i == float("-inf")
    l_safe = tl.where(empty, 1.0, l_i)
    lse = tl.where(empty, float("-inf"), (m_i + tl.math.log2(l_safe)) * LN2)
    tl.store(lse_ptr + row, lse, mask=exists)
    tl.store(o_ptrs, (acc / l_safe[:, None]).to(o_ptr.dtype.element_ty), mask=mask)


def heads_at_once(call: Call, probes: int, width: int) -> int:
    """Key/value heads whose slots together take at most half of q, k, v and o, or _SLOTS bytes."""
    query, key = call.query, call.key
    group, batch = query.shape[1] // key.shape[1], query.shape[0]
    one = query.shape[2] * group * probes * (width * query.element_size() + 8 + 8 + 4 + 2)
    inputs = 2 * (query.nbytes + key.nbytes) // max(batch, 1)
    return max(1, min(key.shape[1], max(inputs // 2, _SLOTS) // max(one, 1)))


def add_opened(
    call: Call,
    config: HyperConfig,
    index: ChunkIndex,
    means: Means,
    chosen: Tensor,
    output: Tensor,
    lse: Tensor,
    sizes: KernelConfig | None = None,
) -> None:
    """Adds the opened clusters to output and lse of the near part, in place."""
    query, key, value = call[:3]
    batch, heads, n_q, dim = query.shape
    kv_heads, value_dim, probes = key.shape[1], value.shape[-1], chosen.shape[-1]
    clusters, group = means.bias.shape[2], heads // key.shape[1]
    if chosen.numel() == 0:
        return
    shared = shared_class(query.device)
    sizes = sizes or pick([chunks_config("opened", dim, value_dim, query.dtype, shared)])
    width = block_dim(dim, value_dim)
    at_once = heads_at_once(call, probes, value_dim)
    number = group * n_q * probes
    slots = query.new_empty((at_once * number, value_dim))
    top, mass = (query.new_empty(at_once * number, dtype=torch.float32) for _ in range(2))
    for b in range(batch):
        for first in range(0, kv_heads, at_once):
            some = slice(first, min(first + at_once, kv_heads))
            ours = slice(some.start * group, some.stop * group)
            picks = chosen[b, ours].reshape(-1, number)
            lists: Lists = make_lists(picks, clusters, sizes.block_m)
            q, k, v, o = query[b, ours], key[b, some], value[b, some], output[b, ours]
            _hyper_opened_fwd_kernel[grid_of(len(lists.tile_list))](
                q, k, v, *(t[b, some] for t in means), index.order[b, some].contiguous(),
                index.starts[b, some].contiguous(), index.counts[b, some].contiguous(), *lists,
                slots, top, mass, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
                call.scale, n_q, clusters, number, index.order.shape[2], len(lists.begins),
                GROUP=group, DIM=dim, VALUE_DIM=value_dim, PROBES=probes,
                HAS_COLUMNS=config.residual == "centroid", BLOCK_M=sizes.block_m,
                BLOCK_N=sizes.block_n, BLOCK_D=width, BLOCK_DV=width,
                UPCAST=upcasts(query.dtype, interpreting()), **sizes.options(),
            )  # fmt: skip
            rows = picks.numel() // probes
            _hyper_join_fwd_kernel[grid_of(triton.cdiv(rows, JOIN_ROWS))](
                o, lse[b, ours], picks, slots, top, mass, *o.stride()[:2], rows, n_q,
                VALUE_DIM=value_dim, PROBES=probes, BLOCK_M=JOIN_ROWS, BLOCK_DV=width, num_warps=8,
            )  # fmt: skip
