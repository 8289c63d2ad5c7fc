"""Which queries meet which keys how: pure integer arithmetic, no tensors of q, k or v.

"chunks": key j lies in chunk j // S. The query at key index p has the near keys
[near_start, near_end) and the far chunks c < far_before(p) or c >= far_after(p), S = chunk_size:

    far_before(p) = clamp(floor((p - window + 1) / S), 0, F)     chunks wholly before the window
    far_after(p)  = F if causal, else clamp(ceil((p + window) / S), far_before, F)
    near(p)       = [S far_before, min(p + 1, N))                causal
                    [S far_before, S far_after) and [S F, N)     not causal

where N is the number of keys (of the batch entry: key_lengths) and F = N // S, so that a last
chunk which is not full is always near. Sinks and globals of far chunks are added to the near keys.

"recursion": nodes and leaves, as in the paper; see `recursion`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .config import HyperConfig

__all__ = ["Leaf", "Node", "Recursion", "far_after", "far_before", "recursion"]


def far_before(positions: Tensor, config: HyperConfig, full_chunks: Tensor | int) -> Tensor:
    """Number of chunks wholly before the window of the queries at `positions`."""
    chunks = torch.div(positions - config.window + 1, config.chunk_size, rounding_mode="floor")
    return torch.minimum(chunks.clamp(min=0), torch.as_tensor(full_chunks, device=chunks.device))


def far_after(positions: Tensor, config: HyperConfig, full_chunks: Tensor | int) -> Tensor:
    """First chunk wholly after the window (calls that are not causal)."""
    size = config.chunk_size
    first = torch.div(positions + config.window + size - 1, size, rounding_mode="floor")
    most = torch.as_tensor(full_chunks, device=first.device)
    return torch.maximum(
        torch.minimum(first.clamp(min=0), most), far_before(positions, config, full_chunks)
    )


class Node(NamedTuple):
    """Query rows q_start .. q_end against keys k_start .. k_end, all visible, estimated.

    Sorted queries are cut in blocks of q_block, sorted keys in blocks of k_block; block i meets
    block i. Their number is ceil((k_end - k_start) / k_block) (or less, if queries run out).
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    q_block: int
    k_block: int


class Leaf(NamedTuple):
    """Query rows q_start .. q_end against keys k_start .. k_end, exact (causal if the call is)."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int


class Recursion(NamedTuple):
    """Nodes and leaves: each visible (query, key) pair lies in exactly one of them."""

    nodes: tuple[Node, ...]
    leaves: tuple[Leaf, ...]

    @property
    def query_bases(self) -> tuple[int, ...]:
        """Where the queries of each node begin in the concatenated orders, and the total."""
        bases = [0]
        for node in self.nodes:
            bases.append(bases[-1] + node.q_end - node.q_start)
        return tuple(bases)

    @property
    def key_bases(self) -> tuple[int, ...]:
        """Where the keys of each node begin in the concatenated orders, and the total."""
        bases = [0]
        for node in self.nodes:
            bases.append(bases[-1] + node.k_end - node.k_start)
        return tuple(bases)


@lru_cache(maxsize=64)
def recursion(
    n_q: int, n_k: int, is_causal: bool, query_offset: int, block_size: int, min_length: int
) -> Recursion:
    """The paper's recursion over halves, on the dyadic intervals of min_length keys.

    Leaves are the intervals [a L, (a + 1) L); on level l the queries of the odd intervals of
    length 2**l L meet the keys of the even interval before. Queries beyond the last key see all
    keys and are one node of their own. A call that is not causal is one node; up to min_length
    keys it is one leaf.
    """
    nodes: list[Node] = []
    leaves: list[Leaf] = []
    if n_q == 0 or n_k == 0:
        return Recursion((), ())

    def add(q_start: int, q_end: int, k_start: int, k_end: int) -> None:
        if q_end > q_start and k_end > k_start:
            blocks = -(-(k_end - k_start) // block_size)
            q_block = -(-(q_end - q_start) // blocks)
            nodes.append(Node(q_start, q_end, k_start, k_end, q_block, block_size))

    if not is_causal:
        if n_k <= min_length:
            return Recursion((), (Leaf(0, n_q, 0, n_k),))
        add(0, n_q, 0, n_k)
        return Recursion(tuple(nodes), ())

    def rows(start: int, end: int) -> tuple[int, int]:
        """Rows whose key index is in start .. end."""
        return max(0, start - query_offset), min(n_q, end - query_offset)

    for start in range(0, n_k, min_length):
        first, last = rows(start, min(start + min_length, n_k))
        if last > first:
            leaves.append(Leaf(first, last, start, min(start + min_length, n_k)))
    half = min_length
    while half < n_k:
        for start in range(half, n_k, 2 * half):
            add(*rows(start, min(start + half, n_k)), start - half, start)
        half *= 2
    first, last = rows(n_k, n_q + query_offset)
    if last > first:
        if n_k <= min_length:
            leaves.append(Leaf(first, last, 0, n_k))
        else:
            add(first, last, 0, n_k)
    return Recursion(tuple(nodes), tuple(leaves))
