"""Parameters that a mechanism adds to a layer, such as a gate for each head."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import PatchError
from .layers import AttentionLayer
from .report import Route

__all__ = ["PREFIX", "add_parameters", "remove_parameters"]

PREFIX = "longspan_"


def add_parameters(layer: AttentionLayer, route: Route) -> None:
    """Give the attention module the parameters that its mechanism learns, in float32.

    `Mechanism.initial_parameters` names them: keyword of the mechanism's function -> tensor.
    """
    if not route.mechanism.has_parameters:
        return
    heads, kv_heads, head_dim = _shape(layer.module)
    initial = route.mechanism.initial_parameters(
        route.config, heads=heads, kv_heads=kv_heads, head_dim=head_dim
    )
    device = next(layer.module.parameters()).device
    for keyword, value in initial.items():
        name = PREFIX + keyword
        if hasattr(layer.module, name):
            raise PatchError(
                f"model: {layer.name} has an attribute {name!r} already, which the patch would "
                "replace. Rename it."
            )
        layer.module.register_parameter(name, nn.Parameter(value.float().to(device)))
        route.parameters[keyword] = name


def remove_parameters(layer: AttentionLayer, route: Route) -> None:
    """Take them away again."""
    for name in route.parameters.values():
        layer.module._parameters.pop(name, None)


def _shape(module: Any) -> tuple[int, int, int]:
    config = module.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(module, "head_dim", None) or config.hidden_size // heads
    return heads, kv_heads, head_dim
