"""Near keys, sinks and the columns of ALL far clusters, opened or not, in one running softmax.

The columns of opened clusters are taken off again where their keys are added (`chunks_opened.py`).
That loses no accuracy: exp is convex, so the keys of a cluster together weigh at least what its
column weighs, and what is taken off is never larger than what is added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import KernelConfig, interpreting, pick
from ...._validation import Call
from ...config import HyperConfig
from .chunks_choose import far_rows
from .chunks_configs import chunks_config
from .chunks_means import Means
from .configs import shared_class
from .tiles import LN2, LOG2E, block_dim, grid_of, load_rows, scatter_rows, upcasts

__all__ = ["near_forward"]


@triton.jit
def _softmax_step(
    acc, l_i, m_i, q, k_ptr, v_ptr, bias_ptr, stride_kn, stride_vn, start, end, low, high, offs_n,
    offs_d, offs_dv, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Keys or columns start .. start + BLOCK_N; where MASKED, row i sees low[i] <= j < high[i]."""
    k = load_rows(k_ptr, stride_kn, start, end, offs_n, offs_d, DIM, BLOCK_D, MASKED, UPCAST)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    j = start + offs_n
    if BIASED or MASKED:
        s = s * scale
        if BIASED:
            s += tl.load(bias_ptr + j, mask=j < end, other=0.0)[None, :]
        if MASKED:
            seen = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
            s = tl.where(seen, s, float("-inf"))
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
        v_ptr, stride_vn, start, end, offs_n, offs_dv, VALUE_DIM, BLOCK_DV, MASKED, UPCAST
    )
    acc = tl.dot(w.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, l_i, m_new


@triton.jit(do_not_specialize=["n_q", "n_k", "tiles", "clusters", "query_offset", "full", "window"])
def _hyper_near_fwd_kernel(
    q_ptr, k_ptr, v_ptr, mean_k_ptr, mean_v_ptr, bias_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    scale, heads, n_q, n_k, tiles, clusters, query_offset, full, window,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr, PER_CHUNK: tl.constexpr, SINKS: tl.constexpr, HAS_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Output and lse, (B, H, N_q) contiguous, of BLOCK_M queries."""
    entry = tiles - 1 - tl.program_id(0) % tiles  # longest first
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    kv = b * (heads // GROUP) + h // GROUP
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    o_ptr += b * stride_ob + h * stride_oh
    mean_k_ptr += kv * clusters * DIM
    mean_v_ptr += kv * clusters * VALUE_DIM
    bias_ptr += kv * clusters
    start_m = entry * BLOCK_M
    end_m = tl.minimum(start_m + BLOCK_M, n_q)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_m = start_m + offs_m < end_m
    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_ptr, stride_qn, start_m, end_m, offs_m, offs_d, DIM, BLOCK_D, True, UPCAST)
    q = tl.where(scale < 0, -q, q)  # full tiles take the maximum before the scale
    scale = tl.abs(scale) * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)

    p = start_m + offs_m + query_offset
    p_first, p_last = start_m + query_offset, end_m - 1 + query_offset
    far = far_rows(p, full, window, CHUNK)
    far_first = far_rows(p_first, full, window, CHUNK)
    far_last = far_rows(p_last, full, window, CHUNK)
    if HAS_COLUMNS:
        seen_by_all = far_first * PER_CHUNK // BLOCK_N * BLOCK_N
        last = far_last * PER_CHUNK
        for start in range(0, seen_by_all, BLOCK_N):
            acc, l_i, m_i = _softmax_step(
                acc, l_i, m_i, q, mean_k_ptr, mean_v_ptr, bias_ptr, DIM, VALUE_DIM, start, last,
                far, far, offs_n, offs_d, offs_dv, scale, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
                True, False, UPCAST)  # fmt: skip
        for start in range(seen_by_all, last, BLOCK_N):
            acc, l_i, m_i = _softmax_step(
                acc, l_i, m_i, q, mean_k_ptr, mean_v_ptr, bias_ptr, DIM, VALUE_DIM, start, last,
                far * 0, far * PER_CHUNK, offs_n, offs_d, offs_dv, scale, DIM, VALUE_DIM, BLOCK_D,
                BLOCK_DV, True, True, UPCAST)  # fmt: skip
    for start in range(0, tl.minimum(far_last * CHUNK, SINKS), BLOCK_N):
        acc, l_i, m_i = _softmax_step(
            acc, l_i, m_i, q, k_ptr, v_ptr, bias_ptr, stride_kn, stride_vn, start, SINKS, far * 0,
            tl.minimum(far * CHUNK, SINKS), offs_n, offs_d, offs_dv, scale, DIM, VALUE_DIM,
            BLOCK_D, BLOCK_DV, False, True, UPCAST)  # fmt: skip
    # Keys from the first row's chunk on: those that all rows see lie in [seen, seen_end).
    end = tl.minimum(p_last + 1, n_k)
    high = tl.minimum(p + 1, n_k)
    seen = far_last * CHUNK
    tiles_seen = tl.maximum(tl.minimum(p_first + 1, n_k) - seen, 0) // BLOCK_N
    for start in range(far_first * CHUNK, tl.minimum(seen, end), BLOCK_N):
        acc, l_i, m_i = _softmax_step(
            acc, l_i, m_i, q, k_ptr, v_ptr, bias_ptr, stride_kn, stride_vn, start, n_k,
            far * CHUNK, tl.minimum(high, seen), offs_n, offs_d, offs_dv, scale, DIM, VALUE_DIM,
            BLOCK_D, BLOCK_DV, False, True, UPCAST)  # fmt: skip
    for start in range(seen, seen + tiles_seen * BLOCK_N, BLOCK_N):
        acc, l_i, m_i = _softmax_step(
            acc, l_i, m_i, q, k_ptr, v_ptr, bias_ptr, stride_kn, stride_vn, start, n_k, far, far,
            offs_n, offs_d, offs_dv, scale, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, False, False,
            UPCAST)  # fmt: skip
    for start in range(seen + tiles_seen * BLOCK_N, end, BLOCK_N):
        acc, l_i, m_i = _softmax_step(
            acc, l_i, m_i, q, k_ptr, v_ptr, bias_ptr, stride_kn, stride_vn, start, n_k,
            far * CHUNK, high, offs_n, offs_d, offs_dv, scale, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
            False, True, UPCAST)  # fmt: skip

    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    scatter_rows(o_ptr, stride_on, start_m + offs_m, mask_m, offs_dv, acc / l_safe[:, None],
                 VALUE_DIM)  # fmt: skip
    lse = tl.where(empty, float("-inf"), (m_i + tl.math.log2(l_safe)) * LN2)
    tl.store(lse_ptr + bh * n_q + start_m + offs_m, lse, mask=mask_m)


def near_forward(
    call: Call,
    config: HyperConfig,
    means: Means,
    output: Tensor,
    sizes: KernelConfig | None = None,
) -> Tensor:
    """Writes `output` (B, H, N_q, D_v); returns the lse (B, H, N_q) float32, natural logarithm."""
    query, key, value = call[:3]
    batch, heads, n_q, dim = query.shape
    kv_heads, n_k, value_dim = key.shape[1], key.shape[2], value.shape[-1]
    lse = query.new_empty((batch, heads, n_q), dtype=torch.float32)
    shared = shared_class(query.device)
    sizes = sizes or pick([chunks_config("near", dim, value_dim, query.dtype, shared)])
    tiles = triton.cdiv(n_q, sizes.block_m)
    _hyper_near_fwd_kernel[grid_of(tiles, batch, heads)](
        query, key, value, *means, output, lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        call.scale, heads, n_q, n_k, tiles, means.bias.shape[2], call.query_offset,
        n_k // config.chunk_size, config.window,
        GROUP=heads // kv_heads, DIM=dim, VALUE_DIM=value_dim,
        CHUNK=config.chunk_size, PER_CHUNK=config.clusters_per_chunk, SINKS=config.num_sinks,
        HAS_COLUMNS=config.residual == "centroid", BLOCK_M=sizes.block_m, BLOCK_N=sizes.block_n,
        BLOCK_D=block_dim(dim, value_dim), BLOCK_DV=block_dim(dim, value_dim),
        UPCAST=upcasts(query.dtype, interpreting()), **sizes.options(),
    )  # fmt: skip
    return lse
