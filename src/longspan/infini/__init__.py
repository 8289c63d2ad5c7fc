"""Infini-attention (arXiv:2404.07143): local attention and a compressive memory of all before."""

from .api import (
    InfiniOutput,
    infini_attention,
    infini_attention_chunk,
    infini_attention_varlen,
    initial_parameters,
)
from .config import InfiniConfig
from .state import InfiniState

__all__ = [
    "InfiniConfig",
    "InfiniOutput",
    "InfiniState",
    "infini_attention",
    "infini_attention_chunk",
    "infini_attention_varlen",
    "initial_parameters",
]
