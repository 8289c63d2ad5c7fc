"""Train the reference transformer on local texts: tokens, batches, loop, checkpoints, log.

Names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batches import IGNORED, Batches
    from .config import TrainConfig
    from .loop import TrainResult, train
    from .tokenizer import load_tokenizer, train_tokenizer
    from .tokens import TokenFile, write_tokens
    from .trained import TrainedModel, load_trained, with_settings

_LAZY = {
    "IGNORED": "batches",
    "Batches": "batches",
    "TokenFile": "tokens",
    "TrainConfig": "config",
    "TrainResult": "loop",
    "TrainedModel": "trained",
    "load_tokenizer": "tokenizer",
    "load_trained": "trained",
    "train": "loop",
    "train_tokenizer": "tokenizer",
    "with_settings": "trained",
    "write_tokens": "tokens",
}

__all__ = [
    "IGNORED",
    "Batches",
    "TokenFile",
    "TrainConfig",
    "TrainResult",
    "TrainedModel",
    "load_tokenizer",
    "load_trained",
    "train",
    "train_tokenizer",
    "with_settings",
    "write_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
