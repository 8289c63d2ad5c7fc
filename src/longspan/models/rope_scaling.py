"""RoPE beyond its trained length: frequencies changed at test time, NTK-aware or as in YaRN."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, nearest_name

__all__ = ["ROPE_SCALINGS", "RopeScaling", "rope_frequencies"]

ROPE_SCALINGS = ("ntk", "yarn")
_FAST, _SLOW = 32.0, 1.0  # turns within the trained length: above, kept; below, interpolated


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How RoPE reads texts `factor` times as long as those it was trained on.

    method: "ntk" raises the base to base * factor ** (D / (D - 2)), which divides the lowest
        frequency by `factor` and keeps the highest. "yarn" (arXiv:2309.00071) divides frequencies
        with less than 1 turn within the trained length by `factor`, keeps those with more than
        32, goes over linearly in between, and multiplies scores by (0.1 ln(factor) + 1) ** 2.
    factor: at least 1.
    trained_length: in tokens.
    """

    method: str
    factor: float
    trained_length: int

    def __post_init__(self) -> None:
        if self.method not in ROPE_SCALINGS:
            raise ConfigError(
                f"RopeScaling: method is {self.method!r}. "
                f"{nearest_name(str(self.method), ROPE_SCALINGS)}"
            )
        if not self.factor >= 1:
            raise ConfigError(
                f"RopeScaling: factor is {self.factor!r}; it must be at least 1: how many times "
                "longer than the trained length the texts are."
            )
        if not self.trained_length >= 1:
            raise ConfigError(
                f"RopeScaling: trained_length is {self.trained_length!r}; it must be at least 1 "
                "token. Give the length of the training sequences."
            )


def rope_frequencies(
    head_dim: int, base: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, float]:
    """Frequencies (D / 2,), float64, and what turned queries and keys are multiplied by."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    if scaling is None:
        return base**-exponents, 1.0
    if scaling.method == "ntk":
        raised = base * scaling.factor ** (head_dim / max(head_dim - 2, 1))
        return raised**-exponents, 1.0
    frequencies = base**-exponents
    turns = scaling.trained_length * frequencies / (2 * math.pi)
    kept = ((turns - _SLOW) / (_FAST - _SLOW)).clamp(0.0, 1.0)
    mixed = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return mixed, 0.1 * math.log(scaling.factor) + 1.0
