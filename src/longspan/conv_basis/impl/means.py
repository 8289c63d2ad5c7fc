"""One Toeplitz kernel in closed form: the mean query against the mean key, at every rotation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MeanModel", "mean_model", "rotate"]


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
    heads, n, dim = query.shape[1:]
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    group = heads // max(key.shape[1], 1)
    valid = torch.arange(n, device=query.device) < lengths[:, None]
    share = (valid / lengths.clamp(min=1)[:, None]).to(wide)[:, None, :, None]  # (B, 1, N, 1)
    q = query.to(wide)
    k = torch.where(valid[:, None, :, None], key, 0.0).to(wide).repeat_interleave(group, 1)
    position = torch.arange(n, device=query.device, dtype=torch.float64)
    if rope_base is None:
        angle = query.new_zeros((n, dim // 2), dtype=wide)
        turned = torch.zeros_like(angle[:1])
    else:
        speed = rope_base ** (-torch.arange(0, dim, 2, device=query.device).double() / dim)
        angle = (position[:, None] * speed).to(wide)
        turned = (typical * speed).to(wide)
    if rope_base is not None:
        q, k = rotate(q, -angle), rotate(k, -angle)
    mean_q, mean_k = (q * share).sum(2, keepdim=True), (k * share).sum(2, keepdim=True)
    kernel = scale * (_turn(mean_q, angle, rope_base) * mean_k).sum(-1).unsqueeze(2)
    ahead = _turn(mean_q, turned, rope_base)
    key_offset = scale * ((k - mean_k) * ahead).sum(-1)
    behind = _turn(mean_k, -turned, rope_base)
    row_offset = scale * ((q - mean_q) * behind).sum(-1)
    return MeanModel(kernel, torch.where(valid[:, None], key_offset, 0.0), row_offset)


def _turn(tensor: Tensor, angle: Tensor, rope_base: float | None) -> Tensor:
    if rope_base is None:
        return tensor.expand(*tensor.shape[:2], angle.shape[0], tensor.shape[-1])
    return rotate(tensor, angle)
