"""Tile sizes of the Infini-attention kernels. Imports torch only.

Pinned: the same call takes the same tiles, hence gives the same bits.
`benchmarks/infini.py --tune` times others.
"""

from __future__ import annotations

import torch

from ...._triton.launch import KernelConfig

__all__ = ["TILES", "mix_bwd_config", "mix_config", "sums_bwd_config", "sums_config"]

TILES = 4  # tiles of rows that one program of the forward mix takes, to load the memory once


def sums_config(dim: int, value_dim: int, dtype: torch.dtype) -> KernelConfig:
    """block_n: keys of a step."""
    wide = max(dim, value_dim) > 64
    if dtype is torch.float32:
        return KernelConfig(0, 32, 8 if wide else 4, 2)
    return KernelConfig(0, 64, 8 if wide else 4, 2)


def sums_bwd_config(dim: int, value_dim: int, dtype: torch.dtype) -> KernelConfig:
    """block_n: keys of a step."""
    wide = max(dim, value_dim) > 64
    if dtype is torch.float32:
        return KernelConfig(0, 32, 8 if wide else 4, 1)
    return KernelConfig(0, 64, 8 if wide else 4, 2)


def mix_config(dim: int, value_dim: int, dtype: torch.dtype) -> KernelConfig:
    """block_m: rows of a tile."""
    wide = max(dim, value_dim) > 64
    if dtype is torch.float32:
        return KernelConfig(32, 0, 8 if wide else 4, 1)
    return KernelConfig(64, 0, 8 if wide else 4, 2)


def mix_bwd_config(dim: int, value_dim: int, dtype: torch.dtype) -> KernelConfig:
    """block_m: rows of a step."""
    wide = max(dim, value_dim) > 64
    if dtype is torch.float32:
        return KernelConfig(16, 0, 8 if wide else 4, 1)
    return KernelConfig(32 if wide else 64, 0, 8 if wide else 4, 1)
