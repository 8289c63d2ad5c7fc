"""Caches for patched models, bounded where the mechanism streams."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from ..errors import PatchError
from .attention import ROUTE
from .cache_layer import BoundedLayer
from .indexed_layer import IndexedLayer
from .infini_layer import InfiniLayer
from .patching import patch_of

__all__ = ["make_cache"]


def make_cache(model: nn.Module) -> Cache:
    """A cache for a patched model: bounded where the layer's mechanism streams, full elsewhere.

    Args:
        model: a model that `longspan.hf.patch` has patched.

    Returns:
        A transformers `Cache` for `generate(past_key_values=...)` or `model(past_key_values=...)`.
        Patched full-attention layers whose mechanism has a bounded state get a `BoundedLayer`,
        those under Infini-attention an `InfiniLayer`, which holds an `InfiniState`, those that
        index their keys an `IndexedLayer`, which keeps the index; the others what transformers
        would give them (`DynamicLayer`, sliding layers).

    Raises:
        PatchError: the model is not patched.

    Semantics:
        Generation gives what the patched model gives with a full cache, also for padded batches
        and beams. A bounded layer cannot be rolled back once it dropped keys, so assisted
        decoding is refused. In a compiled model it breaks the graph.

    Example:
        >>> with patch(model, WindowConfig(window=512)):
        ...     tokens = model.generate(**inputs, past_key_values=make_cache(model))
    """
    routes = patch_of(model)
    if routes is None:
        raise PatchError(
            "model: it is not patched, so no layer has a bounded state. Call longspan.hf.patch "
            "first, or use transformers' DynamicCache."
        )
    config = next(iter(routes.values()))[0].module.config
    layers = list(DynamicCache(config=config).layers)
    for attention, route in routes.values():
        state: Any = route.mechanism.state_class
        if route.rotation is not None:
            layers[cast(int, attention.module.layer_idx)] = _infini_layer(attention.module, route)
            continue
        if route.reason is not None or attention.is_sliding or not hasattr(state, "kept_keys"):
            continue
        position = cast(int, attention.module.layer_idx)
        if hasattr(state, "index_cache"):
            index = state.index_cache(route.config)
            if index is not None:
                layers[position] = IndexedLayer(index)
            continue
        kept = state.kept_keys(route.config)
        if kept is None:  # these settings need every key
            continue
        layers[position] = BoundedLayer(*kept)
    return Cache(layers=layers)


def _infini_layer(module: nn.Module, route: Any) -> InfiniLayer:
    def active() -> bool:  # a function, so that copies of a cache do not copy the model
        return getattr(module, ROUTE, None) is route

    return InfiniLayer(route.config, active)
