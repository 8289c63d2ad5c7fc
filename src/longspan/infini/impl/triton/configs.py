"""Tile sizes of the Infini-attention kernels. Imports torch only.

Pinned: the same call takes the same tiles, hence gives the same bits.
`benchmarks/infini.py --tune` times others.
"""

from __future__ import annotations

import torch

from ...._triton.launch import KernelConfig, capability

__all__ = [
    "TILES",
    "major_of",
    "memory_bwd_config",
    "mix_bwd_config",
    "mix_config",
    "sums_bwd_config",
    "sums_config",
]

TILES = 4  # tiles of rows that one program of the forward mix takes, to load the memory once


# [head dims up to 64, head dims up to 128]
_SUMS = (KernelConfig(0, 64, 4, 2), KernelConfig(0, 32, 8, 2))
_SUMS_BWD = (KernelConfig(0, 64, 4, 2), KernelConfig(0, 32, 4, 1))
_MIX = (KernelConfig(64, 0, 4, 2), KernelConfig(64, 0, 8, 2))
_MIX_BWD = (KernelConfig(64, 0, 4, 1), KernelConfig(32, 0, 8, 1))
_MEMORY_BWD = (KernelConfig(32, 0, 4, 2), KernelConfig(64, 0, 8, 2))

# Hopper, head dim 128: four warps spill 88 and 48 bytes a thread and are faster all the same, 0.395
# against 0.698 ms and 0.449 against 0.638 ms (n = 32768, 32 heads).
_HOPPER_SUMS, _HOPPER_MIX = KernelConfig(0, 64, 4, 2), KernelConfig(64, 0, 4, 2)


def major_of(device: torch.device) -> int:
    """Major compute capability; Hopper's where kernels are interpreted."""
    return capability(device.index or 0)[0] if device.type == "cuda" else 9


def sums_config(dim: int, value_dim: int, dtype: torch.dtype, major: int = 9) -> KernelConfig:
    """block_n: keys of a step."""
    if major >= 9:
        return _HOPPER_SUMS
    return _SUMS[max(dim, value_dim) > 64]


def sums_bwd_config(dim: int, value_dim: int, dtype: torch.dtype) -> KernelConfig:
    """block_n: keys of a step."""
    return _SUMS_BWD[max(dim, value_dim) > 64]


def mix_config(dim: int, value_dim: int, dtype: torch.dtype, major: int = 9) -> KernelConfig:
    """block_m: rows of a tile."""
    if major >= 9:
        return _HOPPER_MIX
    return _MIX[max(dim, value_dim) > 64]


def mix_bwd_config(dim: int, value_dim: int, dtype: torch.dtype) -> KernelConfig:
    """block_m: rows of a tile."""
    return _MIX_BWD[max(dim, value_dim) > 64]


def memory_bwd_config(dim: int, value_dim: int, dtype: torch.dtype) -> KernelConfig:
    """block_m: rows of a step."""
    return _MEMORY_BWD[max(dim, value_dim) > 64]
