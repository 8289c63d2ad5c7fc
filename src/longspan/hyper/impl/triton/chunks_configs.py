"""Tile sizes of the kernels of the default mode (chunks), as in `configs.py`. Imports torch only."""

from __future__ import annotations

import torch

from ...._triton.launch import KernelConfig

__all__ = ["CHUNK_KINDS", "JOIN_ROWS", "chunks_config"]

JOIN_ROWS = 16

# kernel -> columns of the widest tile -> (block_m, block_n, warps, stages).
# choose, near: queries and keys (or clusters) of a tile. opened: queries of a list, keys.
_HOPPER = {
    "choose": {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 4, 2)},
    "near": {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
    "opened": {64: (64, 16, 4, 1), 128: (64, 16, 4, 1), 256: (32, 16, 4, 1)},
    "near_query": {64: (64, 64, 4, 3), 128: (128, 32, 8, 3), 256: (32, 32, 8, 2)},
    "near_key": {64: (64, 64, 4, 3), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2)},
    "column": {64: (64, 64, 4, 3), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2)},
    "opened_bwd": {64: (64, 16, 4, 1), 128: (32, 16, 4, 1), 256: (32, 16, 8, 1)},
}
_AMPERE = {
    "choose": {64: (64, 64, 4, 2), 128: (32, 32, 4, 2), 256: (32, 32, 4, 1)},
    "near": {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 1)},
    "opened": {64: (64, 16, 4, 1), 128: (64, 16, 4, 1), 256: (32, 16, 4, 1)},
    "near_query": {64: (64, 32, 4, 2), 128: (64, 32, 8, 1), 256: (32, 16, 4, 1)},
    "near_key": {64: (32, 64, 4, 2), 128: (32, 64, 8, 1), 256: (32, 32, 8, 1)},
    "column": {64: (32, 64, 4, 2), 128: (32, 64, 8, 1), 256: (32, 32, 8, 1)},
    "opened_bwd": {64: (32, 16, 4, 1), 128: (32, 16, 4, 1), 256: (32, 16, 4, 1)},
}
_SINGLE = {
    "choose": {64: (32, 16, 4, 1), 128: (16, 16, 4, 1)},
    "near": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1)},
    "opened": {64: (32, 16, 4, 1), 128: (16, 16, 4, 1)},
    "near_query": {64: (16, 16, 8, 1), 128: (16, 16, 8, 1)},
    "near_key": {64: (16, 16, 8, 1), 128: (16, 16, 8, 1)},
    "column": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1)},
    "opened_bwd": {64: (16, 16, 4, 1), 128: (16, 16, 8, 1)},
}
CHUNK_KINDS = tuple(_HOPPER)


def chunks_config(
    kind: str, dim: int, value_dim: int, dtype: torch.dtype, shared: str
) -> KernelConfig:
    """Configuration of the kernel `kind`, one of CHUNK_KINDS."""
    widest = max(dim, value_dim)
    width = 64 if widest <= 64 else 128 if widest <= 128 else 256
    if dtype is torch.float32:
        return KernelConfig(*_SINGLE[kind][width])
    return KernelConfig(*(_HOPPER if shared == "large" else _AMPERE)[kind][width])
