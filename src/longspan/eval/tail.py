"""Loss on a fixed tail given more or less context: what distant text is worth to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from .scoring import Progress, SplitModel, as_input_ids, token_losses
from .statistics import standard_error

__all__ = ["TailResult", "tail_loss"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TailResult:
    """Mean loss on the tail, given `context` tokens before it.

    loss: nats per token of the tail. standard_error: of `loss`, taking tokens as independent.
    """

    context: int
    tail: int
    loss: float
    standard_error: float


def tail_loss(
    model: Any,
    token_ids: Sequence[int] | Tensor,
    *,
    context: int,
    tail: int = 256,
    progress: Progress | None = None,
) -> TailResult:
    """Mean loss on the last `tail` tokens of a document, given the `context` tokens before them.

    The scored tokens are the same for every `context`, so that results compare directly: the fall
    of the loss with growing context is what the model gains from distant text.

    Args:
        model: causal language model of transformers, or a `SplitModel` of one; patched or not.
        token_ids: the document; the tail is at its end.
        context: tokens read before the tail, 1 or more.
        tail: scored tokens.
        progress: called with shares of the work, which add up to 1.

    Raises:
        ConfigError: context or tail < 1, or the document is shorter than both together.
    """
    if context < 1 or tail < 1:
        name, came = ("context", context) if context < 1 else ("tail", tail)
        raise ConfigError(
            f"{name}: {came} came. Allowed: 1 or more. Pass a positive number of tokens."
        )
    split = model if isinstance(model, SplitModel) else SplitModel(model)
    ids = as_input_ids(token_ids, split.device)
    if ids.shape[1] < context + tail:
        raise ConfigError(
            f"context: {context} came, but the text has {ids.shape[1]} tokens, {tail} of them the "
            f"tail. Allowed: at most {ids.shape[1] - tail}. Pass a longer text or less context."
        )
    losses = token_losses(split, ids[:, -(context + tail) :], progress=progress)[-tail:]
    return TailResult(
        context=context,
        tail=tail,
        loss=float(losses.mean()),
        standard_error=standard_error(losses.tolist()),
    )
