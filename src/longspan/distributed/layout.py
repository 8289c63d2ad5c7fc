"""Which rank holds which tokens of a sequence: arithmetic alone, no communication.

A sequence is cut into chunks of nearly equal length, in order. "contiguous" gives rank r chunk r.
"zigzag" cuts twice as many and gives rank r the chunks r and 2R - 1 - r, an early and a late one,
so that causal attention costs every rank the same.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError, nearest_name

__all__ = ["LAYOUT_KINDS", "SequenceLayout", "Span"]

LAYOUT_KINDS = ("contiguous", "zigzag")


class Span(NamedTuple):
    """Tokens start .. stop - 1 of the whole sequence."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Tokens in it."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceLayout:
    """How the tokens of a sequence are spread over the ranks of a group.

    length: tokens of the whole sequence; need not be a multiple of anything.
    ranks: how many ranks share it.
    kind: "zigzag" balances causal work; "contiguous" keeps neighbours together, which window
        attention, early stop and state passing want.
    multiple: cuts are made at multiples of this (the segment length of Infini-attention, the block
        of a sorted mechanism); the end of the sequence is free.
    cu_seqlens: for packed documents: 0, running totals of their lengths, `length`. None: one
        document.

    A rank may hold no token, if there are fewer than ranks.

    Raises:
        ConfigError: a field is out of range.

    Example:
        >>> from longspan.distributed import SequenceLayout
        >>> layout = SequenceLayout(length=10, ranks=2, kind="zigzag")
        >>> layout.spans(0), layout.spans(1)
        ((Span(start=0, stop=2), Span(start=7, stop=10)), (Span(start=2, stop=7),))
    """

    length: int
    ranks: int
    kind: str = "zigzag"
    multiple: int = 1
    cu_seqlens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in (("length", 0), ("ranks", 1), ("multiple", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"SequenceLayout: {name} is {value!r}; it must be an int >= {least}."
                )
        if self.kind not in LAYOUT_KINDS:
            raise ConfigError(
                f"SequenceLayout: kind is {self.kind!r}. {nearest_name(self.kind, LAYOUT_KINDS)}"
            )
        if self.cu_seqlens is None:
            return
        marks = tuple(int(mark) for mark in self.cu_seqlens)
        object.__setattr__(self, "cu_seqlens", marks)
        rising = all(a <= b for a, b in itertools.pairwise(marks))
        if len(marks) < 2 or marks[0] != 0 or marks[-1] != self.length or not rising:
            raise ConfigError(
                f"SequenceLayout: cu_seqlens is {marks}; it must start at 0, never fall and end at "
                f"length = {self.length}. Pass cu_seqlens.tolist() of the packed sequence."
            )

    @property
    def documents(self) -> tuple[Span, ...]:
        """The documents that have tokens; the whole sequence if it is not packed."""
        marks = (0, self.length) if self.cu_seqlens is None else self.cu_seqlens
        return tuple(Span(a, b) for a, b in itertools.pairwise(marks) if b > a)

    @property
    def num_chunks(self) -> int:
        """Pieces that the sequence is cut into."""
        return self.ranks if self.kind == "contiguous" else 2 * self.ranks

    def chunk(self, index: int) -> Span:
        """The tokens of chunk `index`, in order of the sequence; may be empty."""
        units = -(-self.length // self.multiple)
        start, stop = (
            min(units * i // self.num_chunks * self.multiple, self.length)
            for i in (index, index + 1)
        )
        return Span(start, stop)

    def owner(self, index: int) -> int:
        """The rank that holds chunk `index`."""
        if self.kind == "contiguous":
            return index
        return min(index, self.num_chunks - 1 - index)

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """Chunk indices of a rank, in order; empty chunks count."""
        if self.kind == "contiguous":
            return (rank,)
        return (rank, self.num_chunks - 1 - rank)

    def spans(self, rank: int) -> tuple[Span, ...]:
        """The tokens of a rank: disjoint, in order, none empty, neighbours joined."""
        return _spans(self, rank)

    def length_of(self, rank: int) -> int:
        """Tokens that a rank holds."""
        return sum(span.length for span in self.spans(rank))

    def positions(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """(n,) int64: the index in the whole sequence of each token of a rank."""
        pieces = [torch.arange(a, b, device=device) for a, b in self.spans(rank)]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64, device=device)

    def position_ids(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """(n,) int64: as `positions`, counted from the start of each token's document."""
        positions = self.positions(rank, device)
        if self.cu_seqlens is None:
            return positions
        starts = torch.tensor([document.start for document in self.documents], device=device)
        if starts.numel() == 0:
            return positions
        index = torch.searchsorted(starts, positions, right=True) - 1
        return positions - starts[index]

    def restore_index(self, device: torch.device | str = "cpu") -> Tensor:
        """(length,) int64: where each token is once the ranks' parts are put one after another."""
        order = torch.cat([self.positions(rank, device) for rank in range(self.ranks)])
        return torch.argsort(order)

    @property
    def in_rank_order(self) -> bool:
        """Whether the ranks' parts one after another are the sequence already."""
        spans = [span for rank in range(self.ranks) for span in self.spans(rank)]
        return all(a.stop == b.start for a, b in itertools.pairwise(spans))

    def split(self, tensor: Tensor, rank: int, dim: int = -1) -> Tensor:
        """The part of `tensor` that a rank holds, along `dim`; differentiable, a copy.

        Raises:
            ShapeError: `dim` is not `length` long.
        """
        if tensor.shape[dim] != self.length:
            raise ShapeError(
                f"SequenceLayout.split: tensor has shape {tuple(tensor.shape)}, {tensor.shape[dim]}"
                f" along dim {dim}; it must be {self.length}, the whole sequence. Pass another dim."
            )
        pieces = [tensor.narrow(dim, a, b - a) for a, b in self.spans(rank)]
        return torch.cat(pieces, dim) if pieces else tensor.narrow(dim, 0, 0).clone()

    def restore(self, parts: Sequence[Tensor], dim: int = -1) -> Tensor:
        """The whole sequence from the parts of all ranks, in order of rank; differentiable.

        Raises:
            ShapeError: a part is not as long as its rank's share.
        """
        lengths = [self.length_of(rank) for rank in range(self.ranks)]
        if [part.shape[dim] for part in parts] != lengths:
            raise ShapeError(
                f"SequenceLayout.restore: parts have lengths {[p.shape[dim] for p in parts]}; they "
                f"must have {lengths}. Pass what split gave for ranks 0 .. {self.ranks - 1}."
            )
        whole = torch.cat(list(parts), dim)
        return (
            whole
            if self.in_rank_order
            else whole.index_select(dim, self.restore_index(whole.device))
        )

    def document_of(self, position: int) -> Span:
        """The document that holds a token."""
        documents = self.documents
        return documents[bisect.bisect_right(documents, (position, self.length + 1)) - 1]


@functools.lru_cache(maxsize=4096)
def _spans(layout: SequenceLayout, rank: int) -> tuple[Span, ...]:
    joined: list[Span] = []
    for index in layout.chunks_of(rank):
        span = layout.chunk(index)
        if span.length == 0:
            continue
        if joined and joined[-1].stop == span.start:
            span = Span(joined.pop().start, span.stop)
        joined.append(span)
    return tuple(joined)
