"""Tile sizes of HyperAttention's kernels, by head dim, dtype and shared memory. Imports torch only.

Pinned, not tuned at run time: the same call takes the same tiles, hence gives the same bits, on
every run. `benchmarks/hyper.py --tune` times others.
"""

from __future__ import annotations

import torch

from ...._triton.launch import KernelConfig, interpreting

__all__ = [
    "DELTA_ROWS",
    "KINDS",
    "SAMPLE_RUN",
    "SEGMENT",
    "SUM_ROWS",
    "config_of",
    "hash_config",
    "shared_class",
]

DELTA_ROWS = 64
SEGMENT = 512  # rows that one program hashes and sorts
SAMPLE_RUN = 4096  # queries whose gradients to the samples one program sums up
SUM_ROWS = 16  # samples that one program of the sum over runs adds up

_LARGE = 200 * 1024

# kernel -> columns of the widest tile -> (block_m, block_n, warps, stages) for half precision on
# an H100 ("large" shared memory). In key kernels block_m counts queries of the inner loop.
_HOPPER = {
    "node": {64: (64, 128, 4, 3), 128: (64, 32, 4, 3), 256: (64, 32, 8, 2)},
    "leaf": {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 64, 8, 2)},
    "node_query": {64: (64, 32, 4, 3), 128: (64, 32, 4, 3), 256: (64, 16, 8, 2)},
    "leaf_query": {64: (64, 64, 4, 3), 128: (128, 32, 8, 3), 256: (32, 32, 8, 2)},
    "node_key": {64: (32, 64, 4, 3), 128: (32, 64, 4, 3), 256: (32, 32, 8, 2)},
    "leaf_key": {64: (64, 64, 4, 3), 128: (64, 128, 8, 2), 256: (32, 32, 8, 2)},
    "sample_key": {64: (64, 64, 4, 3), 128: (64, 128, 8, 2), 256: (32, 32, 8, 2)},
}
# Ampere: chosen by registers and shared memory, see resources.json.
_AMPERE = {
    "node": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 1)},
    "leaf": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
    "node_query": {64: (64, 32, 4, 2), 128: (64, 32, 4, 1), 256: (32, 16, 4, 1)},
    "leaf_query": {64: (64, 64, 8, 2), 128: (64, 32, 4, 1), 256: (32, 16, 4, 1)},
    "node_key": {64: (32, 64, 4, 2), 128: (32, 64, 4, 1), 256: (32, 32, 8, 1)},
    "leaf_key": {64: (32, 64, 4, 2), 128: (32, 64, 8, 1), 256: (32, 32, 8, 2)},
    "sample_key": {64: (32, 64, 4, 2), 128: (32, 64, 4, 1), 256: (32, 32, 8, 1)},
}
# float32 runs on the ordinary arithmetic units: small tiles, or the registers spill. Beyond 128
# columns every tile spills.
_SINGLE = {
    "node": {64: (32, 32, 8, 1), 128: (32, 16, 8, 1)},
    "leaf": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1)},
    "node_query": {64: (32, 32, 8, 1), 128: (16, 16, 4, 1)},
    "leaf_query": {64: (16, 16, 4, 1), 128: (16, 16, 8, 1)},
    "node_key": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1)},
    "leaf_key": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1)},
    "sample_key": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1)},
}
KINDS = tuple(_HOPPER)


def shared_class(device: torch.device) -> str:
    """ "large" (H100 and later data centre) or "small" (other) shared memory."""
    if interpreting():
        return "large"
    properties = torch.cuda.get_device_properties(device)
    limit = getattr(properties, "shared_memory_per_block_optin")  # noqa: B009 (absent in its stub)
    return "large" if limit > _LARGE else "small"


def config_of(kind: str, dim: int, value_dim: int, dtype: torch.dtype, shared: str) -> KernelConfig:
    """Configuration of the kernel `kind`, one of KINDS."""
    widest = max(dim, value_dim)
    width = 64 if widest <= 64 else 128 if widest <= 128 else 256
    if dtype is torch.float32:
        return KernelConfig(*_SINGLE[kind][width])
    return KernelConfig(*(_HOPPER if shared == "large" else _AMPERE)[kind][width])


def hash_config(dim: int, dtype: torch.dtype) -> KernelConfig:
    """Hash kernel: rows at a time, rows of a segment."""
    if dtype is torch.float32 or dim > 128:
        return KernelConfig(32, SEGMENT, 8, 1)
    return KernelConfig(32, SEGMENT, 4, 3) if dim <= 64 else KernelConfig(64, SEGMENT, 4, 2)
