"""HyperAttention: softmax attention that visits far keys only where an index finds large scores."""

from .api import hyper_attention, hyper_attention_varlen, hyper_attention_with_lse
from .config import HyperConfig

__all__ = [
    "HyperConfig",
    "hyper_attention",
    "hyper_attention_varlen",
    "hyper_attention_with_lse",
]
