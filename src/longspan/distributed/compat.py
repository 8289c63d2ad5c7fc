"""Private names of torch and accelerate that this package relies on, each with its version."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["context_parallel_reason", "default_store"]


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


def default_store() -> Any:
    """The key-value store that `init_process_group` met at. torch 2.11 to 2.13."""
    return dist.distributed_c10d._get_default_store()
