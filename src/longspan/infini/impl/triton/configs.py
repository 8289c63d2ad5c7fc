"""Tile sizes of the Infini-attention kernels. Imports torch only.

Pinned: the same call takes the same tiles, hence gives the same bits.
`benchmarks/infini.py --tune` times others.
"""

from __future__ import annotations

import torch

from ...._triton.launch import KernelConfig, capability

__all__ = [
    "affine_config",
    "delta_bwd_config",
    "major_of",
    "maps_config",
    "memory_bwd_config",
    "mix_bwd_config",
    "mix_config",
    "sums_bwd_config",
    "sums_config",
    "turns_config",
]

# [head dims up to 64, head dims up to 128]
_SUMS = (KernelConfig(0, 32, 4, 2), KernelConfig(0, 32, 8, 2))
_SUMS_BWD = (KernelConfig(8, 64, 4, 2), KernelConfig(8, 32, 8, 1))
_MIX = (KernelConfig(64, 4, 4, 2), KernelConfig(64, 4, 8, 2))
_MIX_BWD = (KernelConfig(64, 4, 4, 1), KernelConfig(32, 8, 8, 1))
_MEMORY_BWD = (KernelConfig(64, 0, 4, 2), KernelConfig(64, 0, 8, 2))
_DELTA_BWD = (KernelConfig(8, 64, 4, 1), KernelConfig(8, 32, 8, 1))
_MAPS = (KernelConfig(0, 64, 4, 2), KernelConfig(0, 32, 8, 2))
_TURNS = (KernelConfig(0, 64, 4, 2), KernelConfig(0, 32, 8, 2))
_AFFINE = (KernelConfig(0, 16, 4, 2), KernelConfig(0, 16, 8, 1))

# Hopper; head dim 128 measured on an H100 (`tune` rows of benchmarks/results/h100-infini-train.jsonl).
# What spills is the fastest all the same: sums_bwd 0.85 ms (40 bytes) against 0.93, mix_bwd 1.45
# (400 bytes) against 1.67 with tiles that spill less.
_HOPPER_SUMS = (KernelConfig(0, 64, 4, 2), KernelConfig(0, 32, 8, 3, 128))
_HOPPER_SUMS_BWD = (KernelConfig(8, 64, 4, 2), KernelConfig(8, 64, 4, 1))
_HOPPER_MIX = (KernelConfig(64, 4, 4, 2), KernelConfig(64, 8, 4, 2))
_HOPPER_MIX_BWD = (KernelConfig(64, 4, 4, 1), KernelConfig(64, 8, 4, 1))
_HOPPER_MEMORY_BWD = (KernelConfig(64, 0, 4, 2), KernelConfig(32, 0, 8, 3))
_HOPPER_DELTA_BWD = (KernelConfig(8, 64, 4, 1), KernelConfig(8, 32, 8, 1))
_HOPPER_MAPS = (KernelConfig(0, 64, 4, 2), KernelConfig(0, 32, 8, 3))
_HOPPER_TURNS = (KernelConfig(0, 64, 4, 2), KernelConfig(0, 64, 4, 2))
_HOPPER_AFFINE = (KernelConfig(0, 32, 4, 2), KernelConfig(0, 32, 8, 3))


def major_of(device: torch.device) -> int:
    """Major compute capability; Hopper's where kernels are interpreted."""
    return capability(device.index or 0)[0] if device.type == "cuda" else 9


def sums_config(dim: int, value_dim: int, dtype: torch.dtype, major: int = 9) -> KernelConfig:
    """block_n: keys of a step."""
    return (_HOPPER_SUMS if major >= 9 else _SUMS)[max(dim, value_dim) > 64]


def sums_bwd_config(dim: int, value_dim: int, dtype: torch.dtype, major: int = 9) -> KernelConfig:
    """block_n: keys of a step; block_m: steps of a program."""
    return (_HOPPER_SUMS_BWD if major >= 9 else _SUMS_BWD)[max(dim, value_dim) > 64]


def mix_config(dim: int, value_dim: int, dtype: torch.dtype, major: int = 9) -> KernelConfig:
    """block_m: rows of a tile; block_n: tiles of a program, to load the memory once."""
    return (_HOPPER_MIX if major >= 9 else _MIX)[max(dim, value_dim) > 64]


def mix_bwd_config(dim: int, value_dim: int, dtype: torch.dtype, major: int = 9) -> KernelConfig:
    """block_m: rows of a tile; block_n: tiles of a program."""
    return (_HOPPER_MIX_BWD if major >= 9 else _MIX_BWD)[max(dim, value_dim) > 64]


def memory_bwd_config(dim: int, value_dim: int, dtype: torch.dtype, major: int = 9) -> KernelConfig:
    """block_m: rows of a step."""
    return (_HOPPER_MEMORY_BWD if major >= 9 else _MEMORY_BWD)[max(dim, value_dim) > 64]


def delta_bwd_config(dim: int, value_dim: int, dtype: torch.dtype, major: int = 9) -> KernelConfig:
    """block_n: keys of a step; block_m: steps of a program."""
    return (_HOPPER_DELTA_BWD if major >= 9 else _DELTA_BWD)[max(dim, value_dim) > 64]


def maps_config(dim: int, major: int = 9) -> KernelConfig:
    """block_n: keys of a step."""
    return (_HOPPER_MAPS if major >= 9 else _MAPS)[dim > 64]


def turns_config(dim: int, major: int = 9) -> KernelConfig:
    """block_n: keys of a step."""
    return (_HOPPER_TURNS if major >= 9 else _TURNS)[dim > 64]


def affine_config(dim: int, major: int = 9) -> KernelConfig:
    """block_n: columns of the memory that a program takes."""
    return (_HOPPER_AFFINE if major >= 9 else _AFFINE)[dim > 64]
