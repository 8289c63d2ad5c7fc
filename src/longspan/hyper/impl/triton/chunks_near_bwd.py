"""Backward of near keys, sinks and the columns of all far clusters, opened or not.

With p = exp(s + bias - lse), lse that of the whole row: ds = p (dp - delta). One kernel for dq, one
for dk and dv of keys, one for the gradients of the columns. What opened clusters take off again and
add is `chunks_opened_bwd.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import KernelConfig, interpreting, pick
from ...._validation import Call
from ...config import HyperConfig
from .backward import _key_step
from .chunks_choose import far_rows
from .chunks_configs import chunks_config
from .chunks_means import Means
from .configs import shared_class
from .tiles import LOG2E, block_dim, grid_of, load_rows, scatter_rows, upcasts

__all__ = ["column_backward", "near_key_backward", "near_query_backward"]


@triton.jit
def _query_step(
    dq, q, do, lse, delta, k_ptr, v_ptr, bias_ptr, stride_kn, stride_vn, start, end, low, high,
    offs_n, offs_d, offs_dv, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq += ds k over start .. start + BLOCK_N; where MASKED, row i sees low[i] <= j < high[i]."""
    k = load_rows(k_ptr, stride_kn, start, end, offs_n, offs_d, DIM, BLOCK_D, MASKED, UPCAST)
    v = load_rows(
        v_ptr, stride_vn, start, end, offs_n, offs_dv, VALUE_DIM, BLOCK_DV, MASKED, UPCAST
    )
    j = start + offs_n
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None]
    if BIASED:
        s += tl.load(bias_ptr + j, mask=j < end, other=0.0)[None, :]
    w = tl.math.exp2(s)
    if MASKED:
        w = tl.where((j[None, :] >= low[:, None]) & (j[None, :] < high[:, None]), w, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = w * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["n_q", "n_k", "tiles", "clusters", "query_offset", "full", "window"])
def _hyper_near_query_bwd_kernel(
    q_ptr, k_ptr, v_ptr, mean_k_ptr, mean_v_ptr, bias_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
    stride_dqb, stride_dqh, stride_dqn,
    scale, heads, n_q, n_k, tiles, clusters, query_offset, full, window,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr, PER_CHUNK: tl.constexpr, SINKS: tl.constexpr, HAS_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries."""
    entry = tiles - 1 - tl.program_id(0) % tiles  # longest first
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    kv = b * (heads // GROUP) + h // GROUP
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    do_ptr += b * stride_dob + h * stride_doh
    dq_ptr += b * stride_dqb + h * stride_dqh
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
    # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV], [BLOCK_M], [BLOCK_M]
    q = load_rows(q_ptr, stride_qn, start_m, end_m, offs_m, offs_d, DIM, BLOCK_D, True, UPCAST)
    do = load_rows(
        do_ptr, stride_don, start_m, end_m, offs_m, offs_dv, VALUE_DIM, BLOCK_DV, True, UPCAST
    )
    at = bh * n_q + start_m + offs_m
    lse = tl.load(lse_ptr + at, mask=mask_m, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + at, mask=mask_m, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    p = start_m + offs_m + query_offset
    p_first, p_last = start_m + query_offset, end_m - 1 + query_offset
    far = far_rows(p, full, window, CHUNK)
    far_first = far_rows(p_first, full, window, CHUNK)
    far_last = far_rows(p_last, full, window, CHUNK)
    if HAS_COLUMNS:
        seen_by_all = far_first * PER_CHUNK // BLOCK_N * BLOCK_N
        last = far_last * PER_CHUNK
        for start in range(0, seen_by_all, BLOCK_N):
            dq = _query_step(
                dq, q, do, lse, delta, mean_k_ptr, mean_v_ptr, bias_ptr, DIM, VALUE_DIM, start,
                last, far, far, offs_n, offs_d, offs_dv, scale * LOG2E, DIM, VALUE_DIM, BLOCK_D,
                BLOCK_DV, True, False, UPCAST)  # fmt: skip
        for start in range(seen_by_all, last, BLOCK_N):
            dq = _query_step(
                dq, q, do, lse, delta, mean_k_ptr, mean_v_ptr, bias_ptr, DIM, VALUE_DIM, start,
                last, far * 0, far * PER_CHUNK, offs_n, offs_d, offs_dv, scale * LOG2E, DIM,
                VALUE_DIM, BLOCK_D, BLOCK_DV, True, True, UPCAST)  # fmt: skip
    for start in range(0, tl.minimum(far_last * CHUNK, SINKS), BLOCK_N):
        dq = _query_step(
            dq, q, do, lse, delta, k_ptr, v_ptr, bias_ptr, stride_kn, stride_vn, start, SINKS,
            far * 0, tl.minimum(far * CHUNK, SINKS), offs_n, offs_d, offs_dv, scale * LOG2E, DIM,
            VALUE_DIM, BLOCK_D, BLOCK_DV, False, True, UPCAST)  # fmt: skip
    # As in the forward: keys that all rows see lie in [seen, seen + tiles_seen * BLOCK_N).
    end = tl.minimum(p_last + 1, n_k)
    high = tl.minimum(p + 1, n_k)
    seen = far_last * CHUNK
    tiles_seen = tl.maximum(tl.minimum(p_first + 1, n_k) - seen, 0) // BLOCK_N
    for start in range(far_first * CHUNK, tl.minimum(seen, end), BLOCK_N):
        dq = _query_step(
            dq, q, do, lse, delta, k_ptr, v_ptr, bias_ptr, stride_kn, stride_vn, start, n_k,
            far * CHUNK, tl.minimum(high, seen), offs_n, offs_d, offs_dv, scale * LOG2E, DIM,
            VALUE_DIM, BLOCK_D, BLOCK_DV, False, True, UPCAST)  # fmt: skip
    for start in range(seen, seen + tiles_seen * BLOCK_N, BLOCK_N):
        dq = _query_step(
            dq, q, do, lse, delta, k_ptr, v_ptr, bias_ptr, stride_kn, stride_vn, start, n_k, far,
            far, offs_n, offs_d, offs_dv, scale * LOG2E, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, False,
            False, UPCAST)  # fmt: skip
    for start in range(seen + tiles_seen * BLOCK_N, end, BLOCK_N):
        dq = _query_step(
            dq, q, do, lse, delta, k_ptr, v_ptr, bias_ptr, stride_kn, stride_vn, start, n_k,
            far * CHUNK, high, offs_n, offs_d, offs_dv, scale * LOG2E, DIM, VALUE_DIM, BLOCK_D,
            BLOCK_DV, False, True, UPCAST)  # fmt: skip
    scatter_rows(dq_ptr, stride_dqn, start_m + offs_m, mask_m, offs_d, dq * scale, DIM)


@triton.jit(do_not_specialize=["n_q", "n_k", "tiles", "clusters", "query_offset", "full", "window"])
def _hyper_near_key_bwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    scale, kv_heads, n_q, n_k, tiles, clusters, query_offset, full, window,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr, PER_CHUNK: tl.constexpr, SINKS: tl.constexpr, IS_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys over the queries they are near to, or, where IS_COLUMN, of BLOCK_N
    columns over the queries they are far from. n_k counts keys or columns."""
    start_n = tl.program_id(0) % tiles * BLOCK_N
    kv = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = kv // kv_heads, kv % kv_heads
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    dk_ptr += b * stride_dkb + h * stride_dkh
    dv_ptr += b * stride_dvb + h * stride_dvh

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    j = start_n + offs_n
    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
    k = load_rows(k_ptr, stride_kn, start_n, n_k, offs_n, offs_d, DIM, BLOCK_D, True, UPCAST)
    v = load_rows(
        v_ptr, stride_vn, start_n, n_k, offs_n, offs_dv, VALUE_DIM, BLOCK_DV, True, UPCAST
    )
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # Rows that see key j: low[j] <= row < high[j]. Chunk c is far from p = (c + 1) CHUNK + window - 1.
    last = tl.minimum(start_n + BLOCK_N, n_k) - 1
    if IS_COLUMN:
        bias = tl.load(bias_ptr + kv * clusters + j, mask=j < n_k, other=0.0)
        turn = window - 1 - query_offset
        low = (j // PER_CHUNK + 1) * CHUNK + turn
        high = j * 0 + n_q
        begin = (start_n // PER_CHUNK + 1) * CHUNK + turn
        end = n_q
        even = (last // PER_CHUNK + 1) * CHUNK + turn  # from here on all rows see all columns
    else:
        bias = tl.zeros([BLOCK_N], tl.float32)
        turn = window - 1 - query_offset
        low = j - query_offset
        always = (j // CHUNK >= full) | (j < SINKS)
        high = tl.where(always, n_q, tl.minimum((j // CHUNK + 1) * CHUNK + turn, n_q))
        begin = start_n - query_offset
        end = tl.minimum((last // CHUNK + 1) * CHUNK + turn, n_q)
        if (last // CHUNK >= full) | (start_n < SINKS):
            end = n_q
        even = n_q
    begin = tl.maximum(begin, 0) // BLOCK_M * BLOCK_M
    even = tl.maximum(tl.cdiv(tl.maximum(tl.minimum(even, n_q), 0), BLOCK_M) * BLOCK_M, begin)
    for g in range(GROUP):
        head = h * GROUP + g
        q_g = q_ptr + b * stride_qb + head * stride_qh
        do_g = do_ptr + b * stride_dob + head * stride_doh
        at = (kv * GROUP + g) * n_q
        for start in range(begin, tl.minimum(even, end), BLOCK_M):
            q = load_rows(q_g, stride_qn, start, n_q, offs_m, offs_d, DIM, BLOCK_D, True, UPCAST)
            do = load_rows(
                do_g, stride_don, start, n_q, offs_m, offs_dv, VALUE_DIM, BLOCK_DV, True, UPCAST
            )
            rows = start + offs_m
            lse = tl.load(lse_ptr + at + rows, mask=rows < n_q, other=0.0) * LOG2E
            delta = tl.load(delta_ptr + at + rows, mask=rows < n_q, other=0.0)
            seen = (rows[None, :] >= low[:, None]) & (rows[None, :] < high[:, None])
            dk, dv = _key_step(dk, dv, k, v, q, do, lse, delta, bias, seen, scale * LOG2E, True)
        if IS_COLUMN:
            for start in range(even, end, BLOCK_M):
                q = load_rows(
                    q_g, stride_qn, start, n_q, offs_m, offs_d, DIM, BLOCK_D, True, UPCAST
                )
                do = load_rows(
                    do_g, stride_don, start, n_q, offs_m, offs_dv, VALUE_DIM, BLOCK_DV, True, UPCAST
                )
                rows = start + offs_m  # those beyond n_q are zeros and add nothing
                lse = tl.load(lse_ptr + at + rows, mask=rows < n_q, other=0.0) * LOG2E
                delta = tl.load(delta_ptr + at + rows, mask=rows < n_q, other=0.0)
                dk, dv = _key_step(
                    dk, dv, k, v, q, do, lse, delta, bias, None, scale * LOG2E, False
                )
    scatter_rows(dk_ptr, stride_dkn, j, j < n_k, offs_d, dk * scale, DIM)
    scatter_rows(dv_ptr, stride_dvn, j, j < n_k, offs_dv, dv, VALUE_DIM)


def near_query_backward(
    call: Call, config: HyperConfig, means: Means, grad_output: Tensor, lse: Tensor, delta: Tensor,
    dq: Tensor, sizes: KernelConfig | None = None,
) -> None:  # fmt: skip
    """Writes dq (B, H, N_q, D)."""
    query, key, value = call[:3]
    batch, heads, n_q, dim = query.shape
    kv_heads, n_k, value_dim = key.shape[1], key.shape[2], value.shape[-1]
    shared = shared_class(query.device)
    sizes = sizes or pick([chunks_config("near_query", dim, value_dim, query.dtype, shared)])
    tiles = triton.cdiv(n_q, sizes.block_m)
    _hyper_near_query_bwd_kernel[grid_of(tiles, batch, heads)](
        query, key, value, *means, grad_output, lse, delta, dq,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_output.stride()[:3],
        *dq.stride()[:3], call.scale, heads, n_q, n_k, tiles, means.bias.shape[2],
        call.query_offset, n_k // config.chunk_size, config.window, GROUP=heads // kv_heads,
        HAS_COLUMNS=config.residual == "centroid", **_settings(call, config, sizes),
    )  # fmt: skip


def near_key_backward(
    call: Call, config: HyperConfig, means: Means, grad_output: Tensor, lse: Tensor, delta: Tensor,
    dk: Tensor, dv: Tensor, sizes: KernelConfig | None = None,
) -> None:  # fmt: skip
    """Writes dk (B, H_kv, N_k, D) and dv of near keys and sinks; zeros where there are none."""
    _key_backward("near_key", call, config, means, (call.key, call.value), grad_output, lse, delta,
                  (dk, dv), sizes)  # fmt: skip


def column_backward(
    call: Call, config: HyperConfig, means: Means, grad_output: Tensor, lse: Tensor, delta: Tensor,
    d_mean: tuple[Tensor, Tensor], sizes: KernelConfig | None = None,
) -> None:  # fmt: skip
    """Writes the gradients of mean keys and mean values (B, H_kv, M, .), float32."""
    _key_backward("column", call, config, means, (means.key, means.value), grad_output, lse, delta,
                  d_mean, sizes)  # fmt: skip


def _key_backward(
    kind: str, call: Call, config: HyperConfig, means: Means, rows: tuple[Tensor, Tensor],
    grad_output: Tensor, lse: Tensor, delta: Tensor, grads: tuple[Tensor, Tensor],
    sizes: KernelConfig | None,
) -> None:  # fmt: skip
    key, value = rows
    batch, heads, n_q, dim = call.query.shape
    kv_heads, n_k = key.shape[1:3]
    if key.numel() == 0:
        return
    shared = shared_class(key.device)
    sizes = sizes or pick([chunks_config(kind, dim, value.shape[-1], key.dtype, shared)])
    tiles = triton.cdiv(n_k, sizes.block_n)
    _hyper_near_key_bwd_kernel[grid_of(tiles, batch, kv_heads)](
        call.query, key, value, means.bias, grad_output, lse, delta, *grads,
        *call.query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *grad_output.stride()[:3], *grads[0].stride()[:3], *grads[1].stride()[:3],
        call.scale, kv_heads, n_q, n_k, tiles, means.bias.shape[2], call.query_offset,
        call.key.shape[2] // config.chunk_size, config.window, GROUP=heads // kv_heads,
        IS_COLUMN=kind == "column", **_settings(call, config, sizes),
    )  # fmt: skip


def _settings(call: Call, config: HyperConfig, sizes: KernelConfig) -> dict[str, int]:
    dim, value_dim = call.query.shape[-1], call.value.shape[-1]
    width = block_dim(dim, value_dim)
    return {
        "DIM": dim, "VALUE_DIM": value_dim, "CHUNK": config.chunk_size,
        "PER_CHUNK": config.clusters_per_chunk, "SINKS": config.num_sinks,
        "BLOCK_M": sizes.block_m, "BLOCK_N": sizes.block_n, "BLOCK_D": width, "BLOCK_DV": width,
        "UPCAST": upcasts(call.query.dtype, interpreting()), **sizes.options(),
    }  # fmt: skip
