"""What the kernels visit, as small integer tables on the device. Imports torch only.

A call is cut into *nodes* (a range of queries against a range of earlier keys, answered by the
estimator) and *leaves* (a range of queries against a range of keys, exact and causal). The sorted
orders of all nodes lie one behind the other: `q_base` and `k_base` say where a node begins. A row
r of a node has the natural slot r - q_start + q_base; partial results live there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Leaf", "Node", "Plan", "make_plan"]

NODE_FIELDS = 8  # first segment tile, tiles and slot base of query; the same of key; bases
TILE_FIELDS = 6
LEAF_FIELDS = 4


class Node(NamedTuple):
    """Queries q_start .. q_end against keys k_start .. k_end, in `blocks` pairs of blocks."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    q_block: int  # sorted queries of a block
    k_block: int  # sorted keys of a block


class Leaf(NamedTuple):
    """Queries q_start .. q_end against keys k_start .. k_end; query i sees keys <= i + offset."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int


class Plan(NamedTuple):
    """One geometry, hashable: tables are made once for each and kept on the device."""

    n_q: int
    n_k: int
    nodes: tuple[Node, ...]
    leaves: tuple[Leaf, ...]
    query_offset: int
    samples: int

    @property
    def q_rows(self) -> int:
        """Sorted query rows of all nodes."""
        return sum(node.q_end - node.q_start for node in self.nodes)

    @property
    def k_rows(self) -> int:
        """Sorted key rows of all nodes."""
        return sum(node.k_end - node.k_start for node in self.nodes)


def make_plan(
    n_q: int,
    n_k: int,
    nodes: tuple[Node, ...],
    leaves: tuple[Leaf, ...],
    query_offset: int,
    samples: int,
) -> Plan:
    """A plan; `samples` is the number of sampled columns of every node."""
    return Plan(n_q, n_k, nodes, leaves, query_offset, samples)


def _cached(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return functools.lru_cache(maxsize=64)(function)


def bases(plan: Plan) -> tuple[list[int], list[int]]:
    """Where the sorted queries and the sorted keys of each node begin."""
    q_base, k_base = [0], [0]
    for node in plan.nodes:
        q_base.append(q_base[-1] + node.q_end - node.q_start)
        k_base.append(k_base[-1] + node.k_end - node.k_start)
    return q_base, k_base


@_cached
def query_tiles(plan: Plan, rows: int, device: torch.device) -> Tensor:
    """(tiles, TILE_FIELDS): node, sorted queries from/to, paired sorted keys from/to, slot shift."""
    q_base, k_base = bases(plan)
    table = []
    for number, node in enumerate(plan.nodes):
        q_len, k_len = node.q_end - node.q_start, node.k_end - node.k_start
        for block, first in enumerate(range(0, q_len, node.q_block)):
            last = min(first + node.q_block, q_len)
            keys = [min((block + side) * node.k_block, k_len) for side in (0, 1)]
            for start in range(first, last, rows):
                table.append((number, q_base[number] + start,
                              q_base[number] + min(start + rows, last), k_base[number] + keys[0],
                              k_base[number] + keys[1], q_base[number] - node.q_start))  # fmt: skip
    return _table(table, TILE_FIELDS, device)


@_cached
def key_tiles(plan: Plan, rows: int, device: torch.device) -> Tensor:
    """(tiles, TILE_FIELDS): node, sorted keys from/to, paired sorted queries from/to, slot shift."""
    q_base, k_base = bases(plan)
    table = []
    for number, node in enumerate(plan.nodes):
        q_len, k_len = node.q_end - node.q_start, node.k_end - node.k_start
        for block, first in enumerate(range(0, k_len, node.k_block)):
            last = min(first + node.k_block, k_len)
            queries = [min((block + side) * node.q_block, q_len) for side in (0, 1)]
            for start in range(first, last, rows):
                table.append((number, k_base[number] + start,
                              k_base[number] + min(start + rows, last),
                              q_base[number] + queries[0], q_base[number] + queries[1],
                              k_base[number] - node.k_start))  # fmt: skip
    return _table(table, TILE_FIELDS, device)


@_cached
def query_runs(plan: Plan, rows: int, tiles_in_run: int, device: torch.device) -> Tensor:
    """(runs, 3): node, first and past-the-last row of `query_tiles(plan, rows)`."""
    owners = query_tiles(plan, rows, device)[:, 0].tolist()
    table, start = [], 0
    while start < len(owners):
        end = start
        while end < len(owners) and owners[end] == owners[start] and end - start < tiles_in_run:
            end += 1
        table.append((owners[start], start, end))
        start = end
    return _table(table, 3, device)


@_cached
def node_runs(plan: Plan, rows: int, tiles_in_run: int, device: torch.device) -> Tensor:
    """(nodes, 3): first and past-the-last run of each node, and its key slot shift."""
    owners = query_runs(plan, rows, tiles_in_run, device)[:, 0].tolist()
    _, k_base = bases(plan)
    table = []
    for number, node in enumerate(plan.nodes):
        first = owners.index(number) if number in owners else 0
        table.append((first, first + owners.count(number), k_base[number] - node.k_start))
    return _table(table, 3, device)


@_cached
def leaf_tiles(plan: Plan, rows: int, of_keys: bool, device: torch.device) -> Tensor:
    """(tiles, 6 + parts): first row, past-the-last row, the other side's leaf range, the number of
    parts, and for each the shift from a row to its slot. Longest first within a leaf, for queries.
    """
    table = []
    q_base, k_base = bases(plan)
    spans = []
    for number, node in enumerate(plan.nodes):
        if of_keys:
            spans.append((node.k_start, node.k_end, k_base[number] - node.k_start))
        else:
            spans.append((node.q_start, node.q_end, q_base[number] - node.q_start))
    for leaf in plan.leaves:
        own = (leaf.k_start, leaf.k_end) if of_keys else (leaf.q_start, leaf.q_end)
        other = (leaf.q_start, leaf.q_end) if of_keys else (leaf.k_start, leaf.k_end)
        shifts = [shift for start, end, shift in spans if start <= own[0] and own[1] <= end]
        starts = range(own[0], own[1], rows)
        for start in starts if of_keys else reversed(starts):
            table.append((start, min(start + rows, own[1]), *other, len(shifts), *shifts))
    width = max((len(row) for row in table), default=5)
    return _table([(*row, *[0] * (width - len(row))) for row in table], width, device)


def _table(rows: list[tuple[int, ...]], width: int, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).reshape(len(rows), width).to(device)
