"""Decoding: few queries against many keys, split over the keys, with an early exit by phases.

Supported: float16, bfloat16, float32; head dims 1 to 256; GQA (the query heads of a group share
one read of the keys); query_offset, key_lengths, attend_current, window, logit_bias, early stop.
No backward and no packed form.

Distances are counted back from the last visible key. Each program folds one run of keys into a
partial (output, log2 of the stick it leaves); `_stick_breaking_decode_merge_kernel` joins the
partials in order. With early stop the runs come in phases of growing reach: a program of a later
phase first reads what the earlier phases left of the sticks, and returns if nothing is left.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import interpreting, unit_last_stride
from .common import KEY_TILE, _exp2, _log2, _multiply, _reciprocal
from .forward import _LOG2E, block_dim

__all__ = ["MAX_ROWS", "stick_decode"]

#: Query rows (heads of a group times queries) that one program can hold.
MAX_ROWS = 64
#: Reach in keys of all phases but the last, when stopping early.
_PHASES = (2048, 16384)
#: Programs per multiprocessor that a launch aims for.
_PROGRAMS_PER_SM = 4


@triton.jit(
    do_not_specialize=[
        "query_offset",
        "first_split",
        "phase_start",
        "phase_end",
        "split_keys",
        "n_k",
        "num_splits",
    ]
)
def _stick_breaking_decode_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, log_ptr, tiles_ptr, bias_ptr, key_lengths_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    scale_log2, n_q, n_k, query_offset, window, log2_stop, H_kv, group, num_splits,
    first_split, phase_start, phase_end, split_keys,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    ATTEND_CURRENT: tl.constexpr, WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, EARLY_STOP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """One program: one run of keys of one key head, for all query rows of its group."""
    split = first_split + tl.program_id(0)
    unit = tl.program_id(1)
    b, h_kv = (unit // H_kv).to(tl.int64), (unit % H_kv).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)
    head, position = h_kv * group + offs_r // n_q, offs_r % n_q
    mask_r = offs_r < group * n_q
    rows = (unit.to(tl.int64) * num_splits + split) * BLOCK_R + offs_r
    tl.store(tiles_ptr + unit * num_splits + split, 0)

    key_length = n_k
    if HAS_LENGTHS:
        key_length = min(tl.load(key_lengths_ptr + b), n_k)
    limit = position + query_offset
    last = n_q - 1 + query_offset
    if ATTEND_CURRENT:
        limit += 1
        last += 1
    end = tl.maximum(tl.minimum(last, key_length), 0)
    start = 0
    if WINDOW:
        start = tl.maximum(last - (n_q - 1) - window, 0)
    # keys [lo, hi) of this run, nearest first
    reach = phase_start + (split - first_split) * split_keys
    hi = end - reach
    lo = tl.maximum(hi - tl.minimum(split_keys, phase_end - reach), start)
    awake = hi > lo
    if EARLY_STOP:
        left = tl.where(mask_r, 0.0, float("-inf"))
        for s in range(0, first_split):
            left += tl.load(log_ptr + (unit.to(tl.int64) * num_splits + s) * BLOCK_R + offs_r)
        awake = awake & (tl.max(left, 0) >= log2_stop)
    if not awake:
        tl.store(log_ptr + rows, tl.zeros((BLOCK_R,), dtype=tl.float32))
        return

    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    q = tl.load(
        q_ptr + b * stride_qb + head[:, None] * stride_qh + position[:, None] * stride_qn + offs_d[None, :],
        mask=mask_r[:, None] & (offs_d < D)[None, :], other=0.0,
    )  # fmt: skip
    bias_log2 = tl.zeros((BLOCK_R,), dtype=tl.float32)
    if HAS_BIAS:
        bias_log2 = tl.load(bias_ptr + head, mask=mask_r, other=0.0) * 1.4426950408889634
    if UPCAST:
        q = q.to(tl.float32)
    columns = BLOCK_N - 1 - tl.arange(0, BLOCK_N)  # nearest first
    k_base = k_ptr + b * stride_kb + h_kv * stride_kh
    v_base = v_ptr + b * stride_vb + h_kv * stride_vh
    k_offsets = columns[:, None] * stride_kn + offs_d[None, :]
    v_offsets = columns[:, None] * stride_vn + offs_dv[None, :]
    mask_d, mask_dv = offs_d < D, offs_dv < DV

    acc = tl.zeros((BLOCK_R, BLOCK_DV), dtype=tl.float32)
    rest = tl.full((BLOCK_R,), 1.0, dtype=tl.float32)
    log_sum = tl.zeros((BLOCK_R,), dtype=tl.float32)
    tiles = (hi - lo + BLOCK_N - 1) // BLOCK_N
    for i in tl.range(0, tiles):
        first_key = hi - (i + 1) * BLOCK_N
        keys = first_key + columns
        inside = keys >= lo
        base = first_key.to(tl.int64)
        k = tl.load(
            k_base + base * stride_kn + k_offsets, mask=inside[:, None] & mask_d[None, :], other=0.0
        )
        v = tl.load(
            v_base + base * stride_vn + v_offsets,
            mask=inside[:, None] & mask_dv[None, :],
            other=0.0,
        )
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + bias_log2[:, None]
        seen = inside[None, :] & (keys[None, :] < limit[:, None])
        if WINDOW:
            seen = seen & (keys[None, :] >= (limit - window)[:, None])
        x = tl.where(seen, x, float("-inf"))
        softplus = tl.maximum(x, 0.0) + _log2(1.0 + _exp2(-tl.abs(x), APPROX), APPROX)
        log_sum += tl.sum(softplus, 1)
        # plain scans: this kernel waits for memory, and 16 rows do not fill the layout of common.py
        e = _exp2(tl.minimum(x, 120.0), APPROX)
        u = _reciprocal(1.0 + e, APPROX)
        weights = e * tl.associative_scan(u, 1, _multiply) * rest[:, None]
        rest = rest * tl.reduce(u, 1, _multiply)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)

    # near 1 the product is the more precise of the two; far from it, and clamped, the sum is
    precise = log_sum < 16.0
    log_rest = tl.where(precise, _log2(tl.where(precise, rest, 1.0), APPROX), -log_sum)
    tl.store(log_ptr + rows, log_rest)
    part_ptrs = part_ptr + rows[:, None] * DV + offs_dv[None, :]
    tl.store(part_ptrs, acc, mask=mask_r[:, None] & mask_dv[None, :])
    tl.store(tiles_ptr + unit * num_splits + split, tiles)


@triton.jit(do_not_specialize=["num_splits"])
def _stick_breaking_decode_merge_kernel(
    part_ptr, log_ptr, tiles_ptr, o_ptr, log_rest_ptr, visited_ptr,
    stride_ob, stride_oh, stride_on, stride_lb, stride_lh, H_kv, group, n_q, num_splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    APPROX: tl.constexpr,
):  # fmt: skip
    """One program: join the partials of one query row, nearest first."""
    row = tl.program_id(0)
    unit = tl.program_id(1)
    b, h_kv = (unit // H_kv).to(tl.int64), (unit % H_kv).to(tl.int64)
    head, position = h_kv * group + row // n_q, row % n_q
    offs_s = tl.arange(0, BLOCK_S)
    offs_dv = tl.arange(0, BLOCK_DV)
    acc = tl.zeros((BLOCK_DV,), dtype=tl.float32)
    log_rest = tl.cast(0.0, tl.float32)
    visited = tl.cast(0, tl.int32)
    for start in range(0, num_splits, BLOCK_S):
        s = start + offs_s
        mask_s = s < num_splits
        index = (unit.to(tl.int64) * num_splits + s) * BLOCK_R + row
        tiles = tl.load(tiles_ptr + unit * num_splits + s, mask=mask_s, other=0)
        logs = tl.load(log_ptr + index, mask=mask_s, other=0.0)
        before = log_rest + tl.cumsum(logs, 0) - logs
        part = tl.load(
            part_ptr + index[:, None] * DV + offs_dv[None, :],
            mask=(tiles > 0)[:, None] & (offs_dv < DV)[None, :], other=0.0,
        )  # fmt: skip
        acc += tl.sum(_exp2(before, APPROX)[:, None] * part, 0)
        log_rest += tl.sum(logs, 0)
        visited += tl.sum(tiles, 0)
    tl.store(
        o_ptr + b * stride_ob + head * stride_oh + position * stride_on + offs_dv,
        acc.to(o_ptr.dtype.element_ty), mask=offs_dv < DV,
    )  # fmt: skip
    tl.store(
        log_rest_ptr + b * stride_lb + head * stride_lh + position, log_rest * 0.6931471805599453
    )
    tl.store(visited_ptr + b * H_kv * group + head, visited)


def split_plan(
    n_keys: int, units: int, programs: int, phases: tuple[int, ...], num_splits: int | None
) -> list[tuple[int, int, int, int]]:
    """Runs of keys as (phase start, phase end, keys per split, splits), by distance."""
    plan, start = [], 0
    for end in (*(p for p in phases if p < n_keys), n_keys):
        reach = end - start
        wanted = num_splits or max(1, programs // units)
        keys = triton.cdiv(triton.cdiv(reach, wanted), KEY_TILE) * KEY_TILE
        keys = max(keys, min(reach, 2 * KEY_TILE))
        plan.append((start, end, keys, triton.cdiv(reach, keys)))
        start = end
    return plan


def stick_decode(
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
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stick-breaking attention of a few queries (B, H, N_q, D) over a cache of keys.

    Args:
        num_splits: how many programs share the keys of one key head, in each phase; the result
            does not depend on it beyond rounding. Default: enough to fill the device.
        Everything else as in `stick_forward`; group times N_q must be at most `MAX_ROWS`.

    Returns:
        output (B, H, N_q, D_v), log_rest (B, H, N_q) float32, visited (B, H, 1) int32 key tiles.
    """
    q, k, v = unit_last_stride(q), unit_last_stride(k), unit_last_stride(v)
    batch, heads, n_q, head_dim = q.shape
    kv_heads, n_k, value_dim = k.shape[1], k.shape[2], v.shape[-1]
    group = heads // kv_heads
    if group * n_q > MAX_ROWS:
        raise ValueError(
            f"stick_decode: {group} query heads per key head times {n_q} queries is more than "
            f"{MAX_ROWS} rows; use stick_forward"
        )
    output = q.new_empty((batch, heads, n_q, value_dim))
    log_rest = q.new_zeros((batch, heads, n_q), dtype=torch.float32)
    visited = torch.zeros((batch, heads, 1), dtype=torch.int32, device=q.device)
    # what the last query can see, at most; key_lengths only shorten it
    reach = max(min(n_q - 1 + query_offset + int(attend_current), n_k), 0)
    if window is not None:
        reach = min(reach, window + n_q - 1)
    if output.numel() == 0 or reach == 0:
        return output.zero_(), log_rest, visited
    interpreted = interpreting()
    units = batch * kv_heads
    processors = 4
    if not interpreted:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    phases = _PHASES if early_stop is not None else ()
    plan = split_plan(reach, units, processors * _PROGRAMS_PER_SM, phases, num_splits)
    total = sum(count for *_, count in plan)
    wide = max(head_dim, value_dim)
    block_r = 16 if group * n_q <= 16 else 64
    parts = q.new_empty((units, total, block_r, value_dim), dtype=torch.float32)
    logs = q.new_empty((units, total, block_r), dtype=torch.float32)
    tiles = torch.empty((units, total), dtype=torch.int32, device=q.device)
    log2_stop = math.log2(early_stop) if early_stop else float("-inf")
    first = 0
    for start, end, keys, count in plan:
        _stick_breaking_decode_kernel[(count, units)](
            q, k, v, parts, logs, tiles, logit_bias, key_lengths,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            scale * _LOG2E, n_q, n_k, query_offset, window or 0, log2_stop, kv_heads, group, total,
            first, start, end, keys,
            D=head_dim, DV=value_dim, BLOCK_D=block_dim(head_dim), BLOCK_DV=block_dim(value_dim),
            BLOCK_R=block_r, BLOCK_N=KEY_TILE,
            ATTEND_CURRENT=attend_current, WINDOW=window is not None,
            HAS_BIAS=logit_bias is not None, HAS_LENGTHS=key_lengths is not None,
            EARLY_STOP=early_stop is not None,
            UPCAST=interpreted, PRECISION="ieee" if interpreted else "tf32x3", APPROX=not interpreted,
            num_warps=4 if block_r == 16 and wide <= 128 else 8, num_stages=3 if wide <= 128 else 2,
        )  # fmt: skip
        first += count
    _stick_breaking_decode_merge_kernel[(group * n_q, units)](
        parts, logs, tiles, output, log_rest, visited,
        *output.stride()[:3], *log_rest.stride()[:2], kv_heads, group, n_q, total,
        DV=value_dim, BLOCK_DV=block_dim(value_dim), BLOCK_R=block_r, BLOCK_S=32,
        APPROX=not interpreted, num_warps=4,
    )  # fmt: skip
    return output, log_rest, visited
