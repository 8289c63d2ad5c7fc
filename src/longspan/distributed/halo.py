"""Neighbour exchange: a rank fetches only the keys that its queries can see.

For what sees a window and the first keys of a document (sinks): the ranks send each other those
rows, once, and each then runs the mechanism's own function on its queries. Sinks first, then the
keys of the window in order: that is the cache of a stream, for which the mechanism is exact
whatever lies between the two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .exchange import fetch_rows, take_rows, tie
from .group import ContextGroup
from .layout import SequenceLayout, Span
from .tiles import local_lengths

__all__ = ["Piece", "Reach", "fetched_rows", "neighbour_attention", "pieces"]


class Reach(NamedTuple):
    """What a query at position p of its document sees: keys p - before .. p + after, and the first
    `first` of the document."""

    first: int
    before: int
    after: int


class Piece(NamedTuple):
    """Consecutive queries of one document on one rank.

    rows: start and stop among this rank's queries.
    first: keys of the document's start that are wanted apart from the window; may be empty.
    near: the consecutive keys of the window.
    query_offset: of the call over `first` and `near` together.
    """

    rows: Span
    first: Span
    near: Span
    query_offset: int


@functools.lru_cache(maxsize=4096)
def pieces(layout: SequenceLayout, rank: int, reach: Reach) -> tuple[Piece, ...]:
    """What a rank computes, and the keys that each part of it needs."""
    made = []
    base = 0
    for span in layout.spans(rank):
        for document in layout.documents:
            start, stop = max(span.start, document.start), min(span.stop, document.stop)
            if start >= stop:
                continue
            left = max(start - reach.before, document.start)
            right = min(stop + reach.after, document.stop)
            first_stop = min(document.start + reach.first, document.stop)
            if left <= first_stop:  # no gap
                left = document.start
                first, right = Span(left, left), max(right, first_stop)
            else:
                first = Span(document.start, first_stop)
            offset = first.length + start - left
            rows = Span(base + start - span.start, base + stop - span.start)
            made.append(Piece(rows, first, Span(left, right), offset))
        base += span.length
    return tuple(made)


@functools.lru_cache(maxsize=4096)
def fetched_rows(layout: SequenceLayout, rank: int, reach: Reach) -> tuple[Span, ...]:
    """The keys that a rank needs, own ones included: disjoint, in order."""
    wanted = sorted(
        span
        for piece in pieces(layout, rank, reach)
        for span in (piece.first, piece.near)
        if span.length
    )
    joined: list[Span] = []
    for span in wanted:
        if joined and span.start <= joined[-1].stop:
            span = Span(joined[-1].start, max(joined.pop().stop, span.stop))
        joined.append(span)
    return tuple(joined)


def neighbour_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    reach: Reach,
    group: ContextGroup,
    layout: SequenceLayout,
    function: Callable[[Tensor, Tensor, Tensor, Tensor | None, int], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """`function(query, key, value, key_lengths, query_offset)` on each piece, joined again.

    Args:
        query: (B, H, n, D), this rank's tokens.
        key, value: (B, H_kv, n, .).
        key_lengths: (B,) of the whole sequence, or None.
        function: gives (output (B, H, m, D_v), log (B, H, m)) for m queries.

    Returns:
        (output (B, H, n, D_v), log (B, H, n)).
    """
    wanted = tuple(fetched_rows(layout, rank, reach) for rank in range(group.size))
    fetched = wanted[group.rank]
    k, v = (fetch_rows(tensor, group, layout, wanted) for tensor in (key, value))

    def cut(tensor: Tensor, piece: Piece) -> Tensor:
        parts = [
            take_rows(tensor, fetched, span) for span in (piece.first, piece.near) if span.length
        ]
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]

    outputs, logs = [], []
    for piece in pieces(layout, group.rank, reach):
        rows = query[:, :, piece.rows.start : piece.rows.stop]
        lengths = local_lengths(key_lengths, (piece.first, piece.near))
        output, log = function(rows, cut(k, piece), cut(v, piece), lengths, piece.query_offset)
        outputs.append(output)
        logs.append(log)
    if not outputs:
        empty = query.new_zeros((*query.shape[:3], value.shape[-1]))
        empty = tie(empty, query, k, v)
        return empty, empty.sum(-1)
    return torch.cat(outputs, 2), torch.cat(logs, 2)
