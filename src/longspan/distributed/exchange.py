"""The exchanges that the schemes are made of, with their gradients.

All of them are torch.distributed calls; a failure becomes a RankError that names the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .group import ContextGroup
from .layout import SequenceLayout, Span

__all__ = [
    "Held",
    "Message",
    "Transfer",
    "all_to_all",
    "fetch_rows",
    "gather_ranks",
    "gather_sequence",
    "heads_to_sequence",
    "sequence_to_heads",
    "start_transfer",
    "take_rows",
    "tie",
]


class Message(NamedTuple):
    """A tensor for, or from, another rank of the group."""

    tensor: Tensor
    rank: int


class Held(Protocol):
    """Which rows a rank holds: a `SequenceLayout`, or the same of another table of rows."""

    def spans(self, rank: int) -> tuple[Span, ...]:
        """Disjoint, in order."""


class Transfer:
    """Sends and receives under way; `wait` before the received tensors are read."""

    def __init__(self, group: ContextGroup, name: str, works: list[Any], held: list[Tensor]):
        self._group, self._name, self._works, self._held = group, name, works, held

    def wait(self) -> None:
        """Until all have arrived; on a GPU, the current stream waits, not the host."""
        with self._group.guard(self._name):
            for work in self._works:
                work.wait()
        self._works, self._held = [], []


def start_transfer(
    group: ContextGroup, name: str, sends: Sequence[Message], receives: Sequence[Message]
) -> Transfer:
    """Begin to send and to receive; both sides of a pair must list their tensors in one order."""
    sent = [Message(message.tensor.contiguous(), message.rank) for message in sends]
    operations = [
        dist.P2POp(call, message.tensor, group.peer(message.rank), group.group)
        for call, messages in ((dist.isend, sent), (dist.irecv, receives))
        for message in messages
        if message.tensor.numel() > 0
    ]
    works: list[Any] = []
    if operations:
        with group.guard(name):
            works = dist.batch_isend_irecv(operations)
    return Transfer(group, name, works, [message.tensor for message in sent])


def sequence_to_heads(
    tensor: Tensor, group: ContextGroup, layout: SequenceLayout, *, copies: int = 1
) -> Tensor:
    """From all heads of some tokens to some heads of all tokens.

    Args:
        tensor: (B, H, n, ...): the tokens of this rank.
        copies: each head goes to this many neighbouring ranks (for H < size).

    Returns:
        (B, H * copies / size, N, ...), in the order of the sequence; differentiable.
    """
    if copies > 1:
        tensor = tensor.repeat_interleave(copies, dim=1)
    parts = tensor.chunk(group.size, 1)  # of (B, H / size, n, ...)
    counts = [layout.length_of(rank) for rank in range(group.size)]
    shapes = [(*parts[0].shape[:2], count, *parts[0].shape[3:]) for count in counts]
    return layout.restore(all_to_all(parts, shapes, group), dim=2)


def heads_to_sequence(tensor: Tensor, group: ContextGroup, layout: SequenceLayout) -> Tensor:
    """The way back: (B, H / size, N, ...) to (B, H, n, ...)."""
    parts = [layout.split(tensor, rank, dim=2) for rank in range(group.size)]
    shapes = [tuple(parts[group.rank].shape)] * group.size
    return torch.cat(all_to_all(parts, shapes, group), dim=1)


def gather_sequence(
    tensor: Tensor, group: ContextGroup, layout: SequenceLayout, dim: int = -1
) -> Tensor:
    """The whole sequence on every rank, from the tokens of each; differentiable.

    Args:
        tensor: this rank's tokens along `dim`.
        dim: the sequence axis.

    Returns:
        As `tensor` with `layout.length` tokens, in order. The gradient of a rank's tokens is the
        sum over what all ranks did with them.
    """
    shapes = []
    for rank in range(group.size):
        shape = list(tensor.shape)
        shape[dim] = layout.length_of(rank)
        shapes.append(tuple(shape))
    parts = all_to_all([tensor] * group.size, shapes, group)
    return layout.restore(parts, dim)


def gather_ranks(tensor: Tensor, group: ContextGroup) -> Tensor:
    """(size, ...): the tensors of all ranks, of one shape, in order of rank; differentiable."""
    shapes = [tuple(tensor.shape)] * group.size
    return torch.stack(all_to_all([tensor] * group.size, shapes, group))


def fetch_rows(
    tensor: Tensor,
    group: ContextGroup,
    layout: Held,
    wanted: tuple[tuple[Span, ...], ...],
) -> Tensor:
    """Chosen tokens from wherever they are; differentiable.

    Args:
        tensor: (B, H, n, ...), this rank's tokens.
        wanted: for every rank the tokens it gets: disjoint spans, in order.

    Returns:
        (B, H, m, ...): the tokens of `wanted[group.rank]`, in order.
    """
    held = layout.spans(group.rank)
    sent, shapes, came = [], [], []
    for other in range(group.size):
        rows = [take_rows(tensor, held, span) for span in _common(held, wanted[other])]
        sent.append(torch.cat(rows, 2) if rows else tensor[:, :, :0])
        spans = _common(layout.spans(other), wanted[group.rank])
        shapes.append((*tensor.shape[:2], sum(s.length for s in spans), *tensor.shape[3:]))
        came += spans
    received = torch.cat(all_to_all(sent, shapes, group), 2)
    if came == sorted(came):
        return received
    index = torch.cat([torch.arange(a, b, device=tensor.device) for a, b in came])
    return received.index_select(2, torch.argsort(index))


def take_rows(tensor: Tensor, held: tuple[Span, ...], wanted: Span) -> Tensor:
    """The rows of `wanted`, which lies in one of the spans that the tensor holds; a view."""
    base = 0
    for span in held:
        if span.start <= wanted.start and wanted.stop <= span.stop:
            first = base + wanted.start - span.start
            return tensor[:, :, first : first + wanted.length]
        base += span.length
    raise AssertionError(f"{wanted} is not in {held}")


def tie(tensor: Tensor, *others: Tensor) -> Tensor:
    """`tensor`, whose backward also reaches `others`, with zeros.

    An exchange has a backward on every rank or on none: where a rank does not use what came, its
    result is tied to it.
    """
    return _Tie.apply(tensor, *others)  # type: ignore[no-any-return,no-untyped-call]


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *others: Tensor) -> Tensor:
        ctx.like = [(other.shape, other.dtype, other.device) for other in others]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros(s, dtype=d, device=where) for s, d, where in ctx.like)
        return grad, *zeros


def _common(held: tuple[Span, ...], wanted: tuple[Span, ...]) -> list[Span]:
    """Their intersection, in order."""
    both = [Span(max(a.start, b.start), min(a.stop, b.stop)) for a in held for b in wanted]
    return sorted(span for span in both if span.length > 0)


def all_to_all(
    parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], group: ContextGroup
) -> list[Tensor]:
    """One tensor to each rank, one from each; the gradient takes the way back.

    Args:
        parts: for ranks 0 .. size - 1; of any shapes.
        shapes: of what comes from each rank.
    """
    if group.size == 1:
        return [parts[0]]
    return list(_AllToAll.apply(group, tuple(shapes), *parts))  # type: ignore[no-untyped-call]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: ContextGroup, shapes: tuple[tuple[int, ...], ...], *parts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.shapes = tuple(tuple(part.shape) for part in parts)
        return _all_to_all(group, parts, shapes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *_all_to_all(ctx.group, grads, ctx.shapes)


def _all_to_all(
    group: ContextGroup, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]
) -> tuple[Tensor, ...]:
    own = group.rank
    leaving = [part.reshape(-1) for rank, part in enumerate(parts) if rank != own]
    counts = [torch.Size(shape).numel() for shape in shapes]
    sizes = [part.numel() for part in parts]
    counts[own] = sizes[own] = 0  # NCCL moves a rank's part to itself, too, and slowly
    sent = torch.cat(leaving) if len(leaving) > 1 else leaving[0].contiguous()
    received = sent.new_empty(sum(counts))
    with group.guard("all_to_all"):
        dist.all_to_all_single(received, sent, counts, sizes, group=group.group)
    pieces = list(torch.split(received, counts))
    pieces[own] = parts[own]
    return tuple(piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True))
