"""Exact attention with one number per key added to the scores, on kernels that take no bias.

scale * q_i . k_j + r_h c_j is one product of longer vectors: q gets the column r_h, k the column
c_j / scale. No N x N bias exists, and fused kernels run as they are. In bfloat16 both are split
into parts, high to low, so that they keep the 24 bits of float32. float16, whose range is too
small for them, is computed in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..exact.api import exact_attention, exact_attention_varlen
from ..exact.config import ExactConfig
from ..types import Impl

__all__ = ["PackedBounds", "key_bias_attention", "key_bias_attention_packed"]

_BLOCK = 4096  # queries that share an origin of the bias
_ALIGN = 8  # head dims of fused kernels are multiples of this
_PARTS = 3  # bfloat16 numbers that add up to a float32


class PackedBounds(NamedTuple):
    """Bounds of packed sequences: cu_seqlens (S + 1,) int32, length of the longest."""

    cu_seqlens: Tensor
    max_seqlen: int


def key_bias_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    *,
    row_factor: Tensor | None = None,
    query_offset: int = 0,
    config: ExactConfig = ExactConfig(),
    impl: Impl | str = "auto",
) -> Tensor:
    """Causal softmax(scale * q_i . k_j + row_factor_h * bias_j) v.

    Args:
        query: (B, H, N_q, D).
        key, value: (B, H_kv, N_k, D).
        bias: (N_k,), (H_kv, N_k) or (B, H_kv, N_k), float32 or float64; differentiable.
        row_factor: (H,), one per query head. Default: ones, which takes the fewest columns.
        query_offset: index, in keys, of the first query.
        config, impl: as in `exact_attention`.

    Returns:
        Like `query`, in its dtype.

    Semantics:
        A number added to all scores of a row changes nothing, so within a block of 4,096 queries
        the bias is counted from that of the last key which they see: near keys keep small
        numbers. What is lost is the float32 rounding of the scores, 2**-24 of the largest bias.
    """
    dim, n_q, n_k = query.shape[-1], query.shape[2], key.shape[2]
    settings: dict[str, Any] = {
        "scale": dim**-0.5, "enable_gqa": True, "config": config, "impl": impl,
    }  # fmt: skip
    dtype = query.dtype
    query, key, value = (_not_float16(t) for t in (query, key, value))
    bias = bias.expand(key.shape[0], key.shape[1], n_k)
    with torch.autocast(query.device.type, enabled=False):
        rows = _row_parts(row_factor, query)
        q = _append(query, rows[..., None, :].expand(*query.shape[:3], -1))
        v = F.pad(value, (0, q.shape[-1] - dim))  # fused kernels want one head dim
        blocks = []
        for start in range(0, n_q, _BLOCK):
            end = min(start + _BLOCK, n_q)
            seen = min(query_offset + end, n_k)
            near = bias[..., :seen]
            near = (near - near[..., -1:].detach()).mul(dim**0.5)
            k = _append(key[:, :, :seen], _key_parts(near, key.dtype, rows.shape[-1]))
            blocks.append(
                exact_attention(
                    q[:, :, start:end],
                    k,
                    v[:, :, :seen],
                    is_causal=True,
                    query_offset=query_offset + start,
                    **settings,
                )
            )
        out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
    return out[..., :dim].to(dtype)


def key_bias_attention_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    bounds: PackedBounds,
    *,
    row_factor: Tensor | None = None,
    config: ExactConfig = ExactConfig(),
    impl: Impl | str = "auto",
) -> Tensor:
    """The same for packed sequences.

    Args:
        query: (total, H, D).
        key, value: (total, H_kv, D).
        bias: (total,) or (total, H_kv); counted from the last key of each sequence.
        bounds: of the sequences.
        row_factor, config, impl: as in `key_bias_attention`.

    Returns:
        Like `query`, in its dtype.
    """
    dim, total = query.shape[-1], query.shape[0]
    cu, longest = bounds
    dtype = query.dtype
    query, key, value = (_not_float16(t) for t in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        lasts = torch.repeat_interleave(cu[1:].long() - 1, cu.diff(), output_size=total)
        bias = bias.unsqueeze(-1) if bias.ndim == 1 else bias
        near = (bias - bias[lasts].detach()).mul(dim**0.5).expand(total, key.shape[1])
        rows = _row_parts(row_factor, query.transpose(0, 1)[None])
        q = _append(query, rows.expand(total, -1, -1))
        k = _append(key, _key_parts(near, key.dtype, rows.shape[-1]))
        v = F.pad(value, (0, q.shape[-1] - dim))
        out = exact_attention_varlen(
            q, k, v, cu, cu, longest, longest, is_causal=True,
            scale=dim**-0.5, enable_gqa=True, config=config, impl=impl,
        )  # fmt: skip
    return out[..., :dim].to(dtype)


def _not_float16(x: Tensor) -> Tensor:
    return x.float() if x.dtype is torch.float16 else x


def _append(x: Tensor, columns: Tensor) -> Tensor:
    """Columns after the head dim, then zeros up to a multiple of 8."""
    width = x.shape[-1] + columns.shape[-1]
    padding = x.new_zeros(()).expand(*x.shape[:-1], -width % _ALIGN)
    return torch.cat((x, columns, padding), dim=-1)


def _row_parts(row_factor: Tensor | None, query: Tensor) -> Tensor:
    """(H, columns) in the dtype of the query: each part of the factor once per part of the key."""
    heads, dtype = query.shape[1], query.dtype
    parts = _PARTS if dtype is torch.bfloat16 else 1
    if row_factor is None:
        return query.new_ones(heads, parts)
    return torch.stack(_split(row_factor, dtype), -1).repeat_interleave(parts, -1)


def _key_parts(bias: Tensor, dtype: torch.dtype, columns: int) -> Tensor:
    """(..., N, columns): the parts of the bias, repeated for each part of the row factor."""
    parts = torch.stack(_split(bias, dtype), -1)
    return parts.repeat(*(1 for _ in bias.shape), columns // parts.shape[-1])


def _split(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Numbers of `dtype` that add up to x; the gradient goes through the first."""
    if dtype is not torch.bfloat16:
        return [x.to(dtype)]
    parts = [x.to(dtype)]
    rest = x.detach()
    for _ in range(_PARTS - 1):
        rest = rest - parts[-1].detach().to(x.dtype)
        parts.append(rest.to(dtype))
    return parts
