"""Models to measure and to train: registry-shipped weights, folders, and a small transformer.

Names are resolved on first use; the table of models needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .download import DownloadError, fetch
    from .loader import LoadedModel, load
    from .registry import MODELS, ModelInfo, ModelRow, cache_folder, list_models

_LAZY = {
    "DownloadError": "download",
    "LoadedModel": "loader",
    "MODELS": "registry",
    "ModelInfo": "registry",
    "ModelRow": "registry",
    "cache_folder": "registry",
    "fetch": "download",
    "list_models": "registry",
    "load": "loader",
}

__all__ = [
    "MODELS",
    "DownloadError",
    "LoadedModel",
    "ModelInfo",
    "ModelRow",
    "cache_folder",
    "fetch",
    "list_models",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
