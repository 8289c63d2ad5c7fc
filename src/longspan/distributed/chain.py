"""Stick-breaking over several ranks: every chunk of queries meets the key chunks nearest first.

A partial result over a run of keys is (output, log_rest); nearer o farther is associative but not
commutative, so that the order of visits matters. Chunk c of the keys starts where the queries of
chunk c are and moves one chunk towards later queries per step: at step t the queries of chunk c
see the keys of chunk c - t. In a zigzag layout early and late chunks move in opposite directions.
Once no query anywhere has stick left (`early_stop`), all ranks stop.

The backward walks the same way again. With L_i the stick that is left before part i, o = sum_i
exp(L_i) o_i and l = sum_i l_i, part i gets do_i = exp(L_i) do and
dl_i = dl + do . (o - sum_{m up to i} exp(L_m) o_m): what all farther parts give. Parts are computed
again, so that memory does not grow with the number of ranks, or kept (`recompute=False`); gradients
of keys travel with them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._merge import merge_stick_breaking
from ..stick_breaking.api import StickBreakingOutput, stick_breaking_attention_with_remainder
from ..stick_breaking.config import StickBreakingConfig
from .exchange import Message, Transfer, start_transfer
from .group import ContextGroup
from .layout import SequenceLayout, Span
from .tiles import local_lengths, span_tiles

__all__ = ["ChainInputs", "stick_breaking_chain"]

_NAME = "ring_attention"
_ROWS = 256  # a multiple of every implementation's block of queries


class ChainInputs(NamedTuple):
    """This rank's tokens: query (B, H, n, D), key and value (B, H_kv, n, .); key_lengths (B,) and
    everything else is about the whole sequence."""

    query: Tensor
    key: Tensor
    value: Tensor
    logit_bias: Tensor | None
    key_lengths: Tensor | None


class _Plan(NamedTuple):
    group: ContextGroup
    layout: SequenceLayout
    scale: float
    config: StickBreakingConfig  # without window and remainder
    impl: str
    recompute: bool

    @property
    def spent(self) -> float:
        """log_rest below which a stick counts as spent."""
        stop = self.config.early_stop
        return float("-inf") if stop is None else math.log(stop)


class _Part(NamedTuple):
    """A computed tile, with the leaves that its gradients are taken at."""

    query: Tensor
    key: Tensor
    value: Tensor
    logit_bias: Tensor | None
    result: StickBreakingOutput


class _Tile(NamedTuple):
    chunk: int  # of the keys
    rows: slice  # of this rank's queries
    columns: slice  # of the chunk
    keys: Span  # the same in the whole sequence
    is_diagonal: bool


def stick_breaking_chain(
    inputs: ChainInputs,
    config: StickBreakingConfig,
    group: ContextGroup,
    layout: SequenceLayout,
    scale: float,
    impl: str,
    recompute: bool,
) -> StickBreakingOutput:
    """(output, log_rest) of this rank's queries over the keys of all ranks, remainder dropped."""
    config = dataclasses.replace(config, window=None, remainder="drop")
    plan = _Plan(group, layout, scale, config, impl, recompute)
    return StickBreakingOutput(*_Chain.apply(*inputs, plan))  # type: ignore[no-untyped-call]


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        logit_bias: Tensor | None,
        key_lengths: Tensor | None,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor]:
        inputs = ChainInputs(query, key, value, logit_bias, key_lengths)
        output, log_rest = _empty(query, value)
        walk = _Walk(plan, key, value)
        keep = not plan.recompute and any(ctx.needs_input_grad)
        kept: list[_Part] = []
        for step in walk.steps(plan.layout.num_chunks):
            for whole in walk.tiles(step):
                tile = _alive(plan, whole, log_rest)
                if tile is None:
                    continue
                part = _part(plan, inputs, tile, walk.keys(tile), wants_grad=keep)
                if keep:
                    kept.append(part)
                held = (output[:, :, tile.rows], log_rest[:, :, tile.rows])
                merged = merge_stick_breaking(
                    [held, (part.result[0].detach(), part.result[1].detach())]
                )
                counts = held[1] >= plan.spent
                output[:, :, tile.rows] = torch.where(counts.unsqueeze(-1), merged[0], held[0])
                log_rest[:, :, tile.rows] = torch.where(counts, merged[1], held[1])
            if plan.config.early_stop is not None and walk.all_spent(step, log_rest):
                break
        ctx.plan, ctx.num_steps, ctx.kept = plan, step + 1, kept
        ctx.save_for_backward(*inputs, output)
        ctx.set_materialize_grads(False)
        return output.to(query.dtype, copy=True), log_rest

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_log_rest: Tensor | None
    ) -> tuple[Any, ...]:
        plan: _Plan = ctx.plan
        *saved, whole = ctx.saved_tensors
        inputs, wide = ChainInputs(*saved), whole.dtype
        do = torch.zeros_like(whole) if grad_output is None else grad_output.to(wide)
        # dl + do . (the sum of all parts farther than those seen so far)
        farther = (do * whole).sum(-1)
        if grad_log_rest is not None:
            farther += grad_log_rest
        log_rest = torch.zeros_like(farther)
        dq = torch.zeros_like(inputs.query, dtype=wide)
        bias = inputs.logit_bias
        dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        walk = _Walk(plan, inputs.key, inputs.value, wide)
        kept = iter(ctx.kept)
        for step in walk.steps(ctx.num_steps):
            for full in walk.tiles(step):
                tile = _alive(plan, full, log_rest)
                if tile is None:
                    continue
                part = next(kept, None) or _part(
                    plan, inputs, tile, walk.keys(tile), wants_grad=True
                )
                o_i, l_i = (t.detach() for t in part.result)
                left = log_rest[:, :, tile.rows]
                counts = left >= plan.spent
                do_i = do[:, :, tile.rows] * torch.where(counts, left.exp(), 0.0).unsqueeze(-1)
                farther[:, :, tile.rows] -= (do_i * o_i.to(wide)).sum(-1)
                dl_i = torch.where(counts, farther[:, :, tile.rows], 0.0)
                leaves = [leaf for leaf in part[:4] if leaf is not None]
                grads = torch.autograd.grad(
                    part.result, leaves, (do_i.to(o_i.dtype), dl_i), retain_graph=not plan.recompute
                )
                dq[:, :, tile.rows] += grads[0]
                walk.add_gradients(tile, grads[1], grads[2])
                if dbias is not None:
                    dbias += grads[3]
                left += torch.where(counts, l_i, 0.0)
        dk, dv = walk.gradients()
        query, key, value = inputs[:3]
        dbias = None if dbias is None or bias is None else dbias.to(bias.dtype)
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), dbias, None, None


class _Walk:
    """The way of the key chunks through the ranks: which is where at each step.

    Queries of chunk c are at slot c, which never moves; at step t it holds key chunk c - t.
    """

    def __init__(
        self, plan: _Plan, key: Tensor, value: Tensor, wide: torch.dtype | None = None
    ) -> None:
        self._plan, self._wide = plan, wide
        self._like = (key, value)
        layout, rank = plan.layout, plan.group.rank
        self._slots: dict[int, slice] = {}  # slot -> this rank's rows
        start = 0
        for slot in layout.chunks_of(rank):
            stop = start + layout.chunk(slot).length
            self._slots[slot] = slice(start, stop)
            start = stop
        self._held = {  # key chunk -> its keys and values
            slot: (key[:, :, rows], value[:, :, rows]) for slot, rows in self._slots.items()
        }
        self._own: dict[int, list[Tensor]] = {}  # key chunk -> gradients made here at this step
        self._home: dict[int, list[Tensor]] = {}  # own chunk -> its gradients, complete
        self._coming: dict[int, list[Tensor]] = {}  # key chunk -> gradients made before
        self._gradients_under_way: Transfer | None = None

    def steps(self, most: int) -> Iterator[int]:
        """0, 1, ..; keys of the next step come, and gradients go, while the caller computes."""
        for step in range(most):
            if self._wide is not None:
                self._own = {chunk: self._zeros(chunk, self._wide) for chunk in self._held}
            arriving, under_way = self._send_keys(step, most)
            yield step
            if self._wide is not None:
                self._send_gradients(step, most)
            under_way.wait()
            self._held = arriving

    def tiles(self, step: int) -> Iterator[_Tile]:
        """What this rank computes at a step."""
        layout = self._plan.layout
        for slot, rows in self._slots.items():
            if slot < step:
                continue
            queries, columns = layout.chunk(slot), layout.chunk(slot - step)
            for q, k, _ in span_tiles(layout, queries, columns, True):
                first, left = rows.start + q.start - queries.start, k.start - columns.start
                yield _Tile(
                    slot - step, slice(first, first + q.length), slice(left, left + k.length),
                    k, step == 0,
                )  # fmt: skip

    def keys(self, tile: _Tile) -> tuple[Tensor, Tensor]:
        """The keys and values of a tile."""
        k, v = self._held[tile.chunk]
        return k[:, :, tile.columns], v[:, :, tile.columns]

    def all_spent(self, step: int, log_rest: Tensor) -> bool:
        """Whether no query of any rank that has keys to come has any stick left."""
        waiting = [rows for slot, rows in self._slots.items() if slot > step]
        left = torch.zeros((), dtype=torch.int32, device=log_rest.device)
        for rows in waiting:
            left += (log_rest[:, :, rows] >= self._plan.spent).any()
        group = self._plan.group
        if group.size > 1:
            with group.guard(_NAME):
                dist.all_reduce(left, group=group.group)
        return not bool(left)

    def add_gradients(self, tile: _Tile, dk: Tensor, dv: Tensor) -> None:
        """This rank's share for the keys of a tile."""
        for total, grad in zip(self._own[tile.chunk], (dk, dv), strict=True):
            total[:, :, tile.columns] += grad

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Those of this rank's own keys and values, from all ranks; after the last step."""
        if self._gradients_under_way is not None:
            self._gradients_under_way.wait()
        own = [self._home[slot] for slot in self._slots]
        return torch.cat([dk for dk, _ in own], 2), torch.cat([dv for _, dv in own], 2)

    def _send_keys(self, step: int, most: int) -> tuple[dict[int, tuple[Tensor, Tensor]], Transfer]:
        """What this rank holds at the next step, and the transfer that brings it."""
        layout, group = self._plan.layout, self._plan.group
        arriving: dict[int, tuple[Tensor, Tensor]] = {}
        sends: list[Message] = []
        receives: list[Message] = []
        last = layout.num_chunks - 1
        for slot in range(step, last if step + 1 < most else 0):
            chunk, here, there = slot - step, layout.owner(slot), layout.owner(slot + 1)
            if here == there == group.rank:
                arriving[chunk] = self._held[chunk]
            elif here == group.rank:
                sends += [Message(tensor, there) for tensor in self._held[chunk]]
            elif there == group.rank:
                k, v = self._empties(chunk)
                arriving[chunk] = (k, v)
                receives += [Message(k, here), Message(v, here)]
        return arriving, start_transfer(group, _NAME, sends, receives)

    def _send_gradients(self, step: int, most: int) -> None:
        """On to where the keys go, or home after their last visit."""
        layout, group = self._plan.layout, self._plan.group
        if self._gradients_under_way is not None:
            self._gradients_under_way.wait()
        for chunk, made in self._own.items():
            if chunk in self._coming:
                for total, before in zip(made, self._coming[chunk], strict=True):
                    total += before
        self._coming = {}
        sends: list[Message] = []
        receives: list[Message] = []
        for slot in range(step, layout.num_chunks):
            chunk, here = slot - step, layout.owner(slot)
            is_last = slot + 1 == layout.num_chunks or step + 1 == most
            there = layout.owner(chunk if is_last else slot + 1)
            target = self._home if is_last else self._coming
            if here == there == group.rank:
                target[chunk] = self._own[chunk]
            elif here == group.rank:
                sends += [Message(tensor, there) for tensor in self._own[chunk]]
            elif there == group.rank:
                assert self._wide is not None
                target[chunk] = self._zeros(chunk, self._wide)
                receives += [Message(tensor, here) for tensor in target[chunk]]
        self._gradients_under_way = start_transfer(group, _NAME, sends, receives)

    def _empties(self, chunk: int) -> tuple[Tensor, Tensor]:
        count = self._plan.layout.chunk(chunk).length
        k, v = (t.new_empty((*t.shape[:2], count, t.shape[3])) for t in self._like)
        return k, v

    def _zeros(self, chunk: int, dtype: torch.dtype) -> list[Tensor]:
        return [torch.zeros_like(tensor, dtype=dtype) for tensor in self._empties(chunk)]


def _empty(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """No key seen: zeros, and the whole stick left."""
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    output = query.new_zeros((*query.shape[:3], value.shape[-1]), dtype=wide)
    return output, query.new_zeros(query.shape[:3], dtype=wide)


def _alive(plan: _Plan, tile: _Tile, log_rest: Tensor) -> _Tile | None:
    """The tile up to its last row with stick left, None if there is none; it looks (a
    synchronisation) with early_stop only. Whole blocks: a row's block mates stay the same."""
    if plan.config.early_stop is None:
        return tile
    alive = (log_rest[:, :, tile.rows] >= plan.spent).flatten(0, 1).any(0)
    count = int((torch.arange(1, alive.numel() + 1, device=alive.device) * alive).amax())
    if count == 0:
        return None
    stop = min(tile.rows.start - (-count // _ROWS) * _ROWS, tile.rows.stop)
    return tile._replace(rows=slice(tile.rows.start, stop))


def _part(
    plan: _Plan,
    inputs: ChainInputs,
    tile: _Tile,
    keys: tuple[Tensor, Tensor],
    *,
    wants_grad: bool,
) -> _Part:
    bias = inputs.logit_bias
    leaves = [inputs.query[:, :, tile.rows], *keys, *([] if bias is None else [bias])]
    if wants_grad:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    query, key, value = leaves[:3]
    own_bias = None if bias is None else leaves[3]
    with torch.set_grad_enabled(wants_grad):
        result = stick_breaking_attention_with_remainder(
            query,
            key,
            value,
            is_causal=True,
            scale=plan.scale,
            enable_gqa=True,
            # On the diagonal, rows may end before the keys do: those are of later rows.
            query_offset=0 if tile.is_diagonal else key.shape[2],
            key_lengths=local_lengths(inputs.key_lengths, (tile.keys,)),
            logit_bias=own_bias,
            config=plan.config,
            impl=plan.impl,
        )
    return _Part(query, key, value, own_bias, result)
