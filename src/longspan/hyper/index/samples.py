"""Sampled keys and the logarithms of their weights: unbiased estimators of a sum over keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._random import first_head_of, uniform

__all__ = ["draw_uniforms", "sample_ranks"]


def draw_uniforms(
    seed: int,
    stream: str,
    heads: int,
    groups: int,
    count: int,
    first_group: int,
    device: torch.device,
) -> Tensor:
    """(heads, groups, count) in (0, 1): a pure function of seed, head, group and index."""
    seed, first_head = first_head_of(seed)
    if not heads:
        return torch.zeros((0, groups, count), device=device)
    first = first_group * count
    return torch.stack([
        uniform(seed, stream, (groups, count), offset=(head << 40) + first, device=device)
        for head in range(first_head, first_head + heads)
    ])  # fmt: skip


def sample_ranks(
    draws: Tensor, population: Tensor, kind: str, norms: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Which of the first `population` (G,) entries of each order to take, and log weights.

    draws is (G, R) in (0, 1); norms (G, N), for "value_norm", holds |v|**2 in the same order.
    Returns ranks (G, R) int64 and log weights (G, R) float32: summing weight * f(sample) over the
    R samples is an unbiased estimate of the sum of f over the population.
    """
    count = draws.shape[-1]
    size = population.to(torch.float64).unsqueeze(-1)
    if kind == "value_norm":
        assert norms is not None
        inside = torch.arange(norms.shape[-1], device=norms.device) < population.unsqueeze(-1)
        mass = torch.where(inside, norms.double(), 0.0)
        empty = mass.sum(-1, keepdim=True) == 0  # all values are zero: any distribution will do
        mass = torch.where(empty, inside.double(), mass)
        share = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        ranks = torch.searchsorted(share.cumsum(-1), draws.double())
        ranks = torch.minimum(ranks, (population.unsqueeze(-1) - 1).clamp(min=0).long())
        weight = 1.0 / (count * share.gather(-1, ranks))
    else:
        place = draws.double()
        if kind == "stratified":
            place = (torch.arange(count, device=draws.device) + place) / count
        ranks = (place * size).long().clamp(max=2**31 - 1)
        ranks = torch.minimum(ranks, (population.unsqueeze(-1) - 1).clamp(min=0).long())
        weight = (size / count).expand_as(place)
    bias = torch.where(size > 0, torch.log(weight), float("-inf"))
    return ranks, bias.float()
