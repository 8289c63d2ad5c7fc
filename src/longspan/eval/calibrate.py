"""Which layers to change: the harm that each does alone, and the time that it saves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..exact.api import exact_attention
from .scoring import SplitModel, agreement, as_input_ids, token_losses

__all__ = ["Calibration", "LayerCost", "calibrate", "loss_curve", "order_layers", "within_budget"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCost:
    """One layer under the mechanism, all others exact.

    layer: index among the attention layers.
    harm: mean Kullback-Leibler divergence of the next-token distribution from the exact model's,
        nats per token.
    exact_ms, changed_ms: time of the layer's attention on the calibration texts, exact and changed.
    """

    layer: int
    harm: float
    exact_ms: float
    changed_ms: float

    @property
    def saved_ms(self) -> float:
        """Milliseconds saved; negative where exact attention is faster."""
        return self.exact_ms - self.changed_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Costs of all full-attention layers; the exact model's mean loss, nats per token."""

    costs: tuple[LayerCost, ...]
    exact_loss: float


def calibrate(
    model: Any,
    documents: Sequence[Sequence[int] | Tensor],
    config: Any,
    *,
    progress: Callable[[float], None] | None = None,
) -> Calibration:
    """Patch one full-attention layer after the other and compare what the model predicts.

    Args:
        model: causal language model of transformers, not patched.
        documents: token ids of a few texts, of the length the plan is for.
        config: settings of a mechanism.
        progress: called with shares of the work, which add up to 1.

    Returns:
        Calibration. Times are of this device, after one untimed call of each.

    Raises:
        ConfigError: no documents.

    Cost:
        One forward pass per layer and document, and two more; logits of one document in memory.
    """
    from ..hf import patch
    from ..hf.layers import attention_layers

    if not documents:
        raise ConfigError("documents: none came. Allowed: one or more texts. Pass a longer text.")
    split = SplitModel(model)
    layers = [layer for layer in attention_layers(model) if not layer.is_sliding]
    harm = dict.fromkeys((layer.order for layer in layers), 0.0)
    spent = {layer.order: [0.0, 0.0] for layer in layers}
    loss, share = 0.0, 1.0 / (len(documents) * len(layers))
    for document in documents:
        ids = as_input_ids(document, split.device)
        exact = split.hidden(ids)
        loss += float(token_losses(split, ids).mean()) / len(documents)
        for layer in layers:
            with patch(model, config, layers=[layer.order], verify=False):
                clock = _Clock(layer.module)
                changed = split.hidden(ids)
            harm[layer.order] += agreement(split, ids, exact, changed).kl / len(documents)
            for i, ms in enumerate((clock.exact_ms, clock.changed_ms)):
                spent[layer.order][i] += ms
            if progress:
                progress(share)
    costs = tuple(
        LayerCost(layer=i, harm=harm[i], exact_ms=spent[i][0], changed_ms=spent[i][1]) for i in harm
    )
    return Calibration(costs=costs, exact_loss=loss)


def order_layers(costs: Sequence[LayerCost]) -> list[LayerCost]:
    """By harm per millisecond saved, least first; then what saves nothing, by harm."""
    saving = [cost for cost in costs if cost.saved_ms > 0]
    rest = [cost for cost in costs if cost.saved_ms <= 0]
    return [
        *sorted(saving, key=lambda cost: (cost.harm / cost.saved_ms, cost.layer)),
        *sorted(rest, key=lambda cost: (cost.harm, cost.layer)),
    ]


def within_budget(ordered: Sequence[LayerCost], budget: float) -> list[LayerCost]:
    """The longest start of the order whose harms add up to at most `budget` nats per token."""
    kept: list[LayerCost] = []
    total = 0.0
    for cost in ordered:
        total += cost.harm
        if total > budget:
            break
        kept.append(cost)
    return kept


def loss_curve(
    model: Any,
    documents: Sequence[Sequence[int] | Tensor],
    config: Any,
    ordered: Sequence[LayerCost],
    counts: Sequence[int],
) -> list[tuple[int, float]]:
    """(number of changed layers, mean loss in nats per token), layers taken in order."""
    from ..hf import patch

    split = SplitModel(model)
    curve = []
    for count in counts:
        losses = []
        for document in documents:
            ids = as_input_ids(document, split.device)
            if count:
                with patch(model, config, layers=[c.layer for c in ordered[:count]], verify=False):
                    losses.append(float(token_losses(split, ids).mean()))
            else:
                losses.append(float(token_losses(split, ids).mean()))
        curve.append((count, sum(losses) / len(losses)))
    return curve


class _Clock:
    """Times a patched layer's own call, and exact attention on the same inputs."""

    def __init__(self, module: Any) -> None:
        from ..hf.attention import ROUTE

        self.exact_ms = self.changed_ms = 0.0
        route = getattr(module, ROUTE)

        def timed(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **settings: Any) -> Any:
            common = {
                name: settings[name]
                for name in ("is_causal", "query_offset", "scale", "enable_gqa")
            }
            self.exact_ms += _time(lambda: exact_attention(query, key, value, **common))
            self.changed_ms += _time(lambda: route.function(query, key, value, *rest, **settings))
            return route.function(query, key, value, *rest, **settings)

        setattr(module, ROUTE, replace(route, function=timed))


def _time(function: Callable[[], Any]) -> float:
    """Milliseconds of the second of two calls."""
    function()
    _wait()
    start = time.perf_counter()
    function()
    _wait()
    return 1e3 * (time.perf_counter() - start)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
