"""What the kernels of the recursion visit, as small integer tables on the device. No Triton.

Nodes and leaves come from `geometry.recursion`. The sorted orders of all nodes lie one behind the
other: a node's queries begin at its query base, its keys at its key base. A row r of a node has the
natural slot r - q_start + base; partial results live there. Tables are made once for a geometry.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...._validation import Call
from ...config import HyperConfig
from ...geometry import Leaf, Node, recursion

__all__ = ["Plan", "make_plan"]

TILE_FIELDS = 7
_EVERYTHING = 2**30  # query_offset of a call that is not causal: every key lies before every query


class Plan(NamedTuple):
    """One geometry, hashable. `leaves` cover every query and every key, if there are any."""

    nodes: tuple[Node, ...]
    leaves: tuple[Leaf, ...]
    query_offset: int

    @property
    def query_bases(self) -> list[int]:
        """Where the queries of each node begin in the concatenated orders, and the total."""
        bases = [0]
        for node in self.nodes:
            bases.append(bases[-1] + node.q_end - node.q_start)
        return bases

    @property
    def key_bases(self) -> list[int]:
        """The same of the keys."""
        bases = [0]
        for node in self.nodes:
            bases.append(bases[-1] + node.k_end - node.k_start)
        return bases


def make_plan(call: Call, config: HyperConfig) -> Plan:
    """The plan of a call without key_lengths."""
    return _plan(call.query.shape[2], call.key.shape[2], call.is_causal, call.query_offset,
                 config.block_size, config.min_length)  # fmt: skip


@functools.lru_cache(maxsize=64)
def _plan(
    n_q: int, n_k: int, is_causal: bool, query_offset: int, block_size: int, min_length: int
) -> Plan:
    nodes, leaves = recursion(n_q, n_k, is_causal, query_offset, block_size, min_length)
    if not is_causal:
        return Plan(nodes, leaves, _EVERYTHING)
    # Leaves over the same keys become one; queries and keys of no leaf get one without a partner.
    whole: list[Leaf] = []
    for leaf in leaves:
        last = whole[-1] if whole else None
        if last and last.q_end == leaf.q_start and last[2:] == leaf[2:]:
            whole[-1] = last._replace(q_end=leaf.q_end)
        else:
            whole.append(leaf)
    first, past = (whole[0].q_start, whole[-1].q_end) if whole else (n_q, n_q)
    if first == past and nodes:  # no query stands at a key
        first, past = nodes[0].q_start, nodes[0].q_start
    covered = {leaf.k_start for leaf in whole}
    alone = [Leaf(0, 0, start, min(start + min_length, n_k))
             for start in range(0, n_k, min_length) if start not in covered]  # fmt: skip
    if first:
        alone.append(Leaf(0, first, 0, 0))
    if past < n_q:
        alone.append(Leaf(past, n_q, 0, 0))
    return Plan(nodes, (*whole, *alone), query_offset)


@functools.lru_cache(maxsize=64)
def is_full(plan: Plan, columns: int) -> bool:
    """True if every block of keys of every node has a multiple of `columns` keys."""
    return not any((node.k_end - node.k_start) % columns or node.k_block % columns
                   for node in plan.nodes)  # fmt: skip


@functools.lru_cache(maxsize=64)
def query_tiles(plan: Plan, rows: int, device: torch.device) -> Tensor:
    """(tiles, 7): node, sorted queries from/to, their keys from/to, row-to-slot shift, block."""
    table = []
    for number, (node, q_base, k_base) in enumerate(_with_bases(plan)):
        q_len, k_len = node.q_end - node.q_start, node.k_end - node.k_start
        for block, first in enumerate(range(0, q_len, node.q_block)):
            last = min(first + node.q_block, q_len)
            keys = [k_base + min((block + side) * node.k_block, k_len) for side in (0, 1)]
            table += [(number, q_base + start, q_base + min(start + rows, last), *keys,
                       q_base - node.q_start, block) for start in range(first, last, rows)]  # fmt: skip
    return _table(table, TILE_FIELDS, device)


@functools.lru_cache(maxsize=64)
def key_tiles(plan: Plan, rows: int, device: torch.device) -> Tensor:
    """(tiles, 7): node, sorted keys from/to, their queries from/to, row-to-slot shift, block."""
    table = []
    for number, (node, q_base, k_base) in enumerate(_with_bases(plan)):
        q_len, k_len = node.q_end - node.q_start, node.k_end - node.k_start
        for block, first in enumerate(range(0, k_len, node.k_block)):
            last = min(first + node.k_block, k_len)
            queries = [q_base + min((block + side) * node.q_block, q_len) for side in (0, 1)]
            table += [(number, k_base + start, k_base + min(start + rows, last), *queries,
                       k_base - node.k_start, block) for start in range(first, last, rows)]  # fmt: skip
    return _table(table, TILE_FIELDS, device)


@functools.lru_cache(maxsize=64)
def query_runs(
    plan: Plan, rows: int, tiles_in_run: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Runs of `query_tiles`, each inside of one node: (runs, 3) node, first tile, past the last;
    and (nodes, 3) first run, past the last, row-to-slot shift of the keys."""
    owners = query_tiles(plan, rows, device)[:, 0].tolist()
    runs, nodes = [], []
    start = 0
    for number, (node, _, k_base) in enumerate(_with_bases(plan)):
        end = start
        while end < len(owners) and owners[end] == number:
            end += 1
        first = len(runs)
        runs += [(number, t, min(t + tiles_in_run, end)) for t in range(start, end, tiles_in_run)]
        nodes.append((first, len(runs), k_base - node.k_start))
        start = end
    return _table(runs, 3, device), _table(nodes, 3, device)


@functools.lru_cache(maxsize=64)
def leaf_tiles(plan: Plan, rows: int, of_keys: bool, device: torch.device) -> Tensor:
    """(tiles, 5 + parts): rows from/to, the other side's rows from/to, the number of partial
    results, and the shift from a row to its slot of each. Tiles of queries: longest first."""
    spans = [
        (node.k_start, node.k_end, k_base - node.k_start) if of_keys
        else (node.q_start, node.q_end, q_base - node.q_start)
        for node, q_base, k_base in _with_bases(plan)
    ]  # fmt: skip
    table = []
    for leaf in plan.leaves:
        own, other = (leaf[2:], leaf[:2]) if of_keys else (leaf[:2], leaf[2:])
        shifts = [shift for start, end, shift in spans if start <= own[0] and own[1] <= end]
        starts = range(own[0], own[1], rows)
        table += [(start, min(start + rows, own[1]), *other, len(shifts), *shifts)
                  for start in (starts if of_keys else reversed(starts))]  # fmt: skip
    width = max((len(row) for row in table), default=5)
    return _table([(*row, *[0] * (width - len(row))) for row in table], width, device)


class Segments(NamedTuple):
    """Runs of rows that no node cuts, for the counting sort.

    bounds (segments, 2): first row and past the last. members (segments, levels): number of each
    (node, segment) pair it belongs to, then -1. nodes (nodes, 4): first segment, segments, first
    pair, base of the node in the sorted order.
    """

    bounds: Tensor
    members: Tensor
    nodes: Tensor
    pairs: int


@functools.lru_cache(maxsize=64)
def segments(plan: Plan, size: int, of_keys: bool, device: torch.device) -> Segments:
    """Segments of up to `size` rows of query or key."""
    spans = [
        (node.k_start, node.k_end, k_base) if of_keys else (node.q_start, node.q_end, q_base)
        for node, q_base, k_base in _with_bases(plan)
    ]  # fmt: skip
    edges = sorted({edge for span in spans for edge in span[:2]})
    bounds = [
        (start, min(start + size, high))
        for low, high in itertools.pairwise(edges)
        if any(span[0] <= low and high <= span[1] for span in spans)
        for start in range(low, high, size)
    ]
    members: list[list[int]] = [[] for _ in bounds]
    nodes, pairs = [], 0
    starts = {start: number for number, (start, _) in enumerate(bounds)}
    for low, high, base in spans:
        first = end = starts[low]
        while end < len(bounds) and bounds[end][0] < high:
            members[end].append(pairs + end - first)
            end += 1
        nodes.append((first, end - first, pairs, base))
        pairs += end - first
    levels = max((len(row) for row in members), default=1)
    padded = [(*row, *[-1] * (levels - len(row))) for row in members]
    return Segments(_table(bounds, 2, device), _table(padded, levels, device),
                    _table(nodes, 4, device), pairs)  # fmt: skip


@functools.lru_cache(maxsize=64)
def node_sizes(plan: Plan, device: torch.device) -> Tensor:
    """(nodes, 3): keys, key base, key block of each node."""
    rows = [(node.k_end - node.k_start, k_base, node.k_block)
            for node, _, k_base in _with_bases(plan)]  # fmt: skip
    return _table(rows, 3, device)


def _with_bases(plan: Plan) -> Iterator[tuple[Node, int, int]]:
    return zip(plan.nodes, plan.query_bases, plan.key_bases, strict=False)


def _table(rows: list[tuple[int, ...]], width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int32).reshape(len(rows), width).to(device)
