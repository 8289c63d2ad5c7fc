"""What a query sees: shared by the implementations in plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Geometry", "Settings", "gate_floor", "wide_dtype"]


class Settings(NamedTuple):
    """What is computed, besides query, key and value: the arguments of the operators, in order.

    Packed calls have `cu_seqlens_q` and `cu_seqlens_k` and align causality at the end of each
    sequence; dense calls have `query_offset`, and may have `key_lengths`.
    """

    logit_bias: Tensor | None  # (H,)
    key_lengths: Tensor | None  # (B,) int32
    cu_seqlens_q: Tensor | None  # (S + 1,) int32
    cu_seqlens_k: Tensor | None  # (S + 1,) int32
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float
    query_offset: int
    attend_current: bool
    window: int | None
    early_stop: float | None
    gate_threshold: float | None


class Geometry(NamedTuple):
    """Which keys each query sees, and how queries and keys are cut into tiles.

    Query i stands at key index p = i + query_offset. With limit_i = p (p + 1 with attend_current)
    it sees the keys j with limit_i - window <= j < limit_i, below its entry's key_length.
    """

    n_q: int
    n_k: int
    query_offset: int
    attend_current: bool
    window: int | None

    def limit(self, row: int) -> int:
        """One past the last key of query `row`; may lie outside 0 .. n_k."""
        return row + self.query_offset + int(self.attend_current)

    def query_blocks(self, size: int) -> Iterator[tuple[int, int]]:
        """Consecutive ranges of at most `size` queries."""
        for first in range(0, self.n_q, size):
            yield first, min(first + size, self.n_q)

    def key_chunks(self, rows: tuple[int, int], size: int, longest: int) -> list[tuple[int, int]]:
        """The ranges of keys that some of `rows` sees, near to far, cut at multiples of `size`."""
        end = max(min(self.limit(rows[1] - 1), longest), 0)
        start = 0 if self.window is None else max(self.limit(rows[0]) - self.window, 0)
        chunks = range(-(-end // size) - 1, start // size - 1, -1) if end > start else range(0)
        return [(c * size, min((c + 1) * size, self.n_k)) for c in chunks]

    def hidden(
        self,
        rows: tuple[int, int],
        keys: tuple[int, int],
        lengths: Tensor | None,
        device: torch.device,
    ) -> Tensor | None:
        """Bool, broadcasts to (U, 1, rows, keys), True where a key is not seen; None if all are.

        `lengths` is (U,) or None.
        """
        first, last = self.limit(rows[0]), self.limit(rows[1] - 1)
        index = torch.arange(*keys, device=device)
        limit = torch.arange(first, last + 1, device=device).unsqueeze(-1)
        hidden: Tensor | None = None
        if keys[1] > first:
            hidden = index >= limit
        if self.window is not None and keys[0] < last - self.window:
            outside = index < limit - self.window
            hidden = outside if hidden is None else hidden | outside
        if lengths is not None:
            padded = (index >= lengths.unsqueeze(-1))[:, None, None]  # (U, 1, 1, keys)
            hidden = padded if hidden is None else hidden | padded
        return hidden


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def gate_floor(gate_threshold: float) -> float:
    """The logit below which sigmoid(logit) < gate_threshold."""
    return math.log(gate_threshold) - math.log1p(-gate_threshold)
