"""Strength of writes and decay of the memory, from what a layer projects; for "gated_delta"."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["write_rates"]

_KEPT = 4.0  # sigmoid(4) = 0.98 of the memory stays after a token, to begin with


def write_rates(projected: Tensor) -> dict[str, Tensor]:
    """`write_gate` and `log_decay`, (..., H_kv, N) each, from a projection (..., N, 2 H_kv).

    write_gate = sigmoid(first half), log_decay = log sigmoid(second half + 4); in float32, or
    float64 for float64.
    """
    wide = projected if projected.dtype is torch.float64 else projected.float()
    strength, decay = wide.transpose(-1, -2).chunk(2, -2)
    return {
        "write_gate": torch.sigmoid(strength),
        "log_decay": torch.nn.functional.logsigmoid(decay + _KEPT),
    }
