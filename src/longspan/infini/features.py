"""Feature maps: what turns queries and keys into rows that a memory can hold."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import InfiniConfig

__all__ = ["elu_plus_one", "features"]

_TINIEST = 1e-12  # length below which a gated-delta key counts as zero


def features(x: Tensor, config: InfiniConfig) -> Tensor:
    """(..., D) to (..., feature_dim), in float32 (float64 for float64 inputs)."""
    wide = x if x.dtype is torch.float64 else x.float()
    if config.update == "gated_delta":
        size: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        return wide / size.clamp_min(_TINIEST)
    if config.feature_map == "dpfp":
        return _dpfp(wide)
    return elu_plus_one(wide)


def elu_plus_one(x: Tensor) -> Tensor:
    """ELU(x) + 1, computed as exp(x) below zero.

    exp(x) - 1 + 1 loses the small values: in bfloat16 it is 0 from x = -6.5 on, in float32 from
    -17 on, and reads divide by their sum.
    """
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def _dpfp(x: Tensor) -> Tensor:
    r = torch.cat((x, -x), -1).relu()
    return torch.cat([r * r.roll(shift, -1) for shift in (1, 2, 3)], -1)
