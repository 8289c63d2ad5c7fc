"""One Toeplitz kernel in closed form: the mean query against the mean key, at every rotation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MeanModel", "mean_factors", "mean_model", "rotate"]


class MeanModel(NamedTuple):
    """score_ij ~ row_offset_i + key_offset_j + kernel(i - j), nats."""

    log_kernel: Tensor  # (B, H, 1, N)
    key_offset: Tensor  # (B, H, N)
    row_offset: Tensor  # (B, H, N)


def rotate(tensor: Tensor, angle: Tensor) -> Tensor:
    """Rotary embedding in halves: (..., D) turned by `angle` (..., D / 2)."""
    left, right = tensor.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def mean_model(
    query: Tensor, key: Tensor, lengths: Tensor, scale: float, rope_base: float | None, typical: int
) -> MeanModel:
    """From rotated queries (B, H, N, D) and keys (B, H_kv, N, D); `typical`: a lag of the tail.

    With un-rotated vectors q, k and their means m_q, m_k: kernel(l) = scale m_q . R(-l) m_k,
    key_offset_j = scale m_q . R(-typical) (k_j - m_k), row_offset_i the same with q_i - m_q.
    The means run over the valid tokens of the sequence, later ones included.
    """
    group = query.shape[1] // max(key.shape[1], 1)
    means = _means(query, key, lengths, rope_base, typical)
    q, k, mean_q, mean_k, angle, turned = means
    k, mean_k = (t.repeat_interleave(group, 1) for t in (k, mean_k))
    valid = torch.arange(query.shape[2], device=query.device) < lengths[:, None]
    kernel = scale * (_turn(mean_q, angle, rope_base) * mean_k).sum(-1).unsqueeze(2)
    ahead = _turn(mean_q, turned, rope_base)
    key_offset = scale * ((k - mean_k) * ahead).sum(-1)
    behind = _turn(mean_k, -turned, rope_base)
    row_offset = scale * ((q - mean_q) * behind).sum(-1)
    return MeanModel(kernel, torch.where(valid[:, None], key_offset, 0.0), row_offset)


def mean_factors(
    query: Tensor, key: Tensor, lengths: Tensor, scale: float, rope_base: float | None, typical: int
) -> tuple[Tensor, Tensor]:
    """`mean_model` as a product: queries (B, H, N, 2 D + 1) and keys (B, H_kv, N, 2 D + 1).

    Their inner products, unscaled, are row_offset_i + key_offset_j + kernel(i - j).
    """
    group = query.shape[1] // max(key.shape[1], 1)
    q, k, mean_q, mean_k, angle, turned = _means(query, key, lengths, rope_base, typical)
    behind = _turn(mean_k, -turned, rope_base).repeat_interleave(group, 1)
    row_offset = scale * ((q - mean_q) * behind).sum(-1, keepdim=True)
    ahead = _turn(mean_q, turned, rope_base).expand_as(q)
    left = torch.cat((scale * _turn(mean_q, angle, rope_base), scale * ahead, row_offset), -1)
    apart = k - mean_k
    ones = torch.ones_like(k[..., :1])
    return left, torch.cat((_turn(mean_k, angle, rope_base), apart, ones), -1)


def _means(
    query: Tensor, key: Tensor, lengths: Tensor, rope_base: float | None, typical: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Un-rotated queries and keys, their means over valid tokens, angles: all, and of `typical`."""
    n, dim = query.shape[2:]
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    valid = torch.arange(n, device=query.device) < lengths[:, None]
    share = (valid / lengths.clamp(min=1)[:, None]).to(wide)[:, None, :, None]  # (B, 1, N, 1)
    q = query.to(wide)
    k = torch.where(valid[:, None, :, None], key, 0.0).to(wide)
    if rope_base is None:
        angle = query.new_zeros((n, dim // 2), dtype=wide)
        turned = torch.zeros_like(angle[:1])
    else:
        position = torch.arange(n, device=query.device, dtype=torch.float64)
        speed = rope_base ** (-torch.arange(0, dim, 2, device=query.device).double() / dim)
        angle = (position[:, None] * speed).to(wide)
        turned = (typical * speed).to(wide)
        q, k = rotate(q, -angle), rotate(k, -angle)
    return q, k, (q * share).sum(2, keepdim=True), (k * share).sum(2, keepdim=True), angle, turned


def _turn(tensor: Tensor, angle: Tensor, rope_base: float | None) -> Tensor:
    if rope_base is None:
        return tensor.expand(*tensor.shape[:2], angle.shape[0], tensor.shape[-1])
    return rotate(tensor, angle)
