"""Exact attention in plain torch, a chunk of queries at a time: O(N) memory, any device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._validation import Call

_SCORES_AT_ONCE = 2**24  # scores held at a time: 64 MB in float32


class _Chunk(NamedTuple):
    rows: slice
    keys: slice
    q: Tensor  # (B, H_kv, G, rows, D), scaled, wide
    k: Tensor  # (B, H_kv, 1, keys, D), wide
    v: Tensor  # (B, H_kv, 1, keys, D_v), wide
    hidden: Tensor | None  # bool, True where a score does not count
    bias: Tensor | None


def chunked_forward(call: Call, attn_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output (B, H, N_q, D_v) in the dtype of query, lse (B, H, N_q) in float32 or float64."""
    batch, heads, n_q, _ = call.query.shape
    wide = _wide(call)
    output = call.query.new_zeros((batch, heads, n_q, call.value.shape[-1]))
    lse = call.query.new_full((batch, heads, n_q), float("-inf"), dtype=wide)
    for chunk in _chunks(call, attn_mask):
        scores = _scores(chunk)
        top = scores.amax(-1, keepdim=True)
        top = torch.where(top == float("-inf"), 0.0, top)  # -inf - -inf is NaN in empty rows
        weights = torch.exp(scores - top)
        total = weights.sum(-1, keepdim=True)
        safe = torch.where(total == 0, 1.0, total)
        part = (weights / safe) @ chunk.v
        output[:, :, chunk.rows] = part.flatten(1, 2).to(output.dtype)
        part_lse = torch.where(total == 0, float("-inf"), top + torch.log(safe)).squeeze(-1)
        lse[:, :, chunk.rows] = part_lse.flatten(1, 2)
    return output, lse


def chunked_backward(
    call: Call,
    attn_mask: Tensor | None,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv from the recomputed weights exp(scores - lse)."""
    wide = _wide(call)
    kv_heads = call.key.shape[1]
    dq = torch.zeros_like(call.query)
    dk = torch.zeros_like(call.key, dtype=wide)
    dv = torch.zeros_like(call.value, dtype=wide)

    def grouped(tensor: Tensor) -> Tensor:
        return _group(tensor.to(wide), kv_heads)

    for chunk in _chunks(call, attn_mask):
        do, o = grouped(grad_output[:, :, chunk.rows]), grouped(output[:, :, chunk.rows])
        row_lse = grouped(lse[:, :, chunk.rows]).unsqueeze(-1)
        row_lse = torch.where(row_lse == float("-inf"), 0.0, row_lse)
        p = torch.exp(_scores(chunk) - row_lse)
        delta = (do * o).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grouped(grad_lse[:, :, chunk.rows]).unsqueeze(-1)
        ds = p * (do @ chunk.v.transpose(-1, -2) - delta)
        dq[:, :, chunk.rows] = (call.scale * (ds @ chunk.k)).flatten(1, 2).to(dq.dtype)
        dk[:, :, chunk.keys] += (ds.transpose(-1, -2) @ chunk.q).sum(2)
        dv[:, :, chunk.keys] += (p.transpose(-1, -2) @ do).sum(2)
    return dq, dk.to(call.key.dtype), dv.to(call.value.dtype)


def _group(tensor: Tensor, kv_heads: int) -> Tensor:
    """(B, H, ...) to (B, H_kv, G, ...)."""
    batch, heads = tensor.shape[:2]
    return tensor.reshape(batch, kv_heads, heads // max(kv_heads, 1), *tensor.shape[2:])


def _wide(call: Call) -> torch.dtype:
    return torch.float64 if call.query.dtype is torch.float64 else torch.float32


def _scores(chunk: _Chunk) -> Tensor:
    scores = chunk.q @ chunk.k.transpose(-1, -2)  # (B, H_kv, G, rows, keys)
    if chunk.bias is not None:
        scores = scores + chunk.bias
    return scores if chunk.hidden is None else scores.masked_fill(chunk.hidden, float("-inf"))


def _chunks(call: Call, attn_mask: Tensor | None) -> Iterator[_Chunk]:
    batch, heads, n_q, _ = call.query.shape
    kv_heads, n_k = call.key.shape[1], call.key.shape[2]
    if call.query.numel() == 0 or n_k == 0:
        return
    wide, device = _wide(call), call.query.device
    size = max(1, _SCORES_AT_ONCE // max(1, batch * heads * n_k))
    columns = torch.arange(n_k, device=device)
    value = call.value
    if call.key_lengths is not None:  # 0 * NaN is NaN: padding must not reach the product
        padding = columns[None, :] >= call.key_lengths[:, None]
        value = value.masked_fill(padding[:, None, :, None], 0.0)
    for start in range(0, n_q, size):
        rows = slice(start, min(start + size, n_q))
        end = min(n_k, rows.stop + call.query_offset) if call.is_causal else n_k
        if end <= 0:
            continue
        keys = slice(0, end)
        hidden = None
        if call.is_causal:
            positions = torch.arange(rows.start, rows.stop, device=device) + call.query_offset
            hidden = (columns[None, keys] > positions[:, None])[None, None, None]
        if call.key_lengths is not None:
            padded = padding[:, None, None, None, keys]
            hidden = padded if hidden is None else hidden | padded
        bias = None
        if attn_mask is not None:
            mask = attn_mask.expand(batch, heads, n_q, n_k)[:, :, rows, keys]
            mask = _group(mask, kv_heads)
            if mask.dtype is torch.bool:
                hidden = ~mask if hidden is None else hidden | ~mask
            else:
                bias = mask.to(wide)
        yield _Chunk(
            rows,
            keys,
            call.scale * _group(call.query[:, :, rows].to(wide), kv_heads),
            call.key[:, :, keys].to(wide).unsqueeze(2),
            value[:, :, keys].to(wide).unsqueeze(2),
            hidden,
            bias,
        )
