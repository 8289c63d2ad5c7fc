"""Find the attention layers of a transformers model."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from ..errors import PatchError
from .compat import can_dispatch

__all__ = ["AttentionLayer", "attention_layers"]


class AttentionLayer(NamedTuple):
    """One attention layer.

    order: 0 for the first attention layer of the model, and so on.
    name: path of the module in the model.
    is_sliding: the model itself lets it see only a window or a chunk of the keys.
    """

    order: int
    name: str
    module: nn.Module
    is_sliding: bool


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The causal self-attention layers, in order.

    A layer is a module with an integer `layer_idx`, a `config`, and Attention in its class name.

    Raises:
        PatchError: there are none, the model is an encoder-decoder, or it never asks
            transformers' attention interface.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise PatchError(
            f"model: {type(model).__name__} is an encoder-decoder; only decoder-only models are "
            "supported, because its cross attention is not causal. Use longspan.patched_sdpa."
        )
    modules = [(name, m) for name, m in model.named_modules() if _is_attention(m)]
    outer = {id(m) for _, m in modules if any(_is_attention(c) for c in m.modules() if c is not m)}
    modules = [(name, m) for name, m in modules if id(m) not in outer]
    modules.sort(key=lambda pair: pair[1].layer_idx)
    if not modules:
        raise PatchError(
            f"model: {type(model).__name__} has no attention layers that longspan knows: modules "
            "named *Attention* with a layer_idx and a config. Pass a transformers decoder model; "
            "for others, longspan.patched_sdpa reaches every call of torch's SDPA."
        )
    for owner in model.modules():
        if any(m.config is getattr(owner, "config", None) for _, m in modules):
            _check_owner(owner)
    return [AttentionLayer(i, name, m, _is_sliding(m)) for i, (name, m) in enumerate(modules)]


def _is_attention(module: nn.Module) -> bool:
    index = getattr(module, "layer_idx", None)
    return (
        isinstance(index, int)
        and "Attention" in type(module).__name__
        and getattr(module, "config", None) is not None
    )


def _check_owner(owner: nn.Module) -> None:
    if not can_dispatch(owner):
        raise PatchError(
            f"model: the source of {type(owner).__name__} never asks transformers' attention "
            "interface, so a patch would be ignored. Use longspan.patched_sdpa if it calls "
            "torch's SDPA, or an implementation of the model that uses the interface."
        )


def _is_sliding(module: Any) -> bool:
    types = getattr(module.config, "layer_types", None)
    if types is not None and module.layer_idx < len(types):
        return bool(types[module.layer_idx] != "full_attention")
    if hasattr(module, "sliding_window"):
        return module.sliding_window is not None
    return getattr(module.config, "sliding_window", None) is not None
