"""Exact attention on a ring: keys and values go round, queries stay (arXiv:2310.01889).

At step t rank r holds the keys of rank r - t, and sends them on while it computes with them. Parts
join by (output, lse), exactly. The backward goes round again with the output and lse of the whole
row, so that the gradients of parts simply add up; those of the keys travel with the keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._merge import merge
from .._validation import Call
from ..exact.ops import exact_bwd, exact_fwd
from ..types import AttentionOutput
from .exchange import Message, Transfer, start_transfer
from .group import ContextGroup
from .layout import SequenceLayout
from .tiles import Tile, local_lengths, tiles

__all__ = ["exact_ring"]

_NAME = "ring_attention"
_LEAST_CUDNN = 256  # rows and columns of a tile


class _Plan(NamedTuple):
    """What does not change on the way round."""

    group: ContextGroup
    layout: SequenceLayout
    is_causal: bool
    scale: float
    backend: str


def exact_ring(
    call: Call, group: ContextGroup, layout: SequenceLayout, backend: str
) -> AttentionOutput:
    """Softmax attention of this rank's queries over the keys of all ranks, with lse.

    `call` holds this rank's tokens; `key_lengths` counts in the whole sequence.
    """
    plan = _Plan(group, layout, call.is_causal, call.scale, backend)
    arguments = (call.query, call.key, call.value, call.key_lengths, plan)
    output, lse = _ExactRing.apply(*arguments)  # type: ignore[no-untyped-call]
    return AttentionOutput(output, lse)


class _ExactRing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        wide = _wide(query)
        rows = query.shape[:3]
        output = query.new_zeros((*rows, value.shape[-1]), dtype=wide)
        lse = query.new_full(rows, float("-inf"), dtype=wide)
        for owner, k, v in _keys_around(plan, key, value):
            for tile in tiles(plan.layout, plan.group.rank, owner, plan.is_causal):
                span = slice(tile.q_start, tile.q_stop)
                part = AttentionOutput(*exact_fwd(
                    query[:, :, span], *_columns(tile, k, v), None,
                    local_lengths(key_lengths, tile.columns), tile.is_causal, plan.scale, 0,
                    _backend(plan, tile),
                ))  # fmt: skip
                held = AttentionOutput(output[:, :, span], lse[:, :, span])
                output[:, :, span], lse[:, :, span] = merge([held, part])
        output = output.to(query.dtype)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, key_lengths, output, lse)
        return output, lse

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        plan: _Plan = ctx.plan
        query, key, value, key_lengths, output, lse = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        wide = _wide(query)
        dq = torch.zeros_like(query, dtype=wide)
        sums = _GradientsAround(plan, key, value, wide)
        for owner, k, v in _keys_around(plan, key, value):
            dk = torch.zeros_like(k, dtype=wide)
            dv = torch.zeros_like(v, dtype=wide)
            for tile in tiles(plan.layout, plan.group.rank, owner, plan.is_causal):
                span = slice(tile.q_start, tile.q_stop)
                part = exact_bwd(
                    grad_output[:, :, span], None if grad_lse is None else grad_lse[:, :, span],
                    query[:, :, span], *_columns(tile, k, v), output[:, :, span], lse[:, :, span],
                    None, local_lengths(key_lengths, tile.columns), tile.is_causal, plan.scale, 0,
                    _backend(plan, tile),
                )  # fmt: skip
                dq[:, :, span] += part[0]
                dk[:, :, tile.k_start : tile.k_stop] += part[1]
                dv[:, :, tile.k_start : tile.k_stop] += part[2]
            sums.add(owner, dk, dv)
        dk, dv = sums.home()
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None


def _keys_around(plan: _Plan, key: Tensor, value: Tensor) -> Any:
    """(owner, its keys, its values) for all ranks, own first; the next come while one is used."""
    group, layout = plan.group, plan.layout
    k, v = key, value
    for step in range(group.size):
        owner = (group.rank - step) % group.size
        under_way: Transfer | None = None
        if step + 1 < group.size:
            count = layout.length_of((owner - 1) % group.size)
            coming = [t.new_empty((*t.shape[:2], count, t.shape[3])) for t in (key, value)]
            under_way = start_transfer(
                group, _NAME,
                [Message(k, group.rank + 1), Message(v, group.rank + 1)],
                [Message(tensor, group.rank - 1) for tensor in coming],
            )  # fmt: skip
        yield owner, k, v
        if under_way is not None:
            under_way.wait()
            k, v = coming


class _GradientsAround:
    """Gradients of keys and values that follow them around and come home."""

    def __init__(self, plan: _Plan, key: Tensor, value: Tensor, wide: torch.dtype) -> None:
        self._plan, self._wide = plan, wide
        self._like = (key, value)
        self._coming: list[Tensor] = []
        self._under_way: Transfer | None = None

    def add(self, owner: int, dk: Tensor, dv: Tensor) -> None:
        """This rank's share for the keys of `owner`; goes on with that of the ranks before."""
        group = self._plan.group
        if self._under_way is not None:
            self._under_way.wait()
            dk, dv = dk + self._coming[0], dv + self._coming[1]
        following = (owner - 1) % group.size  # whose keys this rank holds next; own: they are home
        count = self._plan.layout.length_of(following)
        self._coming = [
            t.new_empty((*t.shape[:2], count, t.shape[3]), dtype=self._wide) for t in self._like
        ]
        if group.size == 1:
            self._coming = [dk, dv]
            return
        self._under_way = start_transfer(
            group, _NAME,
            [Message(dk, group.rank + 1), Message(dv, group.rank + 1)],
            [Message(tensor, group.rank - 1) for tensor in self._coming],
        )  # fmt: skip

    def home(self) -> tuple[Tensor, Tensor]:
        """The sums for this rank's own keys, once they have gone all the way round."""
        if self._under_way is not None:
            self._under_way.wait()
        return self._coming[0], self._coming[1]


def _backend(plan: _Plan, tile: Tile) -> str:
    """cuDNN for large tiles; scraps of documents go to flash, which takes every shape."""
    least = min(tile.q_stop - tile.q_start, tile.k_stop - tile.k_start)
    return "flash" if plan.backend == "cudnn" and least < _LEAST_CUDNN else plan.backend


def _columns(tile: Tile, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    span = slice(tile.k_start, tile.k_stop)
    return k[:, :, span], v[:, :, span]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32
