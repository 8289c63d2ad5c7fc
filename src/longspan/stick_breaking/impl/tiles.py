"""Arithmetic of one tile of scores (u, g, rows, keys); keys ascend: the last is the nearest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["exclusive_cumsum", "log_sticks", "times", "times_transposed", "weights_of"]


def log_sticks(z: Tensor) -> tuple[Tensor, Tensor]:
    """log of the stick before each key, given a whole one at the near end, and after all of them.

    Scanned from the near end: a sum from the far end minus a prefix would lose the small numbers
    that belong to near keys.
    """
    log_keep = F.logsigmoid(z.neg())  # log (1 - b)
    nearer, taken = exclusive_cumsum(log_keep.flip(-1))
    return nearer.flip(-1), taken


def weights_of(gate: Tensor, nearer: Tensor, log_rest: Tensor) -> Tensor:
    """Weights of one tile, given the log of the stick that enters it; overwrites `nearer`."""
    return nearer.add_(log_rest.to(nearer.dtype).unsqueeze(-1)).exp_().mul_(gate)


def exclusive_cumsum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of everything before each element of the last axis, and the sum of all.

    Shifted rather than inclusive minus x, which cancels where x is large (saturated gates).
    """
    sums = x.new_zeros((*x.shape[:-1], x.shape[-1] + 1))
    torch.cumsum(x, -1, out=sums[..., 1:])
    return sums[..., :-1], sums[..., -1]


def times(x: Tensor, y: Tensor) -> Tensor:
    """(u, g, n, a) @ (u, a, b): one matrix product for all the query heads of a key head."""
    u, g, n, a = x.shape
    return torch.bmm(x.reshape(u, g * n, a), y).reshape(u, g, n, y.shape[-1])


def times_transposed(x: Tensor, y: Tensor) -> Tensor:
    """Sum over g of (u, g, n, a)^T @ (u, g, n, b): (u, a, b)."""
    return torch.bmm(x.flatten(1, 2).mT, y.flatten(1, 2))
