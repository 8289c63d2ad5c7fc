"""Columns of scores by lag, and back: one pass over the queries, for half precision inputs.

| | |
|---|---|
| dtypes | float16, bfloat16 (their products are exact in float32) |
| head dim | 1 to 256; padded to a power of two |
| architectures | sm_80 and later |
| grouped heads, strides | yes |
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.interpreter import repair_interpreter
from ...._triton.launch import KernelConfig, interpreting, unit_last_stride

__all__ = ["BACK_TILE", "COLUMN_TILE", "column_gradients", "columns"]

COLUMN_TILE = KernelConfig(128, 0, 4, 1)
BACK_TILE = KernelConfig(64, 0, 4, 1)
_SPLIT = 2048  # rows a program; partial sums of the keys' gradient, no atomics


@triton.jit(do_not_specialize=["n", "count"])
def columns_kernel(
    q_ptr, k_ptr, starts_ptr, out_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    n, count, heads, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[g, i - s_g] = scale q_i . k_{s_g}; -inf past the last row."""
    tiles = tl.cdiv(n, BLOCK_M)
    tile = tl.program_id(0) % tiles
    problem = (tl.program_id(0) // tiles).to(tl.int64)
    q_ptr += problem // heads * stride_qb + problem % heads * stride_qh
    k_ptr += problem // heads * stride_kb + problem % heads // GROUP * stride_kh
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    start = tl.load(starts_ptr + problem * count + g, mask=g < count, other=n)
    exists = start < n
    anchor = tl.load(k_ptr + start[:, None] * stride_kn + d[None, :],
                     mask=exists[:, None] & (d < DIM)[None, :], other=0.0)  # fmt: skip
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = tl.load(q_ptr + row[:, None].to(tl.int64) * stride_qn + d[None, :],
                mask=(row < n)[:, None] & (d < DIM)[None, :], other=0.0)  # fmt: skip
    if UPCAST:  # the interpreter multiplies bfloat16 wrongly
        anchor, q = anchor.to(tl.float32), q.to(tl.float32)
    score = tl.dot(anchor, tl.trans(q), input_precision="ieee") * scale  # (G, M)
    lag = row[None, :] - start[:, None]
    seen = (lag >= 0) & exists[:, None]
    score = tl.where(seen, score, float("-inf"))
    place = tl.where(lag >= 0, lag, lag + n)  # rows before the start fill the end with -inf
    into = out_ptr + (problem * count + g[:, None]) * n + place
    tl.store(into, score, mask=(g < count)[:, None] & (row < n)[None, :])


@triton.jit(do_not_specialize=["n", "count"])
def column_gradients_kernel(
    grad_ptr, q_ptr, k_ptr, starts_ptr, grad_q_ptr, grad_anchor_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    n, count, heads, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq_i = scale sum_g grad[g, i - s_g] k_{s_g}; part of scale sum_i grad[g, i - s_g] q_i."""
    splits = tl.cdiv(n, SPLIT)
    split = tl.program_id(0) % splits
    problem = (tl.program_id(0) // splits).to(tl.int64)
    q_ptr += problem // heads * stride_qb + problem % heads * stride_qh
    k_ptr += problem // heads * stride_kb + problem % heads // GROUP * stride_kh
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    in_dim = d < DIM
    start = tl.load(starts_ptr + problem * count + g, mask=g < count, other=n)
    exists = start < n
    anchor = tl.load(k_ptr + start[:, None] * stride_kn + d[None, :],
                     mask=exists[:, None] & in_dim[None, :], other=0.0)  # fmt: skip
    if UPCAST:
        anchor = anchor.to(tl.float32)
    total = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for first in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, n), BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        lag = row[None, :] - start[:, None]
        seen = (lag >= 0) & exists[:, None] & (row < n)[None, :]
        grad = tl.load(grad_ptr + (problem * count + g[:, None]) * n + lag, mask=seen, other=0.0)
        grad *= scale
        q = tl.load(q_ptr + row[:, None].to(tl.int64) * stride_qn + d[None, :],
                    mask=(row < n)[:, None] & in_dim[None, :], other=0.0)  # fmt: skip
        if UPCAST:
            q = q.to(tl.float32)
        high = grad.to(q.dtype)  # two halves keep 16 bits and more
        low = (grad - high.to(tl.float32)).to(q.dtype)
        total = tl.dot(low, q, total, input_precision="ieee")
        total = tl.dot(high, q, total, input_precision="ieee")
        own = tl.dot(tl.trans(low), anchor, input_precision="ieee")
        own = tl.dot(tl.trans(high), anchor, own, input_precision="ieee")
        into = grad_q_ptr + (problem * n + row[:, None]) * DIM + d[None, :]
        tl.store(into, own.to(grad_q_ptr.dtype.element_ty),
                 mask=(row < n)[:, None] & in_dim[None, :])  # fmt: skip
    into = grad_anchor_ptr + ((problem * splits + split) * count + g[:, None]) * DIM + d[None, :]
    tl.store(into, total, mask=(g < count)[:, None] & in_dim[None, :])


def columns(query: Tensor, key: Tensor, starts: Tensor, scale: float) -> Tensor:
    """(B, H, G, N) float32, as `impl.recover.shifted_columns`."""
    batch, heads, n, dim = query.shape
    query, key, starts = unit_last_stride(query), unit_last_stride(key), starts.contiguous()
    count = starts.shape[-1]
    out = torch.empty((batch, heads, count, n), dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out
    if interpreting():
        repair_interpreter()
    block_m = 16 if interpreting() else COLUMN_TILE.block_m
    columns_kernel[(batch * heads * triton.cdiv(n, block_m),)](
        query, key, starts, out, *query.stride()[:3], *key.stride()[:3], n, count, heads, scale,
        GROUP=heads // key.shape[1], BLOCK_M=block_m, **_shape(dim, count),
        num_warps=COLUMN_TILE.num_warps, num_stages=COLUMN_TILE.num_stages,
    )  # fmt: skip
    return out


def column_gradients(
    grad: Tensor, query: Tensor, key: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of query (in its dtype) and key through `columns`; same bits again."""
    batch, heads, n, dim = query.shape
    query, key, starts = unit_last_stride(query), unit_last_stride(key), starts.contiguous()
    grad = grad.contiguous()
    count = starts.shape[-1]
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    if query.numel() == 0 or count == 0:
        return grad_query.zero_(), torch.zeros_like(key)
    if interpreting():
        repair_interpreter()
    block_m, split = (16, 32) if interpreting() else (BACK_TILE.block_m, _SPLIT)
    splits = triton.cdiv(n, split)
    parts = grad.new_empty((batch, heads, splits, count, dim))
    column_gradients_kernel[(batch * heads * splits,)](
        grad, query, key, starts, grad_query, parts, *query.stride()[:3], *key.stride()[:3],
        n, count, heads, scale, GROUP=heads // key.shape[1], BLOCK_M=block_m, SPLIT=split,
        **_shape(dim, count), num_warps=BACK_TILE.num_warps, num_stages=BACK_TILE.num_stages,
    )  # fmt: skip
    anchors = torch.where((starts < n).unsqueeze(-1), parts.sum(2), 0.0)  # (B, H, G, D)
    entry = torch.arange(batch, device=key.device).view(-1, 1, 1).expand_as(starts)
    own = torch.arange(heads, device=key.device) // (heads // key.shape[1])
    own = own.view(1, -1, 1).expand_as(starts)
    wide = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
    wide.index_put_((entry, own, starts.clamp(max=n - 1)), anchors, accumulate=True)
    return grad_query, wide.to(key.dtype)


def _shape(dim: int, count: int) -> dict[str, int]:
    return {"DIM": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim)),
            "BLOCK_G": max(16, triton.next_power_of_2(count)), "UPCAST": interpreting()}  # fmt: skip
