"""Stick-breaking attention (arXiv:2410.17980): causal, position-free, order-dependent."""

from .api import (
    StickBreakingOutput,
    stick_breaking_attention,
    stick_breaking_attention_varlen,
    stick_breaking_attention_with_remainder,
)
from .config import StickBreakingConfig
from .state import StickBreakingChunk, StickBreakingState, stick_breaking_attention_chunk
from .stats import StickBreakingStats, stick_breaking_attention_stats

__all__ = [
    "StickBreakingChunk",
    "StickBreakingConfig",
    "StickBreakingOutput",
    "StickBreakingState",
    "StickBreakingStats",
    "stick_breaking_attention",
    "stick_breaking_attention_chunk",
    "stick_breaking_attention_stats",
    "stick_breaking_attention_varlen",
    "stick_breaking_attention_with_remainder",
]
