"""Save and load the bounded cache of a patched model: a prefix, a request, a stream."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from .._state import load_state, save_state
from ..errors import ConfigError, PatchError
from ..infini.state import InfiniState
from .cache import make_cache
from .cache_layer import BoundedLayer
from .infini_layer import InfiniLayer
from .patching import patch_of
from .plan import config_to_dict

__all__ = ["cache_parts", "describe", "load_cache", "restore_cache", "save_cache"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Header:
    model: str  # type and layers, as JSON


def save_cache(model: nn.Module, cache: Cache, path: str | os.PathLike[str]) -> None:
    """Write a bounded cache as one safetensors file, which appears whole or not at all.

    Args:
        model: the patched model that the cache was made for.
        cache: of `make_cache(model)`, used or not.
        path: target file.

    Raises:
        PatchError: the model is not patched.
        ConfigError: a layer of the cache keeps all keys.

    Example:
        >>> with convert_infini(model, segment_length=16):
        ...     cache = make_cache(model)
        ...     _ = model(input_ids=input_ids[:, :32], past_key_values=cache)
        ...     save_cache(model, cache, "prefix.safetensors")
        ...     load_cache(model, "prefix.safetensors").get_seq_length()
        32
    """
    header = _Header(model=describe(model))
    save_state(path, "Cache", header, *cache_parts(cache))


def load_cache(model: nn.Module, path: str | os.PathLike[str]) -> Cache:
    """Read what `save_cache` wrote, onto the device of the model.

    Raises:
        FileNotFoundError: no such file.
        PatchError: the model is not patched.
        ConfigError: no cache, or one of another model, other layers or other settings.
    """
    header = _Header(model=describe(model))
    tensors, numbers = load_state(path, "Cache", header)
    return restore_cache(model, tensors, numbers)


def describe(model: Any) -> str:
    """Type of a patched model and the settings of its layers, as JSON."""
    routes = patch_of(model)
    if routes is None:
        raise PatchError("model: it is not patched, so it has no bounded cache. Patch it first.")
    layers = [config_to_dict(route.config) for _, route in routes.values()]
    kind = getattr(model.config, "model_type", type(model).__name__)
    return json.dumps({"model_type": kind, "layers": layers}, sort_keys=True)


def cache_parts(cache: Cache) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors and numbers of a bounded cache, by layer.

    Raises:
        ConfigError: a layer keeps all keys.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, int] = {}
    for index, layer in enumerate(cache.layers):
        own = _parts(index, layer)
        tensors |= {f"{index}.{name}": tensor for name, tensor in own[0].items()}
        numbers |= {f"{index}.{name}": number for name, number in own[1].items()}
    return tensors, numbers


def restore_cache(
    model: nn.Module, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]
) -> Cache:
    """A cache for a patched model with what `cache_parts` gave."""
    cache = make_cache(model)
    device = next(model.parameters()).device
    for index, layer in enumerate(cache.layers):
        prefix = f"{index}."
        _restore(
            layer,
            {n.removeprefix(prefix): t.to(device)
             for n, t in tensors.items() if n.startswith(prefix)},
            {n.removeprefix(prefix): i for n, i in numbers.items() if n.startswith(prefix)},
        )  # fmt: skip
    return cache


def _parts(index: int, layer: Any) -> tuple[dict[str, Tensor], dict[str, int]]:
    if isinstance(layer, InfiniLayer):
        tensors: dict[str, Tensor] = {}
        numbers = {"seen": layer.seen, "states": len(layer.states)}
        for row, state in enumerate(layer.states):
            own = state.parts()
            tensors |= {f"{row}.{name}": tensor for name, tensor in own[0].items()}
            numbers |= {f"{row}.{name}": number for name, number in own[1].items()}
        return tensors, numbers
    if isinstance(layer, BoundedLayer):
        held = {"columns": layer.columns} if layer.is_initialized else {}
        return {**_keys(layer), **held}, {"seen": layer.seen}
    if isinstance(layer, DynamicSlidingWindowLayer):
        return _keys(layer), {"seen": layer.cumulative_length}
    raise ConfigError(
        f"cache: layer {index} is a {type(layer).__name__}, which keeps the keys of the whole "
        "text. Allowed: caches of make_cache for models whose full-attention layers all run "
        "Infini-attention or a window. Convert all layers."
    )


def _keys(layer: Any) -> dict[str, Tensor]:
    return {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}


def _restore(layer: Any, tensors: dict[str, Tensor], numbers: dict[str, int]) -> None:
    if isinstance(layer, InfiniLayer):
        states = []
        for row in range(numbers["states"]):
            prefix = f"{row}."
            states.append(InfiniState.from_parts(
                layer.config,
                {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)},
                {n.removeprefix(prefix): i for n, i in numbers.items() if n.startswith(prefix)},
            ))  # fmt: skip
        if states:
            layer.lazy_initialization(states[0].key, states[0].value)
        layer.put(tuple(states))
        layer.seen = numbers["seen"]
        return
    if "keys" in tensors:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]
    if isinstance(layer, BoundedLayer):
        layer.columns = tensors.get("columns", layer.columns)
        layer.seen = numbers["seen"]
    else:
        layer.cumulative_length = numbers["seen"]
