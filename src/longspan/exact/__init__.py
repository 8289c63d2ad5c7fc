"""Exact softmax attention behind the common contract."""

from .api import exact_attention, exact_attention_varlen, exact_attention_with_lse
from .config import ExactConfig

__all__ = [
    "ExactConfig",
    "exact_attention",
    "exact_attention_varlen",
    "exact_attention_with_lse",
]
