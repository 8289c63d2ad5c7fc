"""HyperAttention: softmax attention that visits far keys only where an index finds large scores."""

from .api import hyper_attention, hyper_attention_varlen, hyper_attention_with_lse
from .config import HyperConfig
from .state import HyperChunk, HyperState, hyper_attention_chunk
from .stats import HyperStats, hardness

__all__ = [
    "HyperChunk",
    "HyperConfig",
    "HyperState",
    "HyperStats",
    "hardness",
    "hyper_attention",
    "hyper_attention_chunk",
    "hyper_attention_varlen",
    "hyper_attention_with_lse",
]
