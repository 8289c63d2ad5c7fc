"""A few new tokens of a stream: local attention over the unfinished segment, read, mix.

Programs share the keys of a key head in runs of SPLIT, for all query heads of its group at once,
and leave partial softmaxes; a second kernel joins them, reads the memory once and mixes. Forward
only. dtypes float16 and bfloat16 (float32 where interpreted); head dims up to 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import interpreting
from .mix import Layout, place_of
from .tiles import block_dim, full_grid, kernel_input, load_rows, upcasts

__all__ = ["decode"]

_SPLIT, _BLOCK_N = 256, 64
_LOG2E = 1.4426950408889634


@triton.jit(do_not_specialize=["n_q", "n_k", "query_offset", "first_key", "splits"])
def _infini_decode_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, top_ptr, sum_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    kv_heads, n_q, n_k, query_offset, first_key, splits, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Softmax numerator, top and sum of SPLIT keys; row r is query r // GROUP of head r % GROUP."""
    split = tl.program_id(0) % splits
    b = (tl.program_id(0) // splits // kv_heads).to(tl.int64)
    kv = (tl.program_id(0) // splits % kv_heads).to(tl.int64)
    row = tl.arange(0, ROWS)
    inside = row < n_q * GROUP
    cols_d, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    at = (kv * GROUP + row % GROUP) * stride_qh + (row // GROUP) * stride_qn
    q = tl.load(q_ptr + b * stride_qb + at[:, None] + cols_d[None, :],
                mask=inside[:, None] & (cols_d < DIM)[None, :], other=0.0)  # fmt: skip
    if UPCAST:
        q = q.to(tl.float32)
    position = query_offset + row // GROUP
    k_ptr += b * stride_kb + kv * stride_kh
    v_ptr += b * stride_vb + kv * stride_vh
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    begin = first_key + split * SPLIT
    for start in range(begin, tl.minimum(begin + SPLIT, n_k), BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        held = keys < n_k
        k = load_rows(k_ptr, stride_kn, keys, held, cols_d, DIM, UPCAST)
        v = load_rows(v_ptr, stride_vn, keys, held, cols_v, VALUE_DIM, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = held[None, :] & (keys[None, :] <= position[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.math.exp2(scores - safe[:, None])
        shrink = tl.math.exp2(top - safe)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher
    slot = ((b * kv_heads + kv) * splits + split) * ROWS + row
    tl.store(part_ptr + slot[:, None] * BLOCK_DV + cols_v[None, :], acc)
    tl.store(top_ptr + slot, top)
    tl.store(sum_ptr + slot, total)


@triton.jit(do_not_specialize=["n_q", "n_k", "query_offset", "last", "splits"])
def _infini_join_kernel(
    mq_ptr, part_ptr, top_ptr, sum_ptr, m_ptr, z_ptr, gate_ptr, written_ptr, o_ptr,
    stride_qb, stride_qh, stride_qn,
    heads, kv_heads, n_q, n_k, query_offset, last, splits, length, lag,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, LOCAL_FIRST: tl.constexpr,
):  # fmt: skip
    """Join the splits of one query of one head, read its memory, mix."""
    i = tl.program_id(0) % n_q
    b = (tl.program_id(0) // n_q // heads).to(tl.int64)
    h = (tl.program_id(0) // n_q % heads).to(tl.int64)
    kv = h // GROUP
    row = i * GROUP + h % GROUP
    cols_d, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    top = float("-inf")
    total = 0.0
    for split in range(0, splits):
        slot = ((b * kv_heads + kv) * splits + split) * ROWS + row
        its_top = tl.load(top_ptr + slot)
        higher = tl.maximum(top, its_top)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        old, new = tl.math.exp2(top - safe), tl.math.exp2(its_top - safe)
        acc = acc * old + tl.load(part_ptr + slot * BLOCK_DV + cols_v) * new
        total = total * old + tl.load(sum_ptr + slot) * new
        top = higher
    near = acc / tl.where(total > 0, total, 1.0)
    segment = ((query_offset + i) // length).to(tl.int64)
    place, g = place_of(segment, b, h, kv_heads, last, written_ptr, written_ptr, gate_ptr, n_k,
                      length, lag, GROUP, False, LOCAL_FIRST)  # fmt: skip
    q = tl.load(mq_ptr + b * stride_qb + h * stride_qh + i * stride_qn + cols_d,
                mask=cols_d < DIM, other=0.0).to(tl.float32)  # fmt: skip
    f = tl.where(q > 0, q + 1.0, tl.exp(tl.minimum(q, 0.0)))
    f = tl.where(cols_d < DIM, f, 0.0)
    m = load_rows(m_ptr + place * DIM * VALUE_DIM, VALUE_DIM, cols_d, cols_d < DIM, cols_v,
                  VALUE_DIM, False)  # fmt: skip
    z = tl.load(z_ptr + place * DIM + cols_d, mask=cols_d < DIM, other=0.0)
    den = tl.sum(f * z, 0)
    read = tl.sum(f[:, None] * m, 0) * tl.where(den > 0, 1.0 / tl.where(den > 0, den, 1.0), 0.0)
    out = g * read + (1.0 - g) * near
    at = ((b * heads + h) * n_q + i) * VALUE_DIM + cols_v
    tl.store(o_ptr + at, out.to(o_ptr.dtype.element_ty), mask=cols_v < VALUE_DIM)


def decode(
    query: Tensor, key: Tensor, value: Tensor, memory_query: Tensor, memory: Tensor,
    normaliser: Tensor, gate: Tensor, written: Tensor, layout: Layout, scale: float,
) -> Tensor:  # fmt: skip
    """Output (B, H, N_q, D_v) of rows that all stand in one segment.

    memory (B, H_kv, R, D, D_v) and normaliser (B, H_kv, R, D): states before each segment.
    """
    query, key, value = kernel_input(query), kernel_input(key), kernel_input(value)
    memory_query = kernel_input(memory_query)
    batch, heads, n_q, dim = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[-1]
    group = heads // kv_heads
    segment = layout.query_offset // layout.length
    first = max(segment - layout.lag, 0) * layout.length
    end = min(layout.query_offset + n_q, layout.n_k)
    splits = max(1, triton.cdiv(end - first, _SPLIT))
    rows = max(16, int(triton.next_power_of_2(n_q * group)))
    shape = (batch, kv_heads, splits, rows)
    part = query.new_empty((*shape, block_dim(value_dim)), dtype=torch.float32)
    top, total = (query.new_empty(shape, dtype=torch.float32) for _ in range(2))
    output = value.new_empty((batch, heads, n_q, value_dim))
    if output.numel() == 0:
        return output
    tiles = {
        "GROUP": group, "DIM": dim, "VALUE_DIM": value_dim, "BLOCK_D": block_dim(dim),
        "BLOCK_DV": block_dim(value_dim), "ROWS": rows,
    }  # fmt: skip
    _infini_decode_kernel[full_grid(batch * kv_heads * splits)](
        query, key, value, part, top, total, *query.stride()[:3], *key.stride()[:3],
        *value.stride()[:3], kv_heads, n_q, end, layout.query_offset, first, splits,
        scale * _LOG2E, **tiles, BLOCK_N=_BLOCK_N, SPLIT=_SPLIT,
        UPCAST=upcasts(query.dtype, interpreting()), num_warps=4, num_stages=2,
    )  # fmt: skip
    _infini_join_kernel[full_grid(batch * heads * n_q)](
        memory_query, part, top, total, memory.contiguous(), normaliser.contiguous(), gate,
        written, output, *memory_query.stride()[:3], heads, kv_heads, n_q, layout.n_k,
        layout.query_offset, memory.shape[2] - 1, splits, layout.length, layout.lag, **tiles,
        LOCAL_FIRST=layout.local_first, num_warps=4, num_stages=1,
    )  # fmt: skip
    return output
