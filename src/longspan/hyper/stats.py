"""How hard a head is for HyperAttention: the paper's alpha and kappa, and the captured mass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._dense import causal_visible
from .._validation import Call, validate
from ..errors import UnsupportedError
from .config import HyperConfig
from .fallback import error_of_heads
from .impl.common import choose, chunk_index, without_padding
from .impl.recursion import geometry_of, recursion_index
from .impl.reference import chunks_visible
from .index.lsh import draw_projections
from .plan import ChunkIndex

__all__ = ["HyperStats", "hardness"]

_ROWS = 64


class HyperStats(NamedTuple):
    """Per batch entry and head, (B, H) float32.

    alpha: N_q max_j sum_i P_ij**2, P the softmax matrix; 1 if it is flat over N_q keys, N_q**2 if
        all queries look at one key (attention sinks make it large).
    kappa: largest over smallest row sum of (1 - M) . exp(scores), the part that is not visited,
        over the rows that have one; 1 if nothing is left out.
    captured_mass: mean over rows of the softmax mass on the keys that are visited exactly, 0 .. 1.
    error: mean of |output - exact| / |exact| over evenly spaced rows.
    """

    alpha: Tensor
    kappa: Tensor
    captured_mass: Tensor
    error: Tensor


def hardness(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    query_offset: int = 0,
    config: HyperConfig = HyperConfig(),
    seed: int = 0,
    index: ChunkIndex | None = None,
) -> HyperStats:
    """Measure how well the estimator's assumptions hold for each head of an input.

    Args:
        query, key, value, is_causal, scale, enable_gqa, query_offset, config, seed: as in
            `hyper_attention`.
        index: clusters to use instead of those that `config` makes (structure="chunks").

    Returns:
        HyperStats of (B, H) tensors.

    Raises:
        ShapeError: tensors do not fit together.

    Cost:
        Exact attention: O(N_q N_k D) time, blocks of 64 rows, O(N_q + N_k) memory.

    Example:
        >>> q = torch.zeros(1, 2, 256, 16)
        >>> hardness(q, q, q).alpha.round(decimals=3)
        tensor([[1., 1.]])
    """
    from .api import run_call

    call = validate("hardness", query, key, value, is_causal=is_causal, scale=scale,
                    enable_gqa=enable_gqa, query_offset=query_offset)  # fmt: skip
    if index is not None and config.structure != "chunks":
        raise UnsupportedError(
            "hardness: index was given, but structure='recursion' sorts instead. Leave it out."
        )
    batch, heads, n_q, dim = call.query.shape
    planes = None
    if config.index == "lsh":
        planes = draw_projections(seed, call.key.shape[1], dim, config.num_projections,
                                  call.query.device)  # fmt: skip
    with torch.no_grad(), torch.autocast(call.query.device.type, enabled=False):
        groups = heads // max(call.key.shape[1], 1)
        keys = without_padding(call)[0].float().repeat_interleave(groups, 1)
        squares = keys.new_zeros((batch, heads, call.key.shape[2]))
        largest = keys.new_full((batch, heads), float("-inf"))
        smallest = keys.new_full((batch, heads), float("inf"))
        mass = keys.new_zeros((batch, heads))
        rows = 0
        for part, visited in _visited(call, config, planes, seed, index):
            allowed = causal_visible(part)
            scores = part.scale * (part.query.float() @ keys.transpose(-1, -2))
            scores = scores.masked_fill(~allowed, float("-inf"))
            top = scores.amax(-1, keepdim=True)
            weights = torch.exp(scores - top.masked_fill(top == float("-inf"), 0.0))
            total = weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            p = weights / total
            squares += p.square().sum(2)
            mass += (p * visited).sum((2, 3))
            rest = allowed & ~visited
            left = scores.masked_fill(~rest, float("-inf")).logsumexp(-1)
            largest = torch.maximum(largest, left.amax(-1))
            none = left == float("-inf")
            smallest = torch.minimum(smallest, left.masked_fill(none, float("inf")).amin(-1))
            rows += int(allowed.any(-1).float().mean((0, 1)).sum())
        kappa = torch.where(torch.isinf(smallest), 1.0, torch.exp(largest - smallest))
        output = run_call("hardness", call, config, None, seed, "auto", index).output
        return HyperStats(n_q * squares.amax(-1), kappa, mass / max(rows, 1),
                          error_of_heads(call, output))  # fmt: skip


def _visited(
    call: Call, config: HyperConfig, planes: Tensor | None, seed: int, index: ChunkIndex | None
) -> Iterator[tuple[Call, Tensor]]:
    """Runs of rows, and which keys they visit exactly: (B, H, rows, N_k) bool."""
    n_q = call.query.shape[2]
    runs = [slice(start, min(start + _ROWS, n_q)) for start in range(0, n_q, _ROWS)]

    def rows_of(rows: slice) -> Call:
        return call._replace(query=call.query[:, :, rows],
                             query_offset=call.query_offset + rows.start)  # fmt: skip

    if config.structure == "chunks":
        index = chunk_index(call, config, planes, seed) if index is None else index
        for rows in runs:
            part = rows_of(rows)
            yield part, chunks_visible(part, config, index, choose(part, config, index))[0]
        return
    made, geometry = recursion_index(call, config, planes, seed), geometry_of(call, config)
    groups = call.query.shape[1] // max(call.key.shape[1], 1)
    for rows in runs:
        part = rows_of(rows)
        allowed = causal_visible(part).expand(*call.query.shape[:2], -1, -1)
        visited = torch.zeros_like(allowed)
        for leaf in geometry.leaves:
            first, last = max(leaf.q_start, rows.start), min(leaf.q_end, rows.stop)
            if first < last:
                at = (slice(first - rows.start, last - rows.start),
                      slice(leaf.k_start, leaf.k_end))  # fmt: skip
                visited[:, :, *at] |= allowed[:, :, *at]
        for number, node in enumerate(geometry.nodes):
            first, last = max(node.q_start, rows.start), min(node.q_end, rows.stop)
            if first >= last:
                continue
            q_base, k_base = geometry.query_bases[number], geometry.key_bases[number]
            of_query = made.query_order[:, :, q_base : q_base + node.q_end - node.q_start].long()
            of_key = made.key_order[:, :, k_base : k_base + node.k_end - node.k_start].long()
            q_block = _blocks(of_query - node.q_start, node.q_block)
            k_block = _blocks(of_key - node.k_start, node.k_block).repeat_interleave(groups, 1)
            q_block = q_block[:, :, first - node.q_start : last - node.q_start]
            at = (slice(first - rows.start, last - rows.start), slice(node.k_start, node.k_end))
            visited[:, :, *at] |= q_block.unsqueeze(-1) == k_block.unsqueeze(2)
        yield part, visited


def _blocks(order: Tensor, size: int) -> Tensor:
    """The block of each row, from the sorted order (..., n) of rows 0 .. n - 1."""
    ranks = torch.arange(order.shape[-1], device=order.device) // size
    return torch.empty_like(order).scatter_(-1, order, ranks.expand_as(order))
