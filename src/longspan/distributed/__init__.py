"""Context parallelism: one sequence over several ranks, on torch.distributed.

Split a sequence with `SequenceLayout`, run attention with `ring_attention`, `ulysses_attention`,
`infini_attention_across_ranks` or `hyper_attention_across_ranks`, sum the loss with `global_mean`.
Names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .clusters import hyper_attention_across_ranks
    from .exchange import gather_sequence
    from .group import ContextGroup
    from .layout import LAYOUT_KINDS, SequenceLayout, Span
    from .ring import (
        ring_attention,
        ring_attention_varlen,
        ring_attention_with_lse,
        ring_attention_with_remainder,
    )
    from .sharding import (
        IGNORED,
        ShardedBatch,
        global_mean,
        next_token_targets,
        shard_batch,
    )
    from .spread import SCHEMES, attend_across_ranks, spread_transformer
    from .state_passing import infini_attention_across_ranks
    from .ulysses import ulysses_attention, ulysses_attention_varlen

_LAZY = {
    "gather_sequence": "exchange",
    "hyper_attention_across_ranks": "clusters",
    "infini_attention_across_ranks": "state_passing",
    "ContextGroup": "group",
    "LAYOUT_KINDS": "layout",
    "SequenceLayout": "layout",
    "Span": "layout",
    "ring_attention": "ring",
    "ring_attention_varlen": "ring",
    "ring_attention_with_lse": "ring",
    "ring_attention_with_remainder": "ring",
    "IGNORED": "sharding",
    "ShardedBatch": "sharding",
    "global_mean": "sharding",
    "next_token_targets": "sharding",
    "shard_batch": "sharding",
    "SCHEMES": "spread",
    "attend_across_ranks": "spread",
    "spread_transformer": "spread",
    "ulysses_attention": "ulysses",
    "ulysses_attention_varlen": "ulysses",
}

__all__ = [
    "IGNORED",
    "LAYOUT_KINDS",
    "SCHEMES",
    "ContextGroup",
    "SequenceLayout",
    "ShardedBatch",
    "Span",
    "attend_across_ranks",
    "gather_sequence",
    "global_mean",
    "hyper_attention_across_ranks",
    "infini_attention_across_ranks",
    "next_token_targets",
    "ring_attention",
    "ring_attention_varlen",
    "ring_attention_with_lse",
    "ring_attention_with_remainder",
    "shard_batch",
    "spread_transformer",
    "ulysses_attention",
    "ulysses_attention_varlen",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
