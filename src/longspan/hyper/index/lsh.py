"""Sign hashes in Gray-code order (sortLSH): neighbours in the order differ in one hash bit."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..._random import first_head_of, normal

__all__ = ["draw_projections", "gray_rank", "sign_codes"]


def draw_projections(
    seed: int, kv_heads: int, head_dim: int, count: int, device: torch.device | str
) -> Tensor:
    """(H_kv, D, count) float32, standard normal: one set of planes for each key/value head."""
    if torch.compiler.is_compiling():
        return _draw(seed, kv_heads, head_dim, count, device)
    with torch.inference_mode(False):  # what is kept must serve training as well
        return _kept(seed, kv_heads, head_dim, count, torch.device(device))


def _draw(
    seed: int, kv_heads: int, head_dim: int, count: int, device: torch.device | str
) -> Tensor:
    seed, first_head = first_head_of(seed)
    offset = first_head * head_dim * count
    shape = (kv_heads, head_dim, count)
    return normal(seed, "hyper/projections", shape, offset=offset, device=device)


_kept = functools.lru_cache(maxsize=32)(_draw)  # a hundred small launches otherwise


def sign_codes(x: Tensor, projections: Tensor) -> Tensor:
    """int64 (..., N): bit r of the code of a row is [x . projections[:, r] > 0].

    x is (B, H, N, D) and projections (H, D, r).
    """
    bits = (x @ projections.to(x.dtype)) > 0  # (B, H, N, r)
    powers = 1 << torch.arange(projections.shape[-1], device=x.device)
    return (bits * powers).sum(-1)


def gray_rank(codes: Tensor, bits: int) -> Tensor:
    """Position of each code in the reflected Gray sequence: xor of all higher bits."""
    shift = 1
    while shift < bits:
        codes = codes ^ (codes >> shift)
        shift *= 2
    return codes
