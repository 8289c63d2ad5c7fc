"""Tile sizes of the window kernels, by head dim, dtype and shared memory. Imports torch only.

Short pinned lists: the first entry runs, the others are what `benchmarks/window.py --tune` times.
"""

from __future__ import annotations

import torch

from ...._triton.launch import KernelConfig, interpreting

__all__ = [
    "SINK_TILE",
    "forward_configs",
    "key_configs",
    "query_configs",
    "shared_class",
    "sink_config",
]

SINK_TILE = 16  # columns of a tile of sinks: the least that the matrix units take
SINK_ROWS = 2048  # queries whose sink gradients one program sums up

_LARGE, _MEDIUM = 200 * 1024, 150 * 1024

# (shared memory class, columns of the widest tile) -> configurations, for half precision.
_FORWARD = {
    ("large", 64): (KernelConfig(128, 64, 4, 3), KernelConfig(128, 128, 8, 3)),
    ("large", 128): (KernelConfig(128, 64, 8, 3), KernelConfig(128, 128, 8, 2)),
    ("large", 256): (KernelConfig(128, 64, 8, 2), KernelConfig(64, 64, 4, 2)),
    ("medium", 64): (KernelConfig(128, 64, 4, 3),),
    ("medium", 128): (KernelConfig(128, 64, 8, 3),),
    ("medium", 256): (KernelConfig(64, 32, 4, 2),),
    ("small", 64): (KernelConfig(64, 64, 4, 2),),
    ("small", 128): (KernelConfig(64, 32, 4, 2),),
    ("small", 256): (KernelConfig(32, 16, 4, 2),),
}
_QUERY = {
    ("large", 64): (KernelConfig(128, 64, 8, 3),),
    ("large", 128): (KernelConfig(128, 64, 8, 2),),
    ("large", 256): (KernelConfig(64, 32, 8, 2),),
    ("medium", 64): (KernelConfig(128, 64, 8, 2),),
    ("medium", 128): (KernelConfig(64, 64, 4, 2),),
    ("medium", 256): (KernelConfig(64, 32, 8, 1),),
    ("small", 64): (KernelConfig(64, 64, 4, 2),),
    ("small", 128): (KernelConfig(64, 32, 4, 1),),
    ("small", 256): (KernelConfig(32, 16, 4, 1),),
}
# block_m: queries of the inner loop; block_n: keys of the program.
_KEY = {
    ("large", 64): (KernelConfig(64, 128, 8, 3),),
    ("large", 128): (KernelConfig(64, 128, 8, 2),),
    ("large", 256): (KernelConfig(32, 64, 8, 2),),
    ("medium", 64): (KernelConfig(64, 128, 8, 2),),
    ("medium", 128): (KernelConfig(32, 128, 8, 2),),
    ("medium", 256): (KernelConfig(32, 64, 8, 1),),
    ("small", 64): (KernelConfig(32, 64, 4, 2),),
    ("small", 128): (KernelConfig(32, 64, 4, 1),),
    ("small", 256): (KernelConfig(16, 32, 4, 1),),
}
# float32 runs on the ordinary arithmetic units: small tiles, or the registers spill.
_SINGLE = {
    64: KernelConfig(64, 32, 4, 2),
    128: KernelConfig(32, 32, 4, 1),
    256: KernelConfig(32, 16, 8, 1),
}
_SINGLE_BACKWARD = {
    64: KernelConfig(32, 32, 4, 1),
    128: KernelConfig(32, 32, 8, 1),
    256: KernelConfig(16, 16, 8, 1),
}


def shared_class(device: torch.device) -> str:
    """ "large" (H100 and later data centre), "medium" (A100) or "small" (other) shared memory."""
    if interpreting():
        return "large"
    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return "large" if limit > _LARGE else "medium" if limit > _MEDIUM else "small"


def forward_configs(
    dim: int, value_dim: int, dtype: torch.dtype, shared: str
) -> tuple[KernelConfig, ...]:
    """Forward kernel."""
    width = _width(dim, value_dim)
    return (_SINGLE[width],) if dtype is torch.float32 else _FORWARD[shared, width]


def query_configs(
    dim: int, value_dim: int, dtype: torch.dtype, shared: str
) -> tuple[KernelConfig, ...]:
    """Kernel of the gradient of query."""
    width = _width(dim, value_dim)
    return (_SINGLE_BACKWARD[width],) if dtype is torch.float32 else _QUERY[shared, width]


def key_configs(
    dim: int, value_dim: int, dtype: torch.dtype, shared: str
) -> tuple[KernelConfig, ...]:
    """Kernel of the gradients of key and value."""
    width = _width(dim, value_dim)
    return (_SINGLE_BACKWARD[width],) if dtype is torch.float32 else _KEY[shared, width]


def sink_config(dim: int, value_dim: int, dtype: torch.dtype) -> KernelConfig:
    """Kernel of the sinks' share of the gradients of key and value."""
    wide = _width(dim, value_dim) == 256
    rows = 16 if dtype is torch.float32 and wide else 32 if wide else 64
    return KernelConfig(rows, SINK_TILE, 4, 1 if dtype is torch.float32 or wide else 2)


def _width(dim: int, value_dim: int) -> int:
    widest = max(dim, value_dim)
    return 64 if widest <= 64 else 128 if widest <= 128 else 256
