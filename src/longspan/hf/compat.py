"""Every private name of transformers, torch and accelerate that this package touches.

Seen in transformers 5.17.0 and 5.23.0, torch 2.13, accelerate 1.15. Nothing else in `hf/` reads
an undocumented name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

__all__ = [
    "can_dispatch",
    "context_parallel_reason",
    "get_implementation",
    "mask_parts",
    "set_implementation",
]

# `PretrainedConfig._attn_implementation` is what models read at each call; writing the internal
# attribute sets one config without touching its sub-configs. 5.17 to 5.23.
_INTERNAL = "_attn_implementation_internal"


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


def context_parallel_reason() -> str | None:
    """What says that this process holds only one shard of the sequence; None if nothing does."""
    accelerate_state = sys.modules.get("accelerate.state")
    if accelerate_state is not None:
        shared = accelerate_state.AcceleratorState._shared_state  # accelerate 1.15
        parallelism = shared.get("parallelism_config")
        if getattr(parallelism, "cp_enabled", False):
            return f"accelerate's ParallelismConfig(cp_size={parallelism.cp_size})"
    attention = sys.modules.get(
        "torch.distributed.tensor.experimental._context_parallel._attention"
    )
    # torch 2.13: while `context_parallel` is active, SDPA is one of its replacements.
    swapped = getattr(attention, "_replaced_functions", ())
    if torch.nn.functional.scaled_dot_product_attention in swapped:
        return "torch's context_parallel"
    return None
