"""Sliding-window attention with attention sinks."""

from .api import (
    WindowOutput,
    window_attention,
    window_attention_chunk,
    window_attention_varlen,
    window_attention_with_lse,
)
from .config import WindowConfig
from .state import WindowState

__all__ = [
    "WindowConfig",
    "WindowOutput",
    "WindowState",
    "window_attention",
    "window_attention_chunk",
    "window_attention_varlen",
    "window_attention_with_lse",
]
