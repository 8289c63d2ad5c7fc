"""Where a token is: RoPE turns queries and keys, ALiBi adds a bias to scores."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..exact.config import ExactConfig
from ..types import Impl
from .key_bias import PackedBounds, key_bias_attention, key_bias_attention_packed
from .rope_scaling import RopeScaling, rope_frequencies

__all__ = [
    "Rotation",
    "alibi_attention",
    "alibi_slopes",
    "at_least_float32",
    "make_rotation",
    "rotate",
]


class Rotation(NamedTuple):
    """cos and sin of the angles, (..., N, D / 2), float32."""

    cos: Tensor
    sin: Tensor


def make_rotation(
    positions: Tensor, head_dim: int, base: float, scaling: RopeScaling | None = None
) -> Rotation:
    """Angles position * base ** (-2 i / D) of RoPE (arXiv:2104.09864), in float64, then rounded.

    In float32 the angle at position 1,000,000 would be off by 0.03. `scaling` changes the
    frequencies, and for YaRN the length of the turned vectors.
    """
    frequencies, length = rope_frequencies(head_dim, base, scaling)
    angles = positions.double().unsqueeze(-1) * frequencies.to(positions.device)
    return Rotation((length * angles.cos()).float(), (length * angles.sin()).float())


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

    -slope * i is the same for all keys of a row, so softmax drops it, and slope * j is a bias of
    the key: `key_bias_attention` computes it on fused kernels, without an N x N bias.

    Args:
        query: (B, H, N_q, D), or packed (total, H, D) with `cu_seqlens`.
        key, value: (B, H_kv, N_k, D), or packed.
        query_offset: index, in keys, of the first query.
        cu_seqlens, max_seqlen: bounds of packed sequences, (S + 1,) int32, and their longest.
        config, impl: as in `exact_attention`.

    Returns:
        Like `query`, in its dtype.
    """
    head_axis, length_axis = (-3, -2) if cu_seqlens is None else (-2, 0)
    heads, kv_heads = query.shape[head_axis], key.shape[head_axis]
    slopes = alibi_slopes(heads, query.device).to(torch.float64)
    bias = torch.arange(key.shape[length_axis], device=key.device, dtype=torch.float64)
    settings: dict[str, Any] = {"config": config, "impl": impl}
    if kv_heads == heads:
        bias = slopes[:, None] * bias
    else:  # heads that share a key have slopes of their own
        settings["row_factor"] = slopes
        bias = bias.expand(kv_heads, -1)
    if cu_seqlens is not None:
        bounds = PackedBounds(cu_seqlens, max_seqlen)
        return key_bias_attention_packed(query, key, value, bias.mT, bounds, **settings)
    return key_bias_attention(query, key, value, bias, query_offset=query_offset, **settings)
