"""Forward kernel of stick-breaking attention.

| | |
|---|---|
| dtypes | float16, bfloat16 (tensor cores), float32 (three tf32 products each) |
| head dim, value dim | 1 to 256, may differ |
| layouts | dense (B, H, N, D) with any strides but the last; packed (total, H, D) |
| options | GQA, query_offset, key_lengths, attend_current, window, logit_bias, early stop |
| devices | NVIDIA, compute capability 8.0 and newer; Triton's interpreter |

One program owns a tile of queries of one head and visits key tiles from the diagonal backwards,
carrying the accumulator and the stick of each row. Nothing is ever rescaled: a key tile's weights
are final when it is visited, and a tile whose sticks are all spent can stop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import capability, interpreting, unit_last_stride
from .common import (
    KEY_TILE,
    Config,
    _exp2,
    _key_of_column,
    _load_columns,
    _log2,
    _tile_weights,
)

__all__ = ["StickForward", "forward_config", "stick_forward"]

_LOG2E = 1.4426950408889634
#: Key tiles between two looks at the stick when stopping early.
_TILES_PER_CHECK = 4


@triton.jit
def _row_bounds(
    pid_m, n_q, n_k, key_length, query_offset,
    ATTEND_CURRENT: tl.constexpr, WINDOW: tl.constexpr, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Key tiles of a query tile: visited are [lo, hi), free of masks are [lo_full, full)."""
    first = pid_m * BLOCK_M + query_offset  # keys below this limit are visible to the first row
    last = min(pid_m * BLOCK_M + BLOCK_M, n_q) - 1 + query_offset
    if ATTEND_CURRENT:
        first += 1
        last += 1
    end = max(min(min(last, key_length), n_k), 0)
    hi = (end + BLOCK_N - 1) // BLOCK_N
    full = max(min(min(first, key_length), n_k), 0) // BLOCK_N
    lo = 0
    lo_full = 0
    if WINDOW:
        lo = min(max(first - window, 0) // BLOCK_N, hi)
        full = max(full, lo)
        lo_full = (max(last - window, 0) + BLOCK_N - 1) // BLOCK_N
        lo_full = max(min(lo_full, full), lo)
    return lo, lo_full, full, hi


@triton.jit
def _visible(limit, keys, key_length, WINDOW: tl.constexpr, window):
    """(BLOCK_M, BLOCK_N): which keys a row sees; `limit` is one past its last key."""
    seen = keys[None, :] < tl.minimum(limit, key_length)[:, None]
    if WINDOW:
        seen = seen & (keys[None, :] >= (limit - window)[:, None])
    return seen


@triton.jit
def _visit(
    acc, rest, lane_log, largest, q, k_base, v_base, stride_kn, stride_vn, k_offsets, v_offsets,
    tile, limit, key_length, window, scale_log2, bias_log2, mask_d, mask_dv,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """Take one key tile into the accumulator and the sticks."""
    # scalar tile address + fixed 32-bit offsets: pointers carried by the loop cost 64 registers
    first_key = tile * BLOCK_N
    k_ptrs = k_base + first_key.to(tl.int64) * stride_kn + k_offsets
    v_ptrs = v_base + first_key.to(tl.int64) * stride_vn + v_offsets
    keys = first_key + _key_of_column()
    if MASKED:
        # keys < key_length also guards the end of the tensor
        in_range = keys < key_length
        k = tl.load(k_ptrs, mask=in_range[:, None] & mask_d[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=in_range[:, None] & mask_dv[None, :], other=0.0)
    else:
        k = _load_columns(k_ptrs, mask_d, PAD_D)
        v = _load_columns(v_ptrs, mask_dv, PAD_DV)
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + bias_log2
    if MASKED:
        x = tl.where(_visible(limit, keys, key_length, WINDOW, window), x, float("-inf"))
    weights, rest, tile_log, tile_largest = _tile_weights(x, rest, BLOCK_M, APPROX)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, rest, lane_log + tile_log, tl.maximum(largest, tile_largest)


@triton.jit
def _stick_breaking_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, residual_ptr, log_rest_ptr, visited_ptr,
    bias_ptr, key_lengths_ptr, cu_q_ptr, cu_k_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    stride_lb, stride_lh,
    scale_log2, n_q, n_k, query_offset, window, stop_below, H, group, num_m,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_PER_CHECK: tl.constexpr,
    ATTEND_CURRENT: tl.constexpr, WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, VARLEN: tl.constexpr, EARLY_STOP: tl.constexpr,
    RESIDUAL: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head, key tiles near to far. Heavy tiles start first."""
    pid = tl.program_id(0)
    pid_m = num_m - 1 - pid % num_m
    pid_bh = pid // num_m
    b, h = pid_bh // H, pid_bh % H

    q_row, k_row = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    if VARLEN:
        q_row = tl.load(cu_q_ptr + b).to(tl.int64)
        k_row = tl.load(cu_k_ptr + b).to(tl.int64)
        n_q = (tl.load(cu_q_ptr + b + 1) - q_row).to(tl.int32)
        n_k = (tl.load(cu_k_ptr + b + 1) - k_row).to(tl.int32)
        query_offset = n_k - n_q
    key_length = n_k
    if HAS_LENGTHS:
        key_length = min(tl.load(key_lengths_ptr + b), n_k)
    bias_log2 = 0.0
    if HAS_BIAS:
        bias_log2 = tl.load(bias_ptr + h) * 1.4426950408889634

    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    h_kv = (h // group).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_m = offs_m < n_q
    mask_d, mask_dv = offs_d < D, offs_dv < DV
    PAD_D: tl.constexpr = D != BLOCK_D
    PAD_DV: tl.constexpr = DV != BLOCK_DV

    lo, lo_full, full, hi = _row_bounds(
        pid_m, n_q, n_k, key_length, query_offset, ATTEND_CURRENT, WINDOW, window, BLOCK_M, BLOCK_N
    )
    limit = offs_m + query_offset
    if ATTEND_CURRENT:
        limit += 1

    q_base = q_ptr + b64 * stride_qb + h64 * stride_qh + q_row * stride_qn
    q_ptrs = q_base + offs_m[:, None].to(tl.int64) * stride_qn + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask_m[:, None] & mask_d[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)

    columns = _key_of_column()
    k_base = k_ptr + b64 * stride_kb + h_kv * stride_kh + k_row * stride_kn
    v_base = v_ptr + b64 * stride_vb + h_kv * stride_vh + k_row * stride_vn
    k_offsets = columns[:, None] * stride_kn + offs_d[None, :]
    v_offsets = columns[:, None] * stride_vn + offs_dv[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_DV), dtype=tl.float32)
    rest = tl.where(mask_m, 1.0, 0.0)  # rows beyond the end must not keep the tile awake
    lane_log = tl.zeros((BLOCK_M, 4), dtype=tl.float32)
    largest = tl.zeros((BLOCK_M, 4), dtype=tl.float32)

    for i in tl.range(0, hi - full):
        acc, rest, lane_log, largest = _visit(
            acc, rest, lane_log, largest, q, k_base, v_base, stride_kn, stride_vn,
            k_offsets, v_offsets, hi - 1 - i, limit, key_length, window, scale_log2, bias_log2, mask_d, mask_dv,
            True, WINDOW, PAD_D, PAD_DV, BLOCK_M, BLOCK_N, UPCAST, PRECISION, APPROX,
        )  # fmt: skip
    tile = full
    if EARLY_STOP:
        awake = tl.max(rest, 0) >= stop_below
        while (tile > lo_full) & awake:
            count = min(tile - lo_full, TILES_PER_CHECK)
            for i in tl.range(0, count):
                acc, rest, lane_log, largest = _visit(
                    acc, rest, lane_log, largest, q, k_base, v_base, stride_kn, stride_vn,
                    k_offsets, v_offsets, tile - 1 - i, limit, key_length, window, scale_log2, bias_log2, mask_d, mask_dv,
                    False, WINDOW, PAD_D, PAD_DV, BLOCK_M, BLOCK_N, UPCAST, PRECISION, APPROX,
                )  # fmt: skip
            tile -= count
            awake = tl.max(rest, 0) >= stop_below
        lo = tl.where(awake, lo, tile)
    else:
        for i in tl.range(0, full - lo_full):
            acc, rest, lane_log, largest = _visit(
                acc, rest, lane_log, largest, q, k_base, v_base, stride_kn, stride_vn,
                k_offsets, v_offsets, full - 1 - i, limit, key_length, window, scale_log2, bias_log2, mask_d, mask_dv,
                False, WINDOW, PAD_D, PAD_DV, BLOCK_M, BLOCK_N, UPCAST, PRECISION, APPROX,
            )  # fmt: skip
        tile = lo_full
    if WINDOW:
        for i in tl.range(0, tile - lo):
            acc, rest, lane_log, largest = _visit(
                acc, rest, lane_log, largest, q, k_base, v_base, stride_kn, stride_vn,
                k_offsets, v_offsets, tile - 1 - i, limit, key_length, window, scale_log2, bias_log2, mask_d, mask_dv,
                True, WINDOW, PAD_D, PAD_DV, BLOCK_M, BLOCK_N, UPCAST, PRECISION, APPROX,
            )  # fmt: skip

    rows = (q_row + offs_m).to(tl.int64)
    o_offsets = b64 * stride_ob + h64 * stride_oh + rows[:, None] * stride_on + offs_dv[None, :]
    mask_o = mask_m[:, None] & mask_dv[None, :]
    high = acc.to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + o_offsets, high, mask=mask_o)
    if RESIDUAL:
        low = (acc - high.to(tl.float32)).to(o_ptr.dtype.element_ty)
        tl.store(residual_ptr + o_offsets, low, mask=mask_o)
    tl.store(visited_ptr + pid_bh * num_m + pid_m, hi - lo)

    # A logit beyond the clamp leaves weights as they are but not the logarithm of the stick.
    log_sum = tl.sum(lane_log, 1)
    clamped = tl.max(tl.max(largest, 1), 0) >= 1073741824.0
    if clamped:
        log_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        keys_in_tile = tl.arange(0, BLOCK_N)
        for t in range(lo, hi):
            keys = t * BLOCK_N + keys_in_tile
            k = tl.load(
                k_base + keys[:, None].to(tl.int64) * stride_kn + offs_d[None, :],
                mask=(keys < key_length)[:, None] & mask_d[None, :], other=0.0,
            )  # fmt: skip
            if UPCAST:
                k = k.to(tl.float32)
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + bias_log2
            x = tl.where(_visible(limit, keys, key_length, WINDOW, window), x, float("-inf"))
            softplus = tl.maximum(x, 0.0) + _log2(1.0 + _exp2(-tl.abs(x), APPROX), APPROX)
            log_sum += tl.sum(softplus, 1)
    alive = (rest > 1e-30) & (not clamped)
    log_rest = tl.where(alive, _log2(tl.where(alive, rest, 1.0), APPROX), -log_sum)
    tl.store(
        log_rest_ptr + b64 * stride_lb + h64 * stride_lh + rows,
        log_rest * 0.6931471805599453, mask=mask_m,
    )  # fmt: skip


class StickForward(NamedTuple):
    """What the forward pass leaves behind.

    output: (B, H, N_q, D_v), or packed (total_q, H, D_v).
    log_rest: (B, H, N_q) float32, or packed (total_q, H); natural logarithm.
    residual: `output`'s low part (same shape and dtype), so that output + residual has about
        sixteen bits; None in float32 and when no gradient is needed.
    visited: (B, H, query tiles) int32, or (sequences, H, query tiles): key tiles visited.
    """

    output: Tensor
    log_rest: Tensor
    residual: Tensor | None
    visited: Tensor


def forward_config(dtype: torch.dtype, head_dim: int, value_dim: int, major: int = 9) -> Config:
    """Tile sizes, warps and stages for one problem; pinned where kernels are interpreted.

    major: of the compute capability. Before Hopper a cap on the registers makes them spill.
    """
    if interpreting():
        return Config(32, 4, 1)
    wide = max(head_dim, value_dim)
    if dtype is torch.float32:
        return Config(64, 4, 1) if wide <= 128 else Config(16, 8, 1)
    if wide > 128:
        return Config(128, 8, 2)
    if wide > 64:
        return Config(128, 8, 3)
    return Config(64, 4, 3, 128 if major >= 9 else None)


def block_dim(dim: int) -> int:
    """Width of a tile that holds `dim` columns."""
    return max(16, int(triton.next_power_of_2(dim)))


def stick_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    need_grad: bool,
    config: Config | None = None,
) -> StickForward:
    """Stick-breaking attention of every query over the keys before it.

    Args:
        q, k, v: (B, H, N, D), or packed (total, H, D) when `cu_seqlens_q` is given; packed calls
            align causality at the end of each sequence and ignore `query_offset`.
        scale: multiplies q k^T.
        logit_bias: (H,) float32, added to the scaled logits.
        key_lengths: (B,) int32; keys from there on are invisible.
        attend_current: a row also sees the key at its own position.
        window: how many keys a row sees at most, counted back from its last visible one.
        early_stop: a query tile stops once all its sticks are shorter; None visits every tile.
        need_grad: also return the low part of the output.
        config: tile sizes other than the pinned ones, for measurements.
    """
    q, k, v = unit_last_stride(q), unit_last_stride(k), unit_last_stride(v)
    packed = cu_seqlens_q is not None
    heads, kv_heads = q.shape[-2] if packed else q.shape[1], k.shape[-2] if packed else k.shape[1]
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    if config is None:
        major = capability(q.device.index or 0)[0] if q.is_cuda else 9
        config = forward_config(q.dtype, head_dim, value_dim, major)
    output = q.new_empty((*q.shape[:-1], value_dim))
    residual = torch.empty_like(output) if need_grad and q.dtype is not torch.float32 else None
    log_strides: tuple[int, ...]
    if cu_seqlens_q is not None:
        batch, n_q, n_k = cu_seqlens_q.numel() - 1, max_seqlen_q, max_seqlen_k
        log_rest = q.new_empty((heads, q.shape[0]), dtype=torch.float32)
        log_strides = (0, log_rest.stride(0))
    else:
        batch, n_q, n_k = q.shape[0], q.shape[2], k.shape[2]
        log_rest = q.new_empty((batch, heads, n_q), dtype=torch.float32)
        log_strides = log_rest.stride()[:2]
    num_m = triton.cdiv(n_q, config.block_m)
    visited = torch.zeros((batch, heads, num_m), dtype=torch.int32, device=q.device)
    result = log_rest.t() if packed else log_rest
    if output.numel() == 0 or num_m == 0:
        return StickForward(output, result.zero_(), residual, visited)
    interpreted = interpreting()
    _stick_breaking_fwd_kernel[(batch * heads * num_m,)](
        q, k, v, output, residual, log_rest, visited,
        logit_bias, key_lengths, cu_seqlens_q, cu_seqlens_k,
        *bhn_strides(q, packed), *bhn_strides(k, packed), *bhn_strides(v, packed),
        *bhn_strides(output, packed), *log_strides,
        scale * _LOG2E, n_q, n_k, query_offset, window or 0, early_stop or 0.0,
        heads, heads // kv_heads, num_m,
        D=head_dim, DV=value_dim, BLOCK_D=block_dim(head_dim), BLOCK_DV=block_dim(value_dim),
        BLOCK_M=config.block_m, BLOCK_N=KEY_TILE, TILES_PER_CHECK=_TILES_PER_CHECK,
        ATTEND_CURRENT=attend_current, WINDOW=window is not None, HAS_BIAS=logit_bias is not None,
        HAS_LENGTHS=key_lengths is not None, VARLEN=packed, EARLY_STOP=early_stop is not None,
        RESIDUAL=residual is not None, UPCAST=interpreted,
        PRECISION="ieee" if interpreted else "tf32x3", APPROX=not interpreted,
        **config.options(),
    )  # fmt: skip
    return StickForward(output, result, residual, visited)


def bhn_strides(tensor: Tensor, packed: bool) -> tuple[int, int, int]:
    """Strides of batch, head and position; a packed tensor has no batch axis."""
    if packed:
        return 0, tensor.stride(1), tensor.stride(0)
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)
