"""Thin modules that own parameters and call the functions; one file per mechanism."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chunked_mlp import ChunkedMLP
    from .infini import InfiniAttention, gate_parameter_groups, gate_statistics
    from .stick_breaking import StickBreakingAttention
    from .toeplitz import ToeplitzAttention

_LAZY = {
    "ChunkedMLP": "chunked_mlp",
    "InfiniAttention": "infini",
    "StickBreakingAttention": "stick_breaking",
    "ToeplitzAttention": "toeplitz",
    "gate_parameter_groups": "infini",
    "gate_statistics": "infini",
}

__all__ = [
    "ChunkedMLP",
    "InfiniAttention",
    "StickBreakingAttention",
    "ToeplitzAttention",
    "gate_parameter_groups",
    "gate_statistics",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
