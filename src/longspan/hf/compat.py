"""Every private name of transformers, torch and accelerate that this package touches.

Seen in transformers 5.17.0 and 5.23.0, torch 2.13, accelerate 1.15. Nothing else in `hf/` reads
an undocumented name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..distributed.compat import context_parallel_reason

__all__ = [
    "ROTATE",
    "attention_functions",
    "can_dispatch",
    "context_parallel_reason",
    "get_implementation",
    "mask_functions",
    "mask_parts",
    "set_implementation",
]

# `PretrainedConfig._attn_implementation` is what models read at each call; writing the internal
# attribute sets one config without touching its sub-configs. 5.17 to 5.23.
_INTERNAL = "_attn_implementation_internal"

# Every modeling file with rotary embeddings calls its function by this global name. 5.17 to 5.23.
ROTATE = "apply_rotary_pos_emb"


def get_implementation(config: Any) -> str | None:
    """Name of the attention implementation that models with this config look up."""
    return getattr(config, _INTERNAL, None)


def set_implementation(config: Any, name: str | None) -> None:
    """Set it on this config alone (the public property also writes every sub-config)."""
    setattr(config, _INTERNAL, name)


def can_dispatch(model: nn.Module) -> bool:
    """False if the source of a model's class shows that it never asks the attention interface."""
    check = getattr(type(model), "_can_set_attn_implementation", None)  # 5.17 to 5.23
    return True if check is None else bool(check())


def mask_parts(function: Callable[..., Any]) -> Iterator[str]:
    """Qualified names of the functions that a mask function of `masking_utils` is made of.

    `and_masks(a, b)` and its like are closures over their parts. 5.17 to 5.23.
    """
    yield getattr(function, "__qualname__", repr(function))
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        for part in held if isinstance(held, (tuple, list)) else (held,):
            if callable(part) and not isinstance(part, (type, torch.Tensor)):
                yield from mask_parts(part)


def attention_functions() -> Any:
    """The mapping that models look attention functions up in; items set on it can be deleted."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # 5.17 to 5.23

    return ALL_ATTENTION_FUNCTIONS


def mask_functions() -> Any:
    """The same for mask functions."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # 5.17 to 5.23

    return ALL_MASK_ATTENTION_FUNCTIONS
