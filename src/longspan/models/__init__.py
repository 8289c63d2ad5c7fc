"""Models to measure and to train: registry-shipped weights, folders, and a small transformer.

Names are resolved on first use; the table of models needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .download import DownloadError, fetch
    from .generation import generate
    from .loader import LoadedModel, load
    from .registry import MODELS, ModelInfo, ModelRow, cache_folder, list_models
    from .shipped import shipped_models
    from .stream import StreamReport, TextStream, TransformerStream
    from .text_source import TextSource
    from .transformer import Transformer, TransformerOutput, TransformerState, next_token_loss
    from .transformer_config import TransformerConfig

_LAZY = {
    "DownloadError": "download",
    "LoadedModel": "loader",
    "MODELS": "registry",
    "ModelInfo": "registry",
    "ModelRow": "registry",
    "StreamReport": "stream",
    "TextSource": "text_source",
    "TextStream": "stream",
    "Transformer": "transformer",
    "TransformerConfig": "transformer_config",
    "TransformerOutput": "transformer",
    "TransformerState": "transformer",
    "TransformerStream": "stream",
    "cache_folder": "registry",
    "fetch": "download",
    "generate": "generation",
    "list_models": "registry",
    "load": "loader",
    "next_token_loss": "transformer",
    "shipped_models": "shipped",
}

__all__ = [
    "MODELS",
    "DownloadError",
    "LoadedModel",
    "ModelInfo",
    "ModelRow",
    "StreamReport",
    "TextSource",
    "TextStream",
    "Transformer",
    "TransformerConfig",
    "TransformerOutput",
    "TransformerState",
    "TransformerStream",
    "cache_folder",
    "fetch",
    "generate",
    "list_models",
    "load",
    "next_token_loss",
    "shipped_models",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
