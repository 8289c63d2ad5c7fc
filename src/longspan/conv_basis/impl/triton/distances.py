"""Exact against modelled weights on sampled rows, two passes over the keys, nothing stored.

| | |
|---|---|
| dtypes | float16, bfloat16 (their products are exact in float32) |
| head dim | 1 to 256; padded to a power of two |
| architectures | sm_80 and later |
| key_lengths, grouped heads, strides | yes |
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.interpreter import repair_interpreter
from ...._triton.launch import KernelConfig, interpreting, unit_last_stride

__all__ = ["DISTANCE_TILE", "distance_kernel", "row_distances"]

DISTANCE_TILE = KernelConfig(64, 64, 4, 2)  # rows, keys
_SPLIT = 2048  # keys a program


@triton.jit(do_not_specialize=["n", "count", "near", "num_sinks"])
def distance_kernel(
    q_ptr, k_ptr, rows_ptr, lengths_ptr, log_kernel_ptr, starts_ptr, key_offset_ptr, row_offset_ptr,
    model_lse_ptr, exact_lse_ptr, first_ptr, second_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    n, count, near, num_sinks, heads, groups, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, IS_SECOND: tl.constexpr,
    BLOCK_G: tl.constexpr, HAS_KEY_OFFSET: tl.constexpr, HAS_ROW_OFFSET: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """First pass: maximum and sum of exact scores. Second: sum |p - p~|, largest |score - model|.

    Of the keys split * SPLIT .. of one head, for BLOCK_M sampled rows.
    """
    splits = tl.cdiv(n, SPLIT)
    tiles = tl.cdiv(count, BLOCK_M)
    program = tl.program_id(0)
    split = program % splits
    tile = (program // splits) % tiles
    problem = (program // splits // tiles).to(tl.int64)
    entry = problem // heads
    q_ptr += entry * stride_qb + problem % heads * stride_qh
    k_ptr += entry * stride_kb + problem % heads // GROUP * stride_kh
    length = tl.load(lengths_ptr + entry).to(tl.int32)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = m < count
    row = tl.load(rows_ptr + entry * count + m, mask=exists, other=-1).to(tl.int32)
    d = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + row[:, None].to(tl.int64) * stride_qn + d[None, :],
                mask=(row >= 0)[:, None] & (d < DIM)[None, :], other=0.0)  # fmt: skip
    if UPCAST:  # the interpreter multiplies bfloat16 wrongly
        q = q.to(tl.float32)
    into = (problem * count + m) * splits + split
    first = tl.full((BLOCK_M,), float("-inf") if not IS_SECOND else 0.0, tl.float32)
    second = tl.zeros((BLOCK_M,), tl.float32)
    if IS_SECOND:
        g = tl.arange(0, BLOCK_G)
        starts = tl.load(starts_ptr + problem * groups + g, mask=(g > 0) & (g < groups), other=n)
        place = problem * count + m
        model_lse = tl.load(model_lse_ptr + place, mask=exists, other=0.0)
        exact_lse = tl.load(exact_lse_ptr + place, mask=exists, other=0.0)
        if HAS_ROW_OFFSET:
            row_offset = tl.load(row_offset_ptr + place, mask=exists, other=0.0)
    last = tl.minimum(tl.minimum(split * SPLIT + SPLIT, length), tl.max(row, 0) + 1)
    for begin in range(split * SPLIT, last, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        valid = key < length
        k = tl.load(k_ptr + key[:, None].to(tl.int64) * stride_kn + d[None, :],
                    mask=valid[:, None] & (d < DIM)[None, :], other=0.0)  # fmt: skip
        if UPCAST:
            k = k.to(tl.float32)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        lag = row[:, None] - key[None, :]
        seen = (lag >= 0) & valid[None, :]
        if IS_SECOND:
            # the last group that begins at or before the key; the first begins at 0
            group = tl.sum((starts[:, None] <= key[None, :]).to(tl.int32), 0)
            kernel = log_kernel_ptr + (problem * groups + group) * n
            model = tl.load(kernel[None, :] + lag, mask=seen, other=float("-inf"))
            if HAS_KEY_OFFSET:
                model += tl.load(key_offset_ptr + problem * n + key, mask=valid, other=0.0)[None, :]
            if HAS_ROW_OFFSET:
                model += row_offset[:, None]
            model = tl.where((lag < near) | (key < num_sinks)[None, :], score, model)
            exact = tl.where(seen, tl.exp(score - exact_lse[:, None]), 0.0)
            modelled = tl.where(seen, tl.exp(model - model_lse[:, None]), 0.0)
            first += tl.sum(tl.abs(exact - modelled), 1)
            gap = tl.where(seen, tl.abs(score - model), 0.0)
            second = tl.maximum(second, tl.max(gap, 1))
        else:
            score = tl.where(seen, score, float("-inf"))
            top = tl.maximum(first, tl.max(score, 1))
            safe = tl.where(top == float("-inf"), 0.0, top)
            second = second * tl.exp(first - safe) + tl.sum(tl.exp(score - safe[:, None]), 1)
            first = top
    tl.store(first_ptr + into, first, mask=exists)
    tl.store(second_ptr + into, second, mask=exists)


def row_distances(
    query: Tensor, key: Tensor, rows: Tensor, lengths: Tensor, log_kernel: Tensor, starts: Tensor,
    key_offset: Tensor | None, row_offset: Tensor | None, lse: Tensor, scale: float, near: int,
    num_sinks: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Total variation (B, H, r) and largest score error (B, H) over the rows (B, r)."""
    batch, heads, n, dim = query.shape
    query, key = unit_last_stride(query), unit_last_stride(key)
    count, problems = rows.shape[1], batch * heads
    starts = starts.contiguous()
    spread = rows.unsqueeze(1).expand(-1, heads, -1)
    model_lse = torch.gather(lse, 2, spread).float()
    empty = model_lse == float("-inf")
    model_lse = torch.where(empty, 0.0, model_lse).contiguous()
    chosen = None if row_offset is None else torch.gather(row_offset, 2, spread).float()
    offset = None if key_offset is None else key_offset.float().contiguous()
    if interpreting():
        repair_interpreter()
    block_m, block_n, split = (16, 16, 32) if interpreting() else (*DISTANCE_TILE[:2], _SPLIT)
    block_m = min(block_m, max(16, triton.next_power_of_2(count)))
    splits = triton.cdiv(n, split)
    exact_lse = torch.zeros_like(model_lse)

    def one_pass(is_second: bool) -> tuple[Tensor, Tensor]:
        parts = [model_lse.new_empty((batch, heads, count, splits)) for _ in range(2)]
        distance_kernel[(problems * triton.cdiv(count, block_m) * splits,)](
            query, key, rows, lengths, log_kernel.float().contiguous(), starts,
            model_lse if offset is None else offset, model_lse if chosen is None else chosen,
            model_lse, exact_lse, *parts, *query.stride()[:3], *key.stride()[:3], n, count, near,
            num_sinks, heads, log_kernel.shape[2], scale, GROUP=heads // key.shape[1], DIM=dim,
            BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_M=block_m, BLOCK_N=block_n,
            SPLIT=split, IS_SECOND=is_second,
            BLOCK_G=triton.next_power_of_2(starts.shape[-1]), HAS_KEY_OFFSET=offset is not None,
            HAS_ROW_OFFSET=chosen is not None, UPCAST=interpreting(),
            num_warps=DISTANCE_TILE.num_warps, num_stages=DISTANCE_TILE.num_stages,
        )  # fmt: skip
        return parts[0], parts[1]

    top, total = one_pass(False)
    exact_lse = torch.logsumexp(top + torch.log(total), -1)
    unseen = exact_lse == float("-inf")
    exact_lse = torch.where(unseen, 0.0, exact_lse).contiguous()
    difference, gap = one_pass(True)
    distances = 0.5 * torch.where(unseen, 0.0, difference.sum(-1))
    return distances, gap.amax((-1, -2))
