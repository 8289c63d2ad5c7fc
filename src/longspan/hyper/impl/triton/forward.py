"""Forward kernels of HyperAttention: nodes (block and sampled columns), then leaves and the merge.

| | |
|---|---|
| dtypes | float16, bfloat16, float32 (accumulation in float32) |
| head dim, value dim | 1 to 256 (float32: 128), may differ; tiles are padded to a power of two |
| architectures | sm_80 and later |
| causal, not causal, cross lengths, grouped heads | yes |
| key_lengths, packed | no |
| backward | yes, deterministic (`backward.py`) |

The node kernel reads q, k and v through the sorted orders and the sampled columns; nothing is
copied in sorted order. Not causal: its result is the output. Causal: it leaves one partial output
a row and level, and the leaf kernel starts its running softmax from them.
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
from .configs import config_of, shared_class
from .plan import is_full, leaf_tiles, make_plan, query_tiles
from .tiles import (
    LN2,
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

__all__ = ["triton_forward"]


@triton.jit
def _node_step(
    acc, l_i, m_i, q, k_ptr, v_ptr, stride_kn, stride_vn, keys, exists, bias, offs_d, offs_dv, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the rows `keys`; where BIASED, `bias` may be -inf."""
    k = gather_rows(k_ptr, stride_kn, keys, exists, offs_d, DIM, BLOCK_D, UPCAST, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if BIASED:
        s = s * scale + bias[None, :]
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf is NaN
        w = tl.math.exp2(s - m_safe[:, None])
        shrink = tl.math.exp2(m_i - m_safe)
    else:
        m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
        w = tl.math.exp2(s * scale - m_new[:, None])
        shrink = tl.math.exp2(m_i - m_new)
    l_i = l_i * shrink + tl.sum(w, 1)
    v = gather_rows(v_ptr, stride_vn, keys, exists, offs_dv, VALUE_DIM, BLOCK_DV, UPCAST, MASKED)
    acc = tl.dot(w.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, l_i, m_new


@triton.jit(do_not_specialize=["tiles", "q_rows", "k_rows", "sampled"])
def _hyper_node_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, q_order_ptr, k_order_ptr, samples_ptr, bias_ptr, owner_ptr,
    tiles_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on, stride_lb, stride_lh,
    scale, heads, tiles, q_rows, k_rows, sampled,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    FULL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Output and lse of BLOCK_M sorted queries over their block of keys and their node's samples.

    FULL: every block of keys is a multiple of BLOCK_N long.
    """
    entry = tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    kv = b * (heads // GROUP) + h // GROUP
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    o_ptr += b * stride_ob + h * stride_oh
    lse_ptr += b * stride_lb + h * stride_lh
    q_order_ptr += bh.to(tl.int64) * q_rows
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
    # [BLOCK_M, BLOCK_D]
    q = gather_rows(q_ptr, stride_qn, rows, is_query, offs_d, DIM, BLOCK_D, UPCAST)
    q = tl.where(scale < 0, -q, q)  # tiles without bias take the maximum before the scale
    scale = tl.abs(scale) * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)

    for start in range(k_begin, k_end, BLOCK_N):
        exists = start + offs_n < k_end
        keys = tl.load(k_order_ptr + start + offs_n, mask=exists, other=0)
        bias = tl.where(exists, 0.0, float("-inf"))
        acc, l_i, m_i = _node_step(
            acc, l_i, m_i, q, k_ptr, v_ptr, stride_kn, stride_vn, keys, exists, bias, offs_d,
            offs_dv, scale, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, not FULL, not FULL,
            UPCAST)  # fmt: skip
    for start in range(0, SAMPLES, BLOCK_N):
        keys, exists, bias = sample_columns(samples_ptr, bias_ptr, owner_ptr, node * SAMPLES, start,
                                         block, offs_n, SAMPLES)  # fmt: skip
        acc, l_i, m_i = _node_step(
            acc, l_i, m_i, q, k_ptr, v_ptr, stride_kn, stride_vn, keys, exists, bias, offs_d,
            offs_dv, scale, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, True, SAMPLES % BLOCK_N != 0,
            UPCAST)  # fmt: skip

    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    slots = rows + shift
    scatter_rows(o_ptr, stride_on, slots, is_query, offs_dv, acc / l_safe[:, None], VALUE_DIM)
    lse = tl.where(empty, float("-inf"), (m_i + tl.math.log2(l_safe)) * LN2)
    tl.store(lse_ptr + slots, lse, mask=is_query)


@triton.jit
def _leaf_step(
    acc, l_i, m_i, q, k_ptr, v_ptr, stride_kn, stride_vn, start, k_end, p, offs_n, offs_d, offs_dv,
    scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over keys start .. of a leaf; causal where MASKED."""
    k = load_rows(k_ptr, stride_kn, start, k_end, offs_n, offs_d, DIM, BLOCK_D, MASKED, UPCAST)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        j = start + offs_n
        seen = (j[None, :] <= p[:, None]) & (j < k_end)[None, :]
        s = tl.where(seen, s * scale, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf is NaN
        w = tl.math.exp2(s - m_safe[:, None])
        shrink = tl.math.exp2(m_i - m_safe)
    else:
        m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
        w = tl.math.exp2(s * scale - m_new[:, None])
        shrink = tl.math.exp2(m_i - m_new)
    l_i = l_i * shrink + tl.sum(w, 1)
    v = load_rows(
        v_ptr, stride_vn, start, k_end, offs_n, offs_dv, VALUE_DIM, BLOCK_DV, MASKED, UPCAST
    )
    acc = tl.dot(w.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, l_i, m_new


@triton.jit(do_not_specialize=["tiles", "width", "query_offset"])
def _hyper_leaf_fwd_kernel(
    q_ptr, k_ptr, v_ptr, part_o_ptr, part_lse_ptr, o_ptr, lse_ptr, tiles_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on, stride_lb, stride_lh,
    stride_pb, stride_ph, stride_pn, stride_plb, stride_plh,
    scale, heads, tiles, width, query_offset,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Output and lse of BLOCK_M queries: their partial results from all levels and their leaf."""
    entry = tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    o_ptr += b * stride_ob + h * stride_oh
    lse_ptr += b * stride_lb + h * stride_lh
    part_o_ptr += b * stride_pb + h * stride_ph
    part_lse_ptr += b * stride_plb + h * stride_plh

    tiles_ptr += entry * width
    start_m, end_m = tl.load(tiles_ptr), tl.load(tiles_ptr + 1)
    k_begin, k_end = tl.load(tiles_ptr + 2), tl.load(tiles_ptr + 3)
    parts = tl.load(tiles_ptr + 4)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_m = start_m + offs_m < end_m
    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_ptr, stride_qn, start_m, end_m, offs_m, offs_d, DIM, BLOCK_D, True, UPCAST)
    q = tl.where(scale < 0, -q, q)  # the full tiles take the maximum before the scale
    scale = tl.abs(scale) * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # A partial result is one more column: its lse the logit, its output the value.
    for i in range(0, parts):
        first = tl.load(tiles_ptr + 5 + i) + start_m
        logit = tl.load(part_lse_ptr + first + offs_m, mask=mask_m, other=float("-inf")) * LOG2E
        part = load_rows(part_o_ptr, stride_pn, first, first + end_m - start_m, offs_m, offs_dv,
                         VALUE_DIM, BLOCK_DV, True, True)  # fmt: skip
        m_new = tl.maximum(m_i, logit)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        w = tl.math.exp2(logit - m_safe)
        shrink = tl.math.exp2(m_i - m_safe)
        l_i = l_i * shrink + w
        acc = acc * shrink[:, None] + part * w[:, None]
        m_i = m_new

    first = start_m + query_offset  # key index of the first row
    p = first + offs_m
    end = tl.minimum(end_m + query_offset, k_end)
    full_end = k_begin + tl.maximum(tl.minimum(first + 1, k_end) - k_begin, 0) // BLOCK_N * BLOCK_N
    for start in range(k_begin, full_end, BLOCK_N):
        acc, l_i, m_i = _leaf_step(
            acc, l_i, m_i, q, k_ptr, v_ptr, stride_kn, stride_vn, start, k_end, p, offs_n, offs_d,
            offs_dv, scale, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, False, UPCAST)  # fmt: skip
    for start in range(full_end, end, BLOCK_N):
        acc, l_i, m_i = _leaf_step(
            acc, l_i, m_i, q, k_ptr, v_ptr, stride_kn, stride_vn, start, k_end, p, offs_n, offs_d,
            offs_dv, scale, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, True, UPCAST)  # fmt: skip

    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    scatter_rows(o_ptr, stride_on, start_m + offs_m, mask_m, offs_dv, acc / l_safe[:, None],
                 VALUE_DIM)  # fmt: skip
    lse = tl.where(empty, float("-inf"), (m_i + tl.math.log2(l_safe)) * LN2)
    tl.store(lse_ptr + start_m + offs_m, lse, mask=mask_m)


def triton_forward(
    call: Call,
    config: HyperConfig,
    index: SortedIndex,
    node_kernel: KernelConfig | None = None,
    leaf_kernel: KernelConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, N_q, D_v) and lse (B, H, N_q), float32; the last arguments override tiles."""
    query, key, value = (kernel_input(t) for t in call[:3])
    batch, heads, n_q, dim = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[-1]
    lse = query.new_empty((batch, heads, n_q), dtype=torch.float32)
    output = query.new_empty((batch, heads, n_q, value_dim))
    if query.numel() == 0 or key.shape[2] == 0:
        return output.zero_()[..., : call.value.shape[-1]].contiguous(), lse.fill_(float("-inf"))
    plan = make_plan(call, config)
    part_o, part_lse = output, lse
    if plan.leaves:
        rows = plan.query_bases[-1]
        part_o = output.new_empty((batch, heads, rows, value_dim))
        part_lse = lse.new_empty((batch, heads, rows))
    shared = shared_class(query.device)
    common = {
        "GROUP": heads // kv_heads, "DIM": dim, "VALUE_DIM": value_dim,
        "BLOCK_D": block_dim(dim, value_dim), "BLOCK_DV": block_dim(dim, value_dim),
        "UPCAST": upcasts(query.dtype, interpreting()),
    }  # fmt: skip
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    if plan.nodes:
        sizes = node_kernel or pick([config_of("node", dim, value_dim, query.dtype, shared)])
        tiles = query_tiles(plan, sizes.block_m, query.device)
        samples = index.samples.shape[-1]
        _hyper_node_fwd_kernel[grid_of(len(tiles), batch, heads)](
            query, key, value, part_o, part_lse, *index, tiles,
            *strides, *part_o.stride()[:3], *part_lse.stride()[:2],
            call.scale, heads, len(tiles), plan.query_bases[-1], plan.key_bases[-1],
            len(plan.nodes) * samples, SAMPLES=samples, FULL=is_full(plan, sizes.block_n),
            BLOCK_M=sizes.block_m, BLOCK_N=sizes.block_n,
            num_warps=sizes.num_warps, num_stages=sizes.num_stages, **common,
        )  # fmt: skip
    if plan.leaves:
        sizes = leaf_kernel or pick([config_of("leaf", dim, value_dim, query.dtype, shared)])
        tiles = leaf_tiles(plan, sizes.block_m, False, query.device)
        _hyper_leaf_fwd_kernel[grid_of(len(tiles), batch, heads)](
            query, key, value, part_o, part_lse, output, lse, tiles,
            *strides, *output.stride()[:3], *lse.stride()[:2], *part_o.stride()[:3],
            *part_lse.stride()[:2], call.scale, heads, len(tiles), tiles.shape[1],
            plan.query_offset, BLOCK_M=sizes.block_m, BLOCK_N=sizes.block_n,
            num_warps=sizes.num_warps, num_stages=sizes.num_stages, **common,
        )  # fmt: skip
    return output[..., : call.value.shape[-1]].contiguous(), lse
