"""HyperAttention of some queries over keys that were fetched: near rows, columns, opened clusters.

The arithmetic is that of `longspan.hyper` on one device; what differs is where the tensors come
from, and that near keys are numbered from the first one that is here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hyper.config import HyperConfig
from ..hyper.impl.dense import Block, Side, blocks, dense_backward, dense_forward
from ..hyper.impl.opened import Pieces, opened_backward, opened_forward
from ..hyper.plan import ChunkIndex, Columns
from ..types import AttentionOutput

__all__ = ["Fetched", "attend_fetched"]

_ENTRIES_AT_ONCE = 2**24  # elements of the queries of opened clusters gathered at a time


class Fetched(NamedTuple):
    """What some consecutive queries meet, E = B H_kv groups, all wide.

    key, value: (E, m, .): sinks (if there is a gap), near keys, then the globals.
    shift: what to add to a position of the sequence for its place among the near keys.
    columns: of the far chunks 0 .. C - 1.
    lookup: of the same chunks; `globals` are places in `key`, the rest counts and means.
    pieces: the opened clusters.
    """

    key: Tensor
    value: Tensor
    shift: int
    columns: Columns
    lookup: ChunkIndex
    pieces: Pieces


class _Plan(NamedTuple):
    """What does not depend on the tensors' values."""

    config: HyperConfig
    scale: float
    start: int  # position of the first query
    length: int  # of the whole sequence
    shift: int


def attend_fetched(
    query: Tensor,
    fetched: Fetched,
    chosen: Tensor,
    config: HyperConfig,
    scale: float,
    start: int,
    length: int,
) -> AttentionOutput:
    """Causal HyperAttention of the queries at start, start + 1, .. of a sequence.

    Args:
        query: (B, H, n, D).
        chosen: (B, H, n, P) int32, the clusters that each query opens; -1: none.
        length: tokens of the whole sequence.

    Returns:
        output (B, H, n, D_v) in `query.dtype`, lse (B, H, n) wide. Differentiable in the query and
        in what was fetched, with the choice held fixed.
    """
    plan = _Plan(config, scale, start, length, fetched.shift)
    columns, pieces = fetched.columns, fetched.pieces
    fixed = (columns.bias, columns.owner, *fetched.lookup, chosen, pieces.bias, pieces.first,
             pieces.number, pieces.slots)  # fmt: skip
    output, lse = _Attend.apply(  # type: ignore[no-untyped-call]
        plan, query, fetched.key, fetched.value, columns.key, columns.value, columns.variance,
        pieces.keys, pieces.values, *fixed,
    )  # fmt: skip
    return AttentionOutput(output, lse)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, query: Tensor, *tensors: Any) -> tuple[Tensor, Tensor]:
        side, pieces, chosen = _assembled(plan, tensors)
        groups, batch = side.key.shape[0], query.shape[0]
        q_all, picks = _grouped(query, groups), _grouped(chosen, groups)
        outputs, lses = [], []
        for rows, run in _runs(plan, query, side):
            q = plan.scale * q_all[:, :, rows].to(side.key.dtype)
            parts = [
                dense_forward(q[:, :, _inside(b, rows)], side, b, picks[:, :, b.rows])[:2]
                for b in run
            ]
            near, near_lse = (torch.cat(some, 2) for some in zip(*parts, strict=True))
            far = opened_forward(q.unsqueeze(0), picks[:, :, rows].unsqueeze(0), pieces)
            output, lse = _join(near, near_lse, far[0].squeeze(0), far[1].squeeze(0))
            outputs.append(output)
            lses.append(lse)
        output = torch.cat(outputs, 2).reshape(batch, query.shape[1], query.shape[2], -1)
        lse = torch.cat(lses, 2).reshape(query.shape[:3])
        output = output.to(query.dtype)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, output, lse, *tensors)
        return output, lse

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        plan: _Plan = ctx.plan
        query, output, lse, *tensors = ctx.saved_tensors
        side, pieces, chosen = _assembled(plan, tensors)
        wide, groups = side.key.dtype, side.key.shape[0]
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        do_all = grad_output.to(wide)
        delta_all = (do_all * output.to(wide)).sum(-1)
        if grad_lse is not None:
            delta_all = delta_all - grad_lse.to(wide)
        q_all, picks, do_all, delta_all, lse = (
            _grouped(t, groups) for t in (query, chosen, do_all, delta_all, lse)
        )
        dq = torch.zeros_like(q_all, dtype=wide)
        d_keys = (torch.zeros_like(side.key), torch.zeros_like(side.value))
        columns = side.columns
        d_columns = (
            torch.zeros_like(columns.key),
            torch.zeros_like(columns.value),
            None if columns.variance is None else torch.zeros_like(columns.variance),
        )
        d_pieces = (torch.zeros_like(pieces.keys), torch.zeros_like(pieces.values[..., :-1]))
        for rows, run in _runs(plan, query, side):
            q = plan.scale * q_all[:, :, rows].to(wide)
            do, delta, rest = (t[:, :, rows] for t in (do_all, delta_all, lse))
            d_rows = opened_backward(
                q.unsqueeze(0), picks[:, :, rows].unsqueeze(0), pieces, rest.contiguous(),
                do.contiguous(), delta.contiguous(), *d_pieces,
            ).squeeze(0)  # fmt: skip
            for block in run:
                at = _inside(block, rows)
                d_rows[:, :, at] += dense_backward(
                    q[:, :, at], side, block, picks[:, :, block.rows], rest[:, :, at],
                    do[:, :, at], delta[:, :, at], d_keys, d_columns,
                )  # fmt: skip
            dq[:, :, rows] = plan.scale * d_rows
        dq = dq.reshape(query.shape).to(query.dtype)
        d_values = torch.nn.functional.pad(d_pieces[1], (0, 1))
        rest_of_inputs = len(tensors) - 7
        return None, dq, *d_keys, *d_columns, d_pieces[0], d_values, *(None,) * rest_of_inputs


def _assembled(plan: _Plan, tensors: Any) -> tuple[Side, Pieces, Tensor]:
    key, value, column_key, column_value, variance, piece_keys, piece_values, *fixed = tensors
    count = len(ChunkIndex._fields)
    bias, owner, lookup, (chosen, *slots) = (
        fixed[0],
        fixed[1],
        fixed[2 : 2 + count],
        fixed[2 + count :],
    )
    columns = Columns(column_key, column_value, bias, owner, variance)
    side = Side(key, value, columns, ChunkIndex(*lookup), plan.config, True, plan.scale)
    return side, Pieces(piece_keys, piece_values, *slots), chosen


def _runs(plan: _Plan, query: Tensor, side: Side) -> list[tuple[slice, list[Block]]]:
    """Consecutive blocks, with near keys numbered as they lie here, in runs of bounded size."""
    batch, heads, count, dim = query.shape
    per_row = batch * heads * max(plan.config.num_probes, 1) * max(dim, side.value.shape[-1])
    most = max(1, _ENTRIES_AT_ONCE // per_row)
    runs: list[tuple[slice, list[Block]]] = []
    for block in blocks(count, plan.length, plan.start, True, plan.config):
        near = block.keys[0]
        near = slice(near.start + plan.shift, near.stop + plan.shift)
        block = block._replace(keys=(near,), position=block.position + plan.shift)
        if runs and block.rows.stop - runs[-1][0].start <= most:
            first, run = runs.pop()
            runs.append((slice(first.start, block.rows.stop), [*run, block]))
        else:
            runs.append((block.rows, [block]))
    return runs


def _inside(block: Block, rows: slice) -> slice:
    return slice(block.rows.start - rows.start, block.rows.stop - rows.start)


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """(B, H, n, ...) to (B H_kv, G, n, ...)."""
    group = tensor.shape[0] * tensor.shape[1] // groups
    return tensor.reshape(groups, group, *tensor.shape[2:])


def _join(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Near and opened keys; every row of a causal call has a near key, so a_lse is finite."""
    top = torch.maximum(a_lse, b_lse)
    wa, wb = torch.exp(a_lse - top), torch.exp(b_lse - top)
    total = wa + wb
    output = a * (wa / total).unsqueeze(-1) + b * (wb / total).unsqueeze(-1)
    return output, top + torch.log(total)
