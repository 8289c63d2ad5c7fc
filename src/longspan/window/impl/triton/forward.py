"""Forward kernel of window attention: one program per tile of queries of one head.

| | |
|---|---|
| dtypes | float16, bfloat16, float32 (accumulation in float32) |
| head dim, value dim | 1 to 256 (float32: 128), may differ; tiles are padded to a power of two |
| architectures | sm_80 and later |
| causal, not causal, query_offset, key_lengths, packed, grouped heads | yes |
| backward | yes, deterministic (`backward.py`) |
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import KernelConfig, interpreting, pick
from ...._validation import Call
from ...config import WindowConfig
from .configs import ROW_PARTS, SINK_TILE, forward_config, shared_class
from .tiles import (
    LN2,
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
    row_parts,
    run_bounds,
    sequence_of,
    store_tile,
    tiles_of,
    upcasts,
    within,
)

__all__ = ["triton_forward"]

_UNSPECIALIZED = ["n_q", "n_k", "query_offset", "window", "num_sinks"]


@triton.jit
def _accumulate(
    acc, l_i, m_i, q, k_ptr, v_ptr, stride_kn, stride_vn, k_desc, v_desc, b, h, start, limit, low,
    count, is_full, offs_n, offs_d, offs_dv, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    KIND: tl.constexpr, IS_TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys start ... Row i sees count[i] keys from low[i].

    KIND: "full" (every score counts), "masked", "mixed" (full if is_full, else masked), or "sink"
    (sinks before the interval of the row; limit is their end).
    l_i is [BLOCK_M, PARTS]: the sum over the last axis is left to the end.
    """
    if IS_TMA:
        k = copy_tile(k_desc, b, h, start, offs_n.shape[0], BLOCK_D, UPCAST)
    else:
        k = load_tile(
            k_ptr, stride_kn, start, limit, offs_n, offs_d, DIM, BLOCK_D, KIND != "full", UPCAST
        )
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if KIND == "full":
        m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
        w = tl.math.exp2(s * scale - m_new[:, None])
        shrink = tl.math.exp2(m_i - m_new)
    else:
        if KIND == "sink":
            s = tl.where(below(low, limit, start, offs_n), s, float("-inf"))
        elif KIND == "masked":  # noqa: SIM114 (known at compile time, is_full is not)
            s = tl.where(within(low, count, start, offs_n), s, float("-inf"))
        elif not is_full:
            s = tl.where(within(low, count, start, offs_n), s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf is NaN in empty rows
        w = tl.math.exp2(s * scale - m_safe[:, None])
        shrink = tl.math.exp2(m_i - m_safe)
    l_i = l_i * shrink[:, None] + row_parts(w, l_i.shape[1])
    if IS_TMA:
        v = copy_tile(v_desc, b, h, start, offs_n.shape[0], BLOCK_DV, UPCAST)
    else:
        v = load_tile(
            v_ptr, stride_vn, start, limit, offs_n, offs_dv, VALUE_DIM, BLOCK_DV, KIND != "full",
            UPCAST,
        )  # fmt: skip
    acc = tl.dot(w.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, l_i, m_new


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _window_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, k_desc, v_desc, cu_q_ptr, cu_k_ptr, lengths_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on, stride_lb, stride_lh,
    scale, heads, n_q, n_k, query_offset, window, num_sinks,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_PACKED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    FLIP: tl.constexpr, UPCAST: tl.constexpr, ONE_LOOP: tl.constexpr, IS_TMA: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Output and lse of BLOCK_M queries of one head."""
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
    o_ptr += b * stride_ob + h * stride_oh + q_start * stride_on
    lse_ptr += b * stride_lb + h * stride_lh + q_start

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    # [BLOCK_M, BLOCK_D]
    q = load_tile(q_ptr, stride_qn, start_m, n_q, offs_m, offs_d, DIM, BLOCK_D, True, UPCAST)
    if FLIP:  # the maximum is taken before the scale, which must be positive
        q = -q
    scale = tl.abs(scale) * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    l_parts = tl.zeros([BLOCK_M, PARTS], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)

    first = start_m + query_offset  # key indices of the rows
    last = tl.minimum(start_m + BLOCK_M, n_q) - 1 + query_offset
    begin, full_begin, full_end, end, sink_end = run_bounds(
        first, last, n_k, window, num_sinks, IS_CAUSAL, BLOCK_N)  # fmt: skip
    low, count = row_bounds(first + offs_m, n_k, window, num_sinks, IS_CAUSAL)
    # The sinks first: their loads overlap with those of the queries.
    for start in range(0, sink_end, BLOCK_S):
        acc, l_parts, m_i = _accumulate(
            acc, l_parts, m_i, q, k_ptr, v_ptr, stride_kn, stride_vn, k_desc, v_desc, b, h_k, start,
            sink_end, low, count, False, tl.arange(0, BLOCK_S), offs_d, offs_dv, scale, DIM,
            VALUE_DIM, BLOCK_D, BLOCK_DV, "sink", False, UPCAST)  # fmt: skip
    if ONE_LOOP:  # one pipeline, filled once, over tiles with and without a mask
        for start in range(begin, end, BLOCK_N):
            is_full = (start >= full_begin) & (start < full_end)
            acc, l_parts, m_i = _accumulate(
                acc, l_parts, m_i, q, k_ptr, v_ptr, stride_kn, stride_vn, k_desc, v_desc, b, h_k,
                start, n_k, low, count, is_full, offs_n, offs_d, offs_dv, scale, DIM, VALUE_DIM,
                BLOCK_D, BLOCK_DV, "mixed", IS_TMA, UPCAST)  # fmt: skip
    else:
        for start in range(full_begin, full_end, BLOCK_N):
            acc, l_parts, m_i = _accumulate(
                acc, l_parts, m_i, q, k_ptr, v_ptr, stride_kn, stride_vn, k_desc, v_desc, b, h_k,
                start, n_k, low, count, True, offs_n, offs_d, offs_dv, scale, DIM, VALUE_DIM,
                BLOCK_D, BLOCK_DV, "full", IS_TMA, UPCAST)  # fmt: skip
        for t in range(0, masked_count(begin, full_begin, full_end, end, BLOCK_N)):
            start = masked_tile(t, begin, full_begin, full_end, BLOCK_N)
            acc, l_parts, m_i = _accumulate(
                acc, l_parts, m_i, q, k_ptr, v_ptr, stride_kn, stride_vn, k_desc, v_desc, b, h_k,
                start, n_k, low, count, False, offs_n, offs_d, offs_dv, scale, DIM, VALUE_DIM,
                BLOCK_D, BLOCK_DV, "masked", IS_TMA, UPCAST)  # fmt: skip

    l_i = tl.sum(l_parts, 1)
    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    store_tile(o_ptr, stride_on, start_m, n_q, offs_m, offs_dv, acc / l_safe[:, None], VALUE_DIM)
    lse = tl.where(empty, float("-inf"), (m_i + tl.math.log2(l_safe)) * LN2)
    tl.store(lse_ptr + start_m + offs_m, lse, mask=start_m + offs_m < n_q)


def triton_forward(
    call: Call,
    config: WindowConfig,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    kernel: KernelConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, N_q, D_v) and lse (B, H, N_q), float32; `kernel` overrides the tile sizes."""
    query, key, value = (kernel_input(t) for t in (call.query, call.key, call.value))
    batch, heads, n_q, dim = query.shape
    value_dim = value.shape[-1]
    output = query.new_empty((batch, heads, n_q, value_dim))
    lse = query.new_empty((batch, heads, n_q), dtype=torch.float32)
    entries, rows, keys = batch, n_q, key.shape[2]
    if cu_seqlens_q is not None:
        entries, rows, keys = len(cu_seqlens_q) - 1, max_seqlen_q, max_seqlen_k
    if output.numel() == 0 or rows == 0 or keys == 0:
        return cut(output, call.value.shape[-1]).zero_(), lse.fill_(float("-inf"))
    scale = call.scale
    if scale == 0.0:  # -inf * 0 is NaN
        query, scale = torch.zeros_like(query), 1.0
    # a copied tile may hold rows of the next sequence: only where all sequences are one length
    is_uniform = cu_seqlens_q is None and call.key_lengths is None
    is_tma = is_uniform and copies_tiles(key, value)
    shared = shared_class(query.device)
    sizes = kernel or pick(
        [forward_config(dim, value_dim, query.dtype, shared, is_tma and copies_pay(query))]
    )
    is_tma = is_tma and sizes.is_tma
    grid = grid_of(tiles_of(rows, sizes.block_m), entries, heads)
    _window_fwd_kernel[grid](
        query, key, value, output, lse, *descriptors(is_tma, key, value, sizes.block_n),
        cu_seqlens_q, cu_seqlens_k, call.key_lengths,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        *lse.stride()[:2], scale, heads, rows, keys,
        call.query_offset, *kernel_settings(config, keys),
        GROUP=heads // key.shape[1], DIM=dim, VALUE_DIM=value_dim,
        BLOCK_M=sizes.block_m, BLOCK_N=sizes.block_n, BLOCK_S=SINK_TILE,
        BLOCK_D=block_dim(dim), BLOCK_DV=block_dim(value_dim),
        IS_CAUSAL=call.is_causal, IS_PACKED=cu_seqlens_q is not None, HAS_LENGTHS=call.key_lengths is not None,
        FLIP=scale < 0, UPCAST=upcasts(query.dtype, interpreting()), ONE_LOOP=sizes.is_one_loop, IS_TMA=is_tma,
        PARTS=ROW_PARTS,
        **sizes.options(),
    )  # fmt: skip
    return cut(output, call.value.shape[-1]), lse
