"""Small types shared by all mechanisms."""

from __future__ import annotations

import enum
from typing import NamedTuple

from torch import Tensor

__all__ = ["AttentionOutput", "Impl", "ImplReport"]


class Impl(enum.StrEnum):
    """How a mechanism is computed. Switching it never changes results beyond rounding."""

    AUTO = "auto"
    REFERENCE = "reference"
    EAGER = "eager"
    TRITON = "triton"


class AttentionOutput(NamedTuple):
    """A partial result of softmax attention over a set of keys.

    output: (B, H, N_q, D_v); zero in rows that see no key.
    lse: (B, H, N_q), float32 (float64 for float64 inputs): natural log of the sum of
        exponentiated scores; -inf in rows that see no key. Differentiable.
    """

    output: Tensor
    lse: Tensor


class ImplReport(NamedTuple):
    """Whether one implementation can run a call: `refusal` is None if it can, else the reason."""

    impl: Impl
    refusal: str | None = None
    note: str = ""
