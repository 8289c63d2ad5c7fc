"""A balanced tree: every node is halved at the median of its widest direction."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["balanced_order"]

_POWER_STEPS = 4


def balanced_order(x: Tensor, leaf_size: int, valid: Tensor) -> Tensor:
    """int64 (G, N): an order of the rows of x (G, N, D) in which runs of leaf_size are alike.

    N is a power of two times leaf_size. Rows that `valid` (G, N) does not mark come last.
    """
    groups, length, dim = x.shape
    order = torch.arange(length, device=x.device).expand(groups, -1)
    size = length
    while size > leaf_size:
        rows = order.reshape(-1, size)  # (G * nodes, size)
        part = x.gather(1, order.unsqueeze(-1).expand(-1, -1, dim)).reshape(-1, size, dim)
        marked = valid.gather(1, order).reshape(-1, size)
        weight = marked.to(x.dtype).unsqueeze(-1)
        mean = (part * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        part = (part - mean) * weight
        longest = (part * part).sum(-1).argmax(-1)  # a start that is not orthogonal to the data
        axis = part.gather(1, longest[:, None, None].expand(-1, -1, dim))  # (nodes, 1, D)
        for _ in range(_POWER_STEPS):
            axis = (part @ axis.transpose(1, 2)).transpose(1, 2) @ part
            axis = axis / axis.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        along = (part @ axis.transpose(1, 2)).squeeze(-1)
        along = torch.where(marked, along, float("inf"))
        order = rows.gather(1, along.argsort(dim=1, stable=True)).reshape(groups, length)
        size //= 2
    return order
