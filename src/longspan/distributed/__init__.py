"""Context parallelism: one sequence over several ranks, on torch.distributed.

Split a sequence with `SequenceLayout`, run attention with `ring_attention`, `ulysses_attention` or
`infini_attention_across_ranks`, sum the loss with `global_mean`. Names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exchange import gather_sequence
    from .group import ContextGroup
    from .layout import LAYOUT_KINDS, SequenceLayout, Span
    from .ring import (
        ring_attention,
        ring_attention_varlen,
        ring_attention_with_lse,
        ring_attention_with_remainder,
    )
    from .ulysses import ulysses_attention, ulysses_attention_varlen

_LAZY = {
    "gather_sequence": "exchange",
    "ContextGroup": "group",
    "LAYOUT_KINDS": "layout",
    "SequenceLayout": "layout",
    "Span": "layout",
    "ring_attention": "ring",
    "ring_attention_varlen": "ring",
    "ring_attention_with_lse": "ring",
    "ring_attention_with_remainder": "ring",
    "ulysses_attention": "ulysses",
    "ulysses_attention_varlen": "ulysses",
}

__all__ = [
    "LAYOUT_KINDS",
    "ContextGroup",
    "SequenceLayout",
    "Span",
    "gather_sequence",
    "ring_attention",
    "ring_attention_varlen",
    "ring_attention_with_lse",
    "ring_attention_with_remainder",
    "ulysses_attention",
    "ulysses_attention_varlen",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
