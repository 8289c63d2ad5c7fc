"""What a patched model did: one row per attention layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..mechanisms import Mechanism

__all__ = ["Counts", "LayerReport", "Route"]


@dataclass(eq=False)
class Counts:
    """Calls of one layer and the scores they computed, of the scores that causality lets see."""

    approximate: int = 0
    exact: int = 0
    visited: float = 0.0
    visible: float = 0.0
    compiled: Tensor | None = None  # calls inside compiled graphs, counted on the device

    def add(self, lengths: tuple[tuple[int, int], ...], route: Route) -> None:
        """Count one call over causal sequences of (queries, keys), aligned at their ends."""
        visited = visible = 0.0
        for n_q, n_k in lengths:
            offset = n_k - n_q
            low = max(-offset, 0)  # rows before this one see no key
            seen = (n_q - low) * (offset + low + 1 + n_k) / 2
            fraction = route.visited_fraction(
                route.config, n_q, n_k, is_causal=True, query_offset=offset
            )
            visible += seen
            visited += fraction * seen
        changes = not route.mechanism.is_exact and (
            visited < visible or not route.mechanism.on_pretrained
        )
        if changes:
            self.approximate += 1
        else:
            self.exact += 1
        self.visited += visited
        self.visible += visible


@dataclass(eq=False)
class Route:
    """Where the dispatcher sends one attention layer.

    layer: index among the attention layers. name: the module's path in the model.
    function, function_varlen, visited_fraction: resolved once, so that tracing sees plain
        functions. function_varlen is None where the mechanism has none.
    settings: keyword arguments of every call. parameters: keyword -> attribute of the module.
    reason: why the layer was left alone, or None if it is patched.
    rotation: how the layer turns queries and keys, for a mechanism that needs them without
        positions (`rotation.Rotation`); None for all others.
    """

    layer: int
    name: str
    mechanism: Mechanism
    config: Any
    function: Callable[..., Any]
    function_varlen: Callable[..., Any] | None
    visited_fraction: Callable[..., float]
    settings: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    reason: str | None = None
    rotation: Any = None
    counts: Counts = field(default_factory=Counts)

    @classmethod
    def to(cls, mechanism: Mechanism, config: Any, **rest: Any) -> Route:
        """A route to `mechanism`."""
        return cls(
            mechanism=mechanism,
            config=config,
            function=mechanism.function,
            function_varlen=mechanism.function_varlen if mechanism.has_varlen else None,
            visited_fraction=mechanism.visited_fraction,
            **rest,
        )

    def arguments(self, module: nn.Module) -> dict[str, Any]:
        """Keyword arguments of a call: config, settings and the layer's own parameters."""
        owned = {key: getattr(module, name) for key, name in self.parameters.items()}
        return {"config": self.config, **self.settings, **owned}

    def count(self, lengths: tuple[tuple[int, int], ...]) -> None:
        """Count a call; inside a compiled graph, as an addition on the device."""
        if not torch.compiler.is_compiling():
            self.counts.add(lengths, self)
        elif self.counts.compiled is not None:
            self.counts.compiled.add_(1)


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One attention layer of a patched model.

    layer, name: index among the attention layers, path of the module.
    mechanism, config: what runs there; "exact" where the layer was left alone.
    reason: why it was left alone; None if it was patched.
    approximate_calls: calls that computed something else than exact attention.
    exact_calls: calls that were exact, also those of a patched layer whose settings cover all keys.
    compiled_calls: calls inside compiled graphs, of whichever kind; not part of the other counts.
    visited_fraction: share of the visible scores that the counted calls computed; None before
        the first call.
    """

    layer: int
    name: str
    mechanism: str
    config: Any
    reason: str | None
    approximate_calls: int
    exact_calls: int
    compiled_calls: int
    visited_fraction: float | None

    @classmethod
    def of(cls, route: Route) -> LayerReport:
        """The report on a route."""
        counts = route.counts
        return cls(
            layer=route.layer,
            name=route.name,
            mechanism=route.mechanism.name,
            config=route.config,
            reason=route.reason,
            approximate_calls=counts.approximate,
            exact_calls=counts.exact,
            compiled_calls=0 if counts.compiled is None else int(counts.compiled),
            visited_fraction=counts.visited / counts.visible if counts.visible else None,
        )
