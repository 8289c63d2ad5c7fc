"""`patch`: run the attention layers of a transformers model under a mechanism, and undo it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..errors import LongspanWarning, PatchError
from ..exact.config import ExactConfig
from ..infini.config import InfiniConfig
from ..mechanisms import get_mechanism, mechanism_of_config
from .attention import IMPLEMENTATION, ROUTE, register
from .compat import get_implementation, set_implementation
from .layers import AttentionLayer, attention_layers
from .parameters import add_parameters, remove_parameters
from .plan import LayerPlan, parse_config
from .report import Counts, LayerReport, Route
from .rotation import find_rotations, hand_over
from .verify import verify_dispatch

__all__ = ["Patch", "make_patch", "patch", "patch_of"]

_ADVICE = {
    "stick_breaking": (
        " Positions that the model adds itself (rotary) stay: take them out with "
        "longspan.hf.without_positions(model), in training and in use."
    ),
    "infini": " Inputs of one segment stay as they are; longspan.hf.convert_infini says more.",
}


def patch(
    model: nn.Module,
    config: Any = None,
    layers: str | int | Iterable[int] | Mapping[Any, Any] = "all",
    *,
    verify: bool = True,
    **settings: Any,
) -> Patch:
    """Run attention layers of a transformers model under a mechanism.

    In a `with` statement the patch is undone at its end, also after an exception. Without one it
    stays until `undo()`.

    Args:
        model: a decoder-only transformers model, also wrapped by peft.
        config: settings of a mechanism (`WindowConfig(window=512)`), a string
            ("window:window=512"), or a `LayerPlan`. None if `layers` is a mapping.
        layers: "all" (the full-attention layers; sliding-window layers are exact and cheap
            already), "global" (the same), "every" (sliding-window layers, too), "first:4",
            "last:10" (of the full-attention layers), an index, a list of indices, or a mapping
            from such selections to settings, of which the later one holds where two overlap.
        verify: run two tokens through the model and count the calls. Set it to False only for
            models that need more than `input_ids`.
        **settings: keyword arguments of every call of the mechanism: `seed=0`, `impl="eager"`.

    Returns:
        Patch: the report (`print` it), a context manager, and `undo()`.

    Raises:
        ConfigError: unknown settings or selection.
        PatchError: no attention layers, none selected, already patched, an encoder-decoder, or a
            model that does not ask transformers' attention interface.
        UnsupportedError: the check found something that cannot be honoured.

    Warns:
        LongspanWarning: the mechanism means nothing to a model that was trained with softmax
            attention.

    Semantics:
        Layers left alone run exact attention with everything the model asks for (sliding
        windows, padding, packed documents). What a call cannot honour raises UnsupportedError.

    Example:
        >>> with patch(model, WindowConfig(window=512), layers="last:1") as report:
        ...     logits = model(input_ids).logits
        >>> report.visited_fraction < 1
        True
    """
    applied = make_patch(model, config, layers, verify=verify, settings=settings)
    _warn_untrained(LayerPlan(configs=applied.plan.configs))
    return applied


def make_patch(
    model: nn.Module, config: Any, layers: Any, *, verify: bool, settings: dict[str, Any]
) -> Patch:
    """`patch` without its warning."""
    found = attention_layers(model)
    if any(hasattr(layer.module, ROUTE) for layer in found):
        raise PatchError(
            "model: it is patched already, and patches do not stack. Undo the first one, or give "
            "one patch a mapping: layers={'first:4': config_a, 'last:4': config_b}."
        )
    if isinstance(config, str):
        config = parse_config(config)
    sliding = [layer.order for layer in found if layer.is_sliding]
    if isinstance(config, LayerPlan):
        plan = LayerPlan.build(dict(config.configs), None, len(found), sliding)
    else:
        plan = LayerPlan.build(layers, config, len(found), sliding)
    if not plan.configs:
        raise PatchError(
            f"layers: {layers!r} selects none of the {len(found)} attention layers, of which "
            f"{len(sliding)} have a sliding window. Use layers='every' or name indices."
        )
    return Patch(model, found, plan, settings, verify)


class Patch:
    """A patched model: report, context manager and undo in one. Made by `patch`.

    Attributes:
        plan: layer index -> settings of the patched layers.
        settings: keyword arguments of every call.
        active: False after `undo`.
    """

    def __init__(
        self,
        model: nn.Module,
        found: list[AttentionLayer],
        plan: LayerPlan,
        settings: dict[str, Any],
        verify: bool,
    ) -> None:
        self.plan = plan
        self.settings = settings
        self.active = True
        self.model = model
        self._found = found
        self._routes = [_route(layer, plan, settings) for layer in found]
        self._before = [(c, get_implementation(c)) for c in _configs(found)]
        self._hooks: list[Any] = []
        self._frozen: list[nn.Parameter] = []
        register()
        try:
            for layer, route in zip(found, self._routes, strict=True):
                object.__setattr__(layer.module, ROUTE, route)
                if route.reason is None:
                    add_parameters(layer, route)
            self._find_rotations()
            for config, _ in self._before:
                set_implementation(config, IMPLEMENTATION)
            if verify:
                verify_dispatch(model, self._routes)
        except BaseException:
            self.undo()
            raise
        self.reset_counts()

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """One report for each attention layer, patched or left alone."""
        return tuple(LayerReport.of(route) for route in self._routes)

    @property
    def approximate_calls(self) -> int:
        """Calls of all layers that computed something else than exact attention."""
        return sum(layer.approximate_calls for layer in self.layers)

    @property
    def exact_calls(self) -> int:
        """Calls of all layers that were exact."""
        return sum(layer.exact_calls for layer in self.layers)

    @property
    def compiled_calls(self) -> int:
        """Calls inside compiled graphs, not part of the other two."""
        return sum(layer.compiled_calls for layer in self.layers)

    @property
    def visited_fraction(self) -> float | None:
        """Share of the visible scores that the patched layers computed; None before any call."""
        counts = [route.counts for route in self._routes if route.reason is None]
        visible = sum(count.visible for count in counts)
        return sum(count.visited for count in counts) / visible if visible else None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        from .plan import config_to_dict

        rows = []
        for layer in self.layers:
            row = {name: getattr(layer, name) for name in layer.__dataclass_fields__}
            row["config"] = config_to_dict(layer.config)["settings"]
            rows.append(row)
        return {
            "layers": rows,
            "approximate_calls": self.approximate_calls,
            "exact_calls": self.exact_calls,
            "compiled_calls": self.compiled_calls,
            "visited_fraction": self.visited_fraction,
        }

    def reset_counts(self) -> None:
        """Start counting again."""
        for layer, route in zip(self._found, self._routes, strict=True):
            parameter = next(layer.module.parameters(), None)
            device = torch.device("cpu") if parameter is None else parameter.device
            route.counts = Counts(compiled=torch.zeros((), dtype=torch.int64, device=device))

    def freeze(self) -> None:
        """Train what the patch added (gates) and nothing else; `undo` thaws the rest."""
        added = {
            id(getattr(layer.module, name))
            for route, layer in self._pairs()
            for name in route.parameters.values()
        }
        for parameter in self.model.parameters():
            if parameter.requires_grad and id(parameter) not in added:
                parameter.requires_grad_(False)
                self._frozen.append(parameter)

    def undo(self) -> None:
        """Put everything back. Calling it again does nothing."""
        if not self.active:
            return
        self.active = False
        for hook in self._hooks:
            hook.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        for config, name in self._before:
            if get_implementation(config) == IMPLEMENTATION:
                set_implementation(config, name)
        for layer, route in zip(self._found, self._routes, strict=True):
            remove_parameters(layer, route)
            layer.module.__dict__.pop(ROUTE, None)

    def _pairs(self) -> list[tuple[Route, AttentionLayer]]:
        return list(zip(self._routes, self._found, strict=True))

    def _find_rotations(self) -> None:
        """Layers whose mechanism needs plain queries and keys: learn how the model turns them."""
        plain = [(route, layer) for route, layer in self._pairs() if _needs_plain(route)]
        if not plain:
            return
        rotations = find_rotations(self.model, [layer for _, layer in plain])
        for route, layer in plain:
            route.rotation = rotations[layer.order]
            if route.rotation.function is not None:
                hook = layer.module.register_forward_pre_hook(hand_over, with_kwargs=True)
                self._hooks.append(hook)

    def __enter__(self) -> Patch:
        if not self.active:
            raise PatchError("patch: it was undone already. Call longspan.hf.patch again.")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        rows = [("layer", "attention", "approximate", "exact", "compiled", "visited", "module")]
        for layer in self.layers:
            share = layer.visited_fraction
            rows.append((
                str(layer.layer), layer.mechanism, str(layer.approximate_calls),
                str(layer.exact_calls), str(layer.compiled_calls),
                "-" if share is None else f"{100 * share:.1f} %",
                layer.name + (f" ({layer.reason})" if layer.reason else ""),
            ))  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        return "\n".join(
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]])
            for row in rows
        )


def patch_of(model: nn.Module) -> dict[int, tuple[AttentionLayer, Route]] | None:
    """Layer index -> (layer, route) of a patched model; None if it is not patched."""
    routes = {
        layer.order: (layer, getattr(layer.module, ROUTE))
        for layer in attention_layers(model)
        if hasattr(layer.module, ROUTE)
    }
    return routes or None


def _warn_untrained(plan: LayerPlan) -> None:
    for mechanism in {mechanism_of_config(c).name: c for c in plan.configs.values()}:
        if not get_mechanism(mechanism).on_pretrained:
            warnings.warn(
                f"patch: {mechanism} is not an approximation of softmax attention; a model that "
                "was trained with softmax gives meaningless text under it until it is trained "
                f"again.{_ADVICE.get(mechanism, '')}",
                LongspanWarning,
                stacklevel=3,
            )


def _needs_plain(route: Route) -> bool:
    """Whether the mechanism wants queries and keys without positions beside the rotated ones."""
    return route.reason is None and isinstance(route.config, InfiniConfig)


def _route(layer: AttentionLayer, plan: LayerPlan, settings: dict[str, Any]) -> Route:
    if layer.order in plan.configs:
        config = plan.configs[layer.order]
        return Route.to(
            mechanism_of_config(config), config, layer=layer.order, name=layer.name,
            settings=settings,
        )  # fmt: skip
    reason = "sliding window" if layer.is_sliding else "not selected"
    return Route.to(
        get_mechanism("exact"), ExactConfig(), layer=layer.order, name=layer.name, reason=reason
    )


def _configs(found: list[AttentionLayer]) -> list[Any]:
    """The distinct config objects of the layers; configs are not hashable."""
    return list({id(layer.module.config): layer.module.config for layer in found}.values())
