"""Where a token is: RoPE turns queries and keys, ALiBi adds a bias to scores."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..exact.api import exact_attention, exact_attention_varlen
from ..exact.config import ExactConfig
from ..types import Impl

__all__ = [
    "Rotation",
    "alibi_attention",
    "alibi_slopes",
    "at_least_float32",
    "make_rotation",
    "rotate",
]

_BLOCK = 1024  # queries that share an origin of positions
_EXTRA = 8  # columns added to a head: one for the bias, the rest keeps rows aligned


class Rotation(NamedTuple):
    """cos and sin of the angles, (..., N, D / 2), float32."""

    cos: Tensor
    sin: Tensor


def make_rotation(positions: Tensor, head_dim: int, base: float) -> Rotation:
    """Angles position * base ** (-2 i / D) of RoPE (arXiv:2104.09864), in float64, then rounded.

    In float32 the angle at position 1,000,000 would be off by 0.03.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64)
    angles = positions.double().unsqueeze(-1) * base ** (-exponents / head_dim)
    return Rotation(angles.cos().float(), angles.sin().float())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) of (..., N, D) by their angles; keeps the dtype."""
    first, second = at_least_float32(x).chunk(2, dim=-1)
    cos, sin = rotation
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; float64 stays."""
    return x if x.dtype is torch.float64 else x.float()


def alibi_slopes(heads: int, device: torch.device | str = "cpu") -> Tensor:
    """Slopes of ALiBi (arXiv:2108.12409): 2 ** (-8 h / H), h = 1 .. H, for H a power of two.

    Other H: the slopes of the next smaller power of two, then every other one of the next larger.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    slopes += [2.0 ** (-4 * (h + 1) / power) for h in range(0, 2 * (heads - power), 2)]
    return torch.tensor(slopes, device=device)


def alibi_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_offset: int = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    config: ExactConfig = ExactConfig(),
    impl: Impl | str = "auto",
) -> Tensor:
    """Causal exact attention with scores scale * q_i . k_j - slope_h * (i - j).

    -slope * i is the same for all keys of a row, so softmax drops it, and slope * j is one more
    product: q gets the column slope / scale, k the column j. No N x N bias exists.

    Args:
        query: (B, H, N_q, D), or packed (total, H, D) with `cu_seqlens`.
        key, value: (B, H_kv, N_k, D), or packed.
        query_offset: index, in keys, of the first query.
        cu_seqlens, max_seqlen: bounds of packed sequences, (S + 1,) int32, and their longest.
        config, impl: as in `exact_attention`.

    Returns:
        Like `query`, in its dtype.

    Semantics:
        Computed in float32 whatever the dtype, also under autocast: j = 4097 does not exist in
        bfloat16. Positions count from the last key that a block of 1,024 queries sees, so near
        keys keep small numbers (in packed sequences: from the last key of the sequence).
    """
    dim = query.shape[-1]
    scale = dim**-0.5
    slopes = alibi_slopes(query.shape[-3 if cu_seqlens is None else -2], query.device)
    with torch.autocast(query.device.type, enabled=False):
        # value gets columns, too: torch's kernels want one head dim.
        q, k, v = (F.pad(at_least_float32(t), (0, _EXTRA)) for t in (query, key, value))
        steep = slopes / scale
        settings: dict[str, Any] = {
            "scale": scale,
            "enable_gqa": True,
            "config": config,
            "impl": impl,
        }
        if cu_seqlens is not None:
            q[..., dim] = steep
            ends = torch.repeat_interleave(
                cu_seqlens[1:], cu_seqlens.diff(), output_size=key.shape[0]
            )
            k[..., dim] = (torch.arange(key.shape[0], device=key.device) - ends + 1)[:, None]
            bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
            out = exact_attention_varlen(q, k, v, *bounds, is_causal=True, **settings)
        else:
            q[..., dim] = steep[:, None]
            blocks = []
            for start in range(0, q.shape[2], _BLOCK):
                rows = q[:, :, start : start + _BLOCK]
                seen = query_offset + start + rows.shape[2]
                near = k[:, :, :seen].clone()
                near[..., dim] = torch.arange(1 - seen, 1, device=key.device)
                offset = query_offset + start
                blocks.append(
                    exact_attention(
                        rows, near, v[:, :, :seen], is_causal=True, query_offset=offset, **settings
                    )
                )
            out = torch.cat(blocks, dim=2)
    return out[..., :dim].to(query.dtype)
