"""Tile sizes of the window kernels, by head dim, dtype and shared memory. Imports torch only.

Pinned, not tuned at run time: the same call takes the same tiles, hence gives the same bits, on
every run. `benchmarks/window.py --tune` times others.
"""

from __future__ import annotations

import functools

import torch

from ...._triton.launch import KernelConfig, interpreting

__all__ = [
    "ROW_PARTS",
    "SINK_ROWS",
    "SINK_TILE",
    "forward_config",
    "key_config",
    "query_config",
    "shared_class",
    "sink_config",
    "sink_rows",
]

ROW_PARTS = 8  # partial sums a row keeps until its end: one for each column of a matrix unit's tile
SINK_TILE = 16  # columns of a tile of sinks: the least that the matrix units take
SINK_ROWS = 2048  # queries whose sink gradients one program sums up, for up to 64 sinks

_LARGE, _MEDIUM = 200 * 1024, 150 * 1024

# (shared memory class, columns of the widest tile) -> configurations, for half precision. Measured
# on an H100 (large); the others are chosen by registers and shared memory, see resources.json.
_FORWARD = {
    ("large", 64): KernelConfig(64, 64, 4, 3),
    ("large", 128): KernelConfig(128, 32, 8, 4, 128, True),
    ("large", 256): KernelConfig(64, 64, 8, 2),
    ("medium", 64): KernelConfig(64, 64, 4, 3),
    ("medium", 128): KernelConfig(64, 32, 4, 2),
    ("medium", 256): KernelConfig(64, 32, 8, 2),
    ("small", 64): KernelConfig(64, 64, 4, 2),
    ("small", 128): KernelConfig(64, 32, 4, 2),
    ("small", 256): KernelConfig(64, 32, 8, 2),
}
# The same where the tensor memory accelerator loads the tiles: no address is held in registers.
_FORWARD_TMA = {
    64: KernelConfig(64, 64, 4, 2, 128, False, True),
    128: KernelConfig(128, 64, 8, 2, 128, False, True),
}
_QUERY = {
    ("large", 64): KernelConfig(64, 64, 4, 3),
    ("large", 128): KernelConfig(64, 64, 4, 2),
    ("large", 256): KernelConfig(64, 16, 8, 2),
    ("medium", 64): KernelConfig(64, 32, 4, 2),
    ("medium", 128): KernelConfig(64, 64, 4, 2),
    ("medium", 256): KernelConfig(64, 32, 8, 1),
    ("small", 64): KernelConfig(64, 32, 4, 2),
    ("small", 128): KernelConfig(64, 32, 4, 1),
    ("small", 256): KernelConfig(32, 16, 4, 1),
}
_QUERY_TMA = {
    64: KernelConfig(64, 64, 4, 3, is_tma=True),
    128: KernelConfig(64, 64, 4, 2, is_tma=True),
}
# block_m: queries of the inner loop; block_n: keys of the program. One loop: all tiles are masked.
_KEY = {
    ("large", 64): KernelConfig(64, 64, 4, 2, None, True),
    ("large", 128): KernelConfig(32, 128, 8, 2, None, True),
    ("large", 256): KernelConfig(32, 32, 8, 2, None, True),
    ("medium", 64): KernelConfig(32, 64, 4, 2, None, True),
    ("medium", 128): KernelConfig(32, 64, 4, 1, None, True),
    ("medium", 256): KernelConfig(32, 32, 8, 2, None, True),
    ("small", 64): KernelConfig(32, 64, 4, 2, None, True),
    ("small", 128): KernelConfig(32, 64, 4, 1, None, True),
    ("small", 256): KernelConfig(32, 32, 8, 2, None, True),
}
_KEY_TMA = {
    64: KernelConfig(64, 64, 4, 2, None, False, True),
    128: KernelConfig(64, 64, 4, 2, None, True, True),
}
# float32 runs on the ordinary arithmetic units: small tiles, or the registers spill. Beyond 128
# columns every tile spills; api.py refuses those.
_SINGLE_FORWARD = {
    64: KernelConfig(32, 32, 8, 1),
    128: KernelConfig(32, 16, 8, 1),
}
_SINGLE_QUERY = {
    64: KernelConfig(32, 32, 4, 1),
    128: KernelConfig(16, 16, 8, 1),
}
_SINGLE_KEY = {
    64: KernelConfig(32, 32, 8, 1, None, True),
    128: KernelConfig(16, 16, 8, 1, None, True),
}


def shared_class(device: torch.device) -> str:
    """ "large" (H100 and later data centre), "medium" (A100) or "small" (other) shared memory."""
    return "large" if interpreting() else _class_of(device)


@functools.cache  # a call takes 5 us
def _class_of(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    limit = getattr(properties, "shared_memory_per_block_optin")  # noqa: B009 (absent in its stub)
    return "large" if limit > _LARGE else "medium" if limit > _MEDIUM else "small"


def forward_config(
    dim: int, value_dim: int, dtype: torch.dtype, shared: str, is_tma: bool = False
) -> KernelConfig:
    """Forward kernel; is_tma: the tensor memory accelerator can load its tiles."""
    width = _width(dim, value_dim)
    if is_tma and width in _FORWARD_TMA:
        return _FORWARD_TMA[width]
    return _SINGLE_FORWARD[width] if dtype is torch.float32 else _FORWARD[shared, width]


def query_config(
    dim: int, value_dim: int, dtype: torch.dtype, shared: str, is_tma: bool = False
) -> KernelConfig:
    """Kernel of the gradient of query."""
    width = _width(dim, value_dim)
    if is_tma and width in _QUERY_TMA:
        return _QUERY_TMA[width]
    return _SINGLE_QUERY[width] if dtype is torch.float32 else _QUERY[shared, width]


def key_config(
    dim: int, value_dim: int, dtype: torch.dtype, shared: str, is_tma: bool = False
) -> KernelConfig:
    """Kernel of the gradients of key and value."""
    width = _width(dim, value_dim)
    if is_tma and width in _KEY_TMA:
        return _KEY_TMA[width]
    return _SINGLE_KEY[width] if dtype is torch.float32 else _KEY[shared, width]


def sink_config(dim: int, value_dim: int, dtype: torch.dtype) -> KernelConfig:
    """Kernel of the sinks' share of the gradients of key and value."""
    if dtype is torch.float32:
        return KernelConfig(16, SINK_TILE, 4, 1)
    wide = _width(dim, value_dim) == 256
    return KernelConfig(32, SINK_TILE, 4, 1) if wide else KernelConfig(64, SINK_TILE, 4, 2)


def sink_rows(num_sinks: int) -> int:
    """Queries whose sink gradients one program sums up: more for many sinks, to bound the memory.

    A function of the settings alone, so that the order of the sums does not depend on the length.
    """
    rows = SINK_ROWS
    while rows * 64 < SINK_ROWS * num_sinks and rows < 2**19:
        rows *= 2
    return rows


def _width(dim: int, value_dim: int) -> int:
    widest = max(dim, value_dim)
    return 64 if widest <= 64 else 128 if widest <= 128 else 256
