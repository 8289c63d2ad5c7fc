"""Random numbers as a pure function of (seed, stream, index): no hidden state.

A value depends only on the seed, the name of its stream and its own index, so it is the same on
every device and rank, for every batch slot and padding, and a rank that owns heads 4 .. 7 draws
exactly the numbers that one process draws for them (`offset`). Bits come from three rounds of a
32-bit integer mixer with full avalanche; they pass for statistics, not for cryptography.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from .errors import ConfigError

__all__ = [
    "first_head_of",
    "integers",
    "normal",
    "permutation",
    "random_bits",
    "seed_of_heads",
    "uniform",
]

_MASK = 0xFFFFFFFF
_MARK, _HEAD_SHIFT = 1 << 62, 48  # of seeds that carry a head


def seed_of_heads(seed: int, first_head: int) -> int:
    """One int for a seed and the index of the first head that draws from it.

    A rank that owns heads 4 .. 7 then draws their numbers, through operators whose schema has one
    seed. `first_head_of` takes it apart.

    Raises:
        ConfigError: first_head is not 0, and seed is not in 0 .. 2**48 - 1 or first_head too large.
    """
    if first_head == 0:
        return seed
    if not 0 <= seed < 1 << _HEAD_SHIFT or not 0 < first_head < 1 << (62 - _HEAD_SHIFT):
        raise ConfigError(
            f"seed is {seed} with head_offset {first_head}; with an offset the seed must lie in "
            f"0 .. 2**{_HEAD_SHIFT} - 1 and the offset below 2**{62 - _HEAD_SHIFT}. Use a smaller "
            "seed."
        )
    return _MARK | first_head << _HEAD_SHIFT | seed


def first_head_of(seed: int) -> tuple[int, int]:
    """(seed, first head) of what `seed_of_heads` made; (seed, 0) of any other seed below 2**62."""
    if seed < _MARK:
        return seed, 0
    return seed & ((1 << _HEAD_SHIFT) - 1), (seed & (_MARK - 1)) >> _HEAD_SHIFT


def random_bits(
    seed: int,
    stream: str,
    shape: tuple[int, ...],
    *,
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """int64, uniform 32-bit integers; element i of the flat tensor has index offset + i."""
    count = math.prod(shape)
    index = torch.arange(offset, offset + count, dtype=torch.int64, device=device)
    mixed = _mix(index & _MASK)
    mixed = _mix(mixed ^ ((index >> 32) & _MASK) ^ (zlib.crc32(stream.encode()) & _MASK))
    mixed = _mix(mixed ^ (seed & _MASK))
    return _mix(mixed ^ ((seed >> 32) & _MASK)).reshape(shape)


def uniform(
    seed: int,
    stream: str,
    shape: tuple[int, ...],
    *,
    offset: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform in (0, 1), never exactly 0 or 1; resolution 2**-32 before rounding to `dtype`."""
    bits = random_bits(seed, stream, shape, offset=offset, device=device)
    unit = (bits.double() + 0.5) * 2.0**-32
    return unit.clamp(max=1.0 - torch.finfo(dtype).eps).to(dtype)


def normal(
    seed: int,
    stream: str,
    shape: tuple[int, ...],
    *,
    offset: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal (Box-Muller in float64, then rounded to `dtype`)."""
    radius = uniform(
        seed, stream + "/radius", shape, offset=offset, device=device, dtype=torch.float64
    )
    angle = uniform(
        seed, stream + "/angle", shape, offset=offset, device=device, dtype=torch.float64
    )
    return (torch.sqrt(-2.0 * torch.log(radius)) * torch.cos(2.0 * math.pi * angle)).to(dtype)


def integers(
    seed: int,
    stream: str,
    shape: tuple[int, ...],
    high: int,
    *,
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """int64, uniform over 0 .. high - 1 for high <= 2**31 (bias below high * 2**-32)."""
    bits = random_bits(seed, stream, shape, offset=offset, device=device)
    return (bits * high) >> 32


def permutation(
    seed: int, stream: str, count: int, *, device: torch.device | str = "cpu"
) -> Tensor:
    """int64 (count,): a random order of 0 .. count - 1; ties are broken by index."""
    return torch.argsort(random_bits(seed, stream, (count,), device=device), stable=True)


def _mix(bits: Tensor) -> Tensor:
    """A bijection on 32-bit integers with full avalanche (multiply, xor-shift)."""
    bits = (bits ^ (bits >> 16)) & _MASK
    bits = (bits * 0x7FEB352D) & _MASK
    bits = bits ^ (bits >> 15)
    bits = (bits * 0x846CA68B) & _MASK
    return bits ^ (bits >> 16)
