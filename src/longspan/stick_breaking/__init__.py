"""Stick-breaking attention (arXiv:2410.17980): causal, position-free, order-dependent."""

from .api import (
    StickBreakingOutput,
    stick_breaking_attention,
    stick_breaking_attention_varlen,
    stick_breaking_attention_with_remainder,
)
from .config import StickBreakingConfig

__all__ = [
    "StickBreakingConfig",
    "StickBreakingOutput",
    "stick_breaking_attention",
    "stick_breaking_attention_varlen",
    "stick_breaking_attention_with_remainder",
]
