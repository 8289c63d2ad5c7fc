"""Hugging Face integration: run a transformers model under a mechanism, and undo it.

Names are resolved on first use. Needs the extra `hf` (transformers >= 5.17, < 6).
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError

if importlib.util.find_spec("transformers") is None:
    raise MissingExtraError.for_module("longspan.hf", "transformers", "hf")

if TYPE_CHECKING:
    from .across_ranks import context_parallel
    from .attention import IMPLEMENTATION, register
    from .cache import make_cache
    from .cache_file import load_cache, save_cache
    from .checkpoint import load_adapter, save_adapter
    from .convert import convert_infini
    from .patching import Patch, patch
    from .plan import LayerPlan, format_config, parse_config
    from .positions import PositionReport, without_positions
    from .report import LayerReport
    from .stream import PatchedStream

_LAZY = {
    "IMPLEMENTATION": "attention",
    "register": "attention",
    "make_cache": "cache",
    "load_cache": "cache_file",
    "save_cache": "cache_file",
    "context_parallel": "across_ranks",
    "convert_infini": "convert",
    "load_adapter": "checkpoint",
    "save_adapter": "checkpoint",
    "Patch": "patching",
    "patch": "patching",
    "LayerPlan": "plan",
    "format_config": "plan",
    "parse_config": "plan",
    "LayerReport": "report",
    "PatchedStream": "stream",
    "PositionReport": "positions",
    "without_positions": "positions",
}

__all__ = [
    "IMPLEMENTATION",
    "LayerPlan",
    "LayerReport",
    "Patch",
    "PatchedStream",
    "PositionReport",
    "context_parallel",
    "convert_infini",
    "format_config",
    "load_adapter",
    "load_cache",
    "make_cache",
    "parse_config",
    "patch",
    "register",
    "save_adapter",
    "save_cache",
    "without_positions",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
