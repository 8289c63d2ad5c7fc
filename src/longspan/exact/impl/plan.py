"""Cut a call into pieces for a vendor kernel: full rectangles and end-aligned triangles."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """Queries q_start .. q_end against keys k_start .. k_end.

    is_causal: the last query sees all keys of the part, each earlier one sees one key less.
    Every query of a part sees at least one of its keys.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    is_causal: bool


def plan(n_q: int, n_k: int, is_causal: bool, query_offset: int) -> list[Part]:
    """Parts that cover the visible scores of one batch entry, each exactly once.

    Rows that see no key are in no part. Different parts never share a row.
    """
    if n_q == 0 or n_k == 0:
        return []
    if not is_causal:
        return [Part(0, n_q, 0, n_k, False)]
    first = max(0, -query_offset)  # first row that sees a key
    last = min(n_q, n_k - query_offset)  # from here on rows see all keys
    parts = []
    if first < last:
        rows = last - first
        width = last + query_offset  # keys seen by the last row of the triangle
        parts.append(Part(first, last, 0, width, rows > 1))
    full = max(first, last, 0)
    if full < n_q:
        parts.append(Part(full, n_q, 0, n_k, False))
    return parts


def split_square(part: Part) -> list[Part]:
    """The same scores as full rectangles and square triangles, for kernels that align at row 0."""
    rows, keys = part.q_end - part.q_start, part.k_end - part.k_start
    if not part.is_causal or rows == keys:
        return [part]
    corner = part.k_end - rows
    return [
        Part(part.q_start, part.q_end, part.k_start, corner, False),
        Part(part.q_start, part.q_end, corner, part.k_end, True),
    ]
