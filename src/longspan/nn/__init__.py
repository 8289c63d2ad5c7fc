"""Thin modules that own parameters and call the functions; one file per mechanism."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chunked_mlp import ChunkedMLP
    from .stick_breaking import StickBreakingAttention

_LAZY = {"ChunkedMLP": "chunked_mlp", "StickBreakingAttention": "stick_breaking"}

__all__ = ["ChunkedMLP", "StickBreakingAttention"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
