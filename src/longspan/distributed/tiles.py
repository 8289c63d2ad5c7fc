"""Which of a rank's queries meet which keys of another rank, as few rectangles as can be."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import SequenceLayout, Span

__all__ = ["Tile", "local_lengths", "span_tiles", "tiles"]


class Tile(NamedTuple):
    """Rows q_start .. q_stop of the queries held here against rows of the keys that visit.

    is_causal: a square on the diagonal, row i sees columns 0 .. i; else every row sees all.
    columns: the tokens of the whole sequence that the key rows are.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    is_causal: bool
    columns: tuple[Span, ...]


def span_tiles(
    layout: SequenceLayout, rows: Span, columns: Span, is_causal: bool
) -> list[tuple[Span, Span, bool]]:
    """(queries, keys, is_causal) in tokens of the whole sequence; rows and columns are equal or
    disjoint."""
    if is_causal and columns.start >= rows.stop:
        return []
    found = []
    same = rows == columns
    candidates = layout.documents if same else (layout.document_of(max(rows.start, columns.start)),)
    for document in candidates:
        queries = Span(max(rows.start, document.start), min(rows.stop, document.stop))
        keys = Span(max(columns.start, document.start), min(columns.stop, document.stop))
        if queries.length > 0 and keys.length > 0:
            found.append((queries, keys, is_causal and same and queries.length > 1))
    return found


@functools.lru_cache(maxsize=4096)
def tiles(layout: SequenceLayout, q_rank: int, k_rank: int, is_causal: bool) -> tuple[Tile, ...]:
    """All pairs of a query of one rank and a key of another that see each other, each once."""
    made = []
    q_base = 0
    for rows in layout.spans(q_rank):
        k_base = 0
        for columns in layout.spans(k_rank):
            for queries, keys, edge in span_tiles(layout, rows, columns, is_causal):
                q_start = q_base + queries.start - rows.start
                k_start = k_base + keys.start - columns.start
                made.append(
                    Tile(
                        q_start,
                        q_start + queries.length,
                        k_start,
                        k_start + keys.length,
                        edge,
                        (keys,),
                    )
                )
            k_base += columns.length
        q_base += rows.length
    return tuple(_join_rows(_join_columns(made)))


def local_lengths(key_lengths: Tensor | None, columns: tuple[Span, ...]) -> Tensor | None:
    """(B,) int32: how many keys of `columns` are no padding; they are the first ones."""
    if key_lengths is None:
        return None
    valid = torch.zeros_like(key_lengths)
    for span in columns:
        valid = valid + (key_lengths - span.start).clamp(0, span.length)
    return valid.to(torch.int32)


def _join_columns(made: list[Tile]) -> list[Tile]:
    """Full tiles of the same rows whose keys lie side by side become one."""
    joined: list[Tile] = []
    for tile in made:
        last = joined[-1] if joined else None
        if (
            last is not None
            and not last.is_causal
            and not tile.is_causal
            and last[:2] == tile[:2]
            and last.k_stop == tile.k_start
        ):
            joined[-1] = last._replace(k_stop=tile.k_stop, columns=last.columns + tile.columns)
        else:
            joined.append(tile)
    return joined


def _join_rows(made: list[Tile]) -> list[Tile]:
    """Full tiles of the same keys whose rows lie side by side become one."""
    joined: list[Tile] = []
    for tile in made:
        fits = (
            i
            for i, other in enumerate(joined)
            if not other.is_causal
            and not tile.is_causal
            and other.q_stop == tile.q_start
            and other[2:] == tile[2:]
        )
        index = next(fits, None)
        if index is None:
            joined.append(tile)
        else:
            joined[index] = joined[index]._replace(q_stop=tile.q_stop)
    return joined
