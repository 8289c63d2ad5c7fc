"""Take a model's position embeddings out: stick-breaking reads order from order.

Rotary embeddings become the identity and learned position vectors become zero, inside a block and
by hooks, so that no weight is touched. Private names: transformers 5.17 calls rotary modules
`...RotaryEmbedding` (they return cos and sin) and learned tables `wpe`, `embed_positions` or
`position_embeddings`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LongspanWarning

__all__ = ["LEARNED", "PositionReport", "without_positions"]

LEARNED = ("wpe", "embed_positions", "position_embeddings")


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionReport:
    """Names of the modules that are neutralised."""

    rotary: tuple[str, ...]
    learned: tuple[str, ...]


@contextmanager
def without_positions(model: nn.Module) -> Iterator[PositionReport]:
    """Context in which a transformers model knows no positions; undone on exit.

    For a model that is trained with a position-free mechanism, in training and in use:

        with without_positions(model), patch(model, StickBreakingConfig()):
            ...

    Keys in a cache then carry no position, so that dropping or reordering old ones is exact.

    Args:
        model: a transformers model with rotary or learned absolute positions.

    Yields:
        PositionReport: what was found.

    Warns:
        LongspanWarning: nothing was found; the model has no positions, or has them in a form that
            is not known here (ALiBi, relative biases).

    Example:
        >>> from longspan.testing.models import tiny_model
        >>> with without_positions(tiny_model("llama").model) as report:
        ...     print(report.rotary)
        ('model.rotary_emb',)
    """
    modules = dict(model.named_modules())
    rotary = {n: m for n, m in modules.items() if type(m).__name__.endswith("RotaryEmbedding")}
    learned = {
        n: m
        for n, m in modules.items()
        if isinstance(m, nn.Embedding) and n.rpartition(".")[2] in LEARNED
    }
    if not rotary and not learned:
        warnings.warn(
            f"without_positions: {type(model).__name__} has no rotary and no learned position "
            "embedding that is known here. If it has none, leave this block out; if it has others "
            "(ALiBi, relative biases), they stay.",
            LongspanWarning,
            stacklevel=3,
        )
    handles = [m.register_forward_hook(_no_rotation) for m in rotary.values()]
    handles += [m.register_forward_hook(_zero) for m in learned.values()]
    try:
        yield PositionReport(rotary=tuple(rotary), learned=tuple(learned))
    finally:
        for handle in handles:
            handle.remove()


def _no_rotation(module: nn.Module, inputs: Any, output: Any) -> tuple[Tensor, Tensor]:
    cos, sin = output
    return torch.ones_like(cos), torch.zeros_like(sin)


def _zero(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)
