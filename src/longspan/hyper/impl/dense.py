"""Near keys, sinks, globals and columns, a block of queries at a time; the choice on the way.

The queries of a block have the same far chunks, so that all they visit is one matrix of scores:
columns of the far chunks, extra keys (sinks and globals of far chunks), near keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import HyperConfig
from ..plan import ChunkIndex, Columns
from .common import choice_scores

__all__ = ["Block", "Side", "blocks", "dense_backward", "dense_forward"]

_MOST_ROWS = 128


class Side(NamedTuple):
    """What the queries of a call meet, wide, heads of all batch entries in one axis E."""

    key: Tensor  # (E, N_k, D)
    value: Tensor  # (E, N_k, D_v)
    columns: Columns  # (E, C * R, ...)
    lookup: ChunkIndex
    config: HyperConfig
    is_causal: bool
    scale: float


class Block(NamedTuple):
    """Queries rows.start .. rows.stop, all with the same far chunks."""

    rows: slice
    position: int  # key index of the first row
    before: int  # far chunks 0 .. before - 1
    after: int  # far chunks after .. full - 1
    full: int  # chunks without padding
    keys: tuple[slice, ...]  # near keys
    num_keys: int  # of the call, without padding


def blocks(
    n_q: int, n_k: int, query_offset: int, is_causal: bool, config: HyperConfig
) -> Iterator[Block]:
    """Blocks of at most 128 queries; `geometry.far_before` and `far_after` in plain integers."""
    size, window, full = config.chunk_size, config.window, n_k // config.chunk_size

    def far(position: int) -> tuple[int, int]:
        before = min(max((position - window + 1) // size, 0), full)
        after = full if is_causal else min(max(-(-(position + window) // size), before), full)
        return before, after

    start = 0
    while start < n_q:
        position = start + query_offset
        before, after = far(position)
        stop = min(start + _MOST_ROWS, n_q)
        # The next rows at which a border moves: position - window + 1 or position + window - 1
        # reaches a multiple of the chunk size.
        for moving in (position - window + 1, position + window - 1):
            stop = min(stop, start + size - moving % size)
        last = stop - 1 + query_offset
        keys: tuple[slice, ...]
        if is_causal:
            keys = (slice(before * size, min(max(last + 1, before * size), n_k)),)
        elif after == full:
            keys = (slice(before * size, n_k),)
        else:
            keys = (slice(before * size, after * size), slice(full * size, n_k))
        yield Block(slice(start, stop), position, before, after, full, keys, n_k)
        start = stop


def dense_forward(
    q: Tensor, side: Side, block: Block, chosen: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial attention of the block's rows: output, lse, and what they open.

    q is (E, G, rows, D), scaled and wide. Returns (E, G, rows, D_v), (E, G, rows) and chosen
    (E, G, rows, P) int32, which is made here if it is None.
    """
    keys, values = _visited(side, block)
    scores, chosen = _scores(q, side, block, keys, chosen)
    top = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.sum(-1, True).log()
    top = top.masked_fill(top == float("-inf"), 0.0)  # -inf - -inf is NaN in rows without keys
    p = scores.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    output = p.flatten(1, 2) @ values
    empty = total == 0
    output = output.view(*q.shape[:-1], -1) / total.masked_fill(empty, 1.0)
    return output, (top + torch.log(total)).squeeze(-1), chosen


def dense_backward(
    q: Tensor,
    side: Side,
    block: Block,
    chosen: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    delta: Tensor,
    totals: tuple[Tensor, Tensor],
    column_totals: tuple[Tensor, Tensor, Tensor | None],
) -> Tensor:
    """Gradient of the scaled q; adds to those of keys, values and columns.

    lse and delta (E, G, rows) are of the whole rows; totals are wide, shaped like key and value,
    column_totals like the columns' key, value and variance.
    """
    keys, values = _visited(side, block)
    scores, _ = _scores(q, side, block, keys, chosen)
    rest = lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)  # p = 0 in rows without keys
    p = scores.sub_(rest).exp_()
    flat = p.flatten(1, 2)
    ds = (grad_output.flatten(1, 2) @ values.transpose(1, 2)).view_as(p)
    d_values = flat.transpose(1, 2) @ grad_output.flatten(1, 2)
    ds = ds.sub_(delta.unsqueeze(-1)).mul_(p).flatten(1, 2)
    rows = q.flatten(1, 2)
    dq = ds @ keys
    d_keys = ds.transpose(1, 2) @ rows
    spans = _column_spans(side, block)
    width = sum(span.stop - span.start for span in spans)
    if side.columns.variance is not None and column_totals[2] is not None:
        # scores += 1/2 sum_d q_d^2 variance_d, with q scaled already
        spread = _cut(side.columns.variance, spans)
        part = ds[..., :width]
        dq += rows * (part @ spread)
        _give(column_totals[2], spans, 0.5 * (part.transpose(1, 2) @ rows.square()))
    _give(column_totals[0], spans, d_keys[:, :width])
    _give(column_totals[1], spans, d_values[:, :width])
    extra = _extra(side, block)
    for total, grad in zip(totals, (d_keys, d_values), strict=True):
        if extra is not None:
            # Sinks and globals are different keys: each row of the target is written once.
            at = extra.unsqueeze(-1).expand(-1, -1, grad.shape[-1])
            part = grad[:, width : width + extra.shape[1]]
            total.scatter_(1, at, total.gather(1, at) + part)
        done = width + (0 if extra is None else extra.shape[1])
        for span in block.keys:
            total[:, span] += grad[:, done : done + span.stop - span.start]
            done += span.stop - span.start
    return dq.view_as(q)


def _column_spans(side: Side, block: Block) -> list[slice]:
    """Columns of the far chunks."""
    per_chunk = _per_chunk(side)
    spans = [slice(0, block.before * per_chunk)]
    if block.after < block.full:
        spans.append(slice(block.after * per_chunk, block.full * per_chunk))
    return spans


def _per_chunk(side: Side) -> int:
    chunks = side.lookup.counts.shape[2] // side.config.clusters_per_chunk
    return side.columns.key.shape[1] // max(chunks, 1)


def _extra(side: Side, block: Block) -> Tensor | None:
    """(E, n) int64 positions of the sinks and of the globals of far chunks, or None."""
    num_far = block.before + block.full - block.after
    if num_far == 0:
        return None
    sinks = min(side.config.num_sinks, block.num_keys) if block.before else 0
    count = side.key.shape[0]
    parts = [torch.arange(sinks, device=side.key.device).expand(count, -1)]
    globals_ = side.lookup.globals.flatten(0, 1)
    if globals_.shape[-1]:
        parts.append(globals_[:, : block.before].flatten(1).long())
        parts.append(globals_[:, block.after : block.full].flatten(1).long())
    extra = torch.cat(parts, 1)
    return extra if extra.shape[1] else None


def _cut(tensor: Tensor, spans: list[slice]) -> Tensor:
    return tensor[:, spans[0]] if len(spans) == 1 else torch.cat([tensor[:, s] for s in spans], 1)


def _give(total: Tensor, spans: list[slice], grad: Tensor) -> None:
    done = 0
    for span in spans:
        total[:, span] += grad[:, done : done + span.stop - span.start]
        done += span.stop - span.start


def _visited(side: Side, block: Block) -> tuple[Tensor, Tensor]:
    """Keys and values (E, visited, D or D_v): columns, extra keys, near keys."""
    spans, extra = _column_spans(side, block), _extra(side, block)
    sides = []
    for tensor, column in ((side.key, side.columns.key), (side.value, side.columns.value)):
        parts = [column[:, span] for span in spans]
        if extra is not None:
            parts.append(tensor.gather(1, extra.unsqueeze(-1).expand(-1, -1, tensor.shape[-1])))
        parts += [tensor[:, span] for span in block.keys]
        sides.append(torch.cat(parts, 1))
    return sides[0], sides[1]


def _scores(
    q: Tensor, side: Side, block: Block, keys: Tensor, chosen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(E, G, rows, visited), -inf where hidden, and chosen."""
    count, group, height, _ = q.shape
    scores = (q.flatten(1, 2) @ keys.transpose(1, 2)).view(count, group, height, -1)
    spans = _column_spans(side, block)
    width = sum(span.stop - span.start for span in spans)
    part = scores[..., :width]
    part += _cut(side.columns.bias, spans)[:, None, None]
    if chosen is None:
        chosen = _choose(q, side, block, part)
    if side.columns.variance is not None and width:
        spread = _cut(side.columns.variance, spans)
        part += 0.5 * (q.flatten(1, 2).square() @ spread.transpose(1, 2)).view_as(part)
    if width and chosen.shape[-1]:
        _hide_opened(part, side, block, chosen, spans)
    if side.is_causal:
        # Only the last `height - 1` near keys can lie after a row.
        start = max(block.keys[0].start, block.position + 1)
        late = block.keys[0].stop - start  # sinks of far chunks lie before every row
        if late > 0:
            after = torch.arange(start, block.keys[0].stop, device=q.device)
            row = torch.arange(height, device=q.device)[:, None] + block.position
            scores[..., scores.shape[-1] - late :].masked_fill_(after > row, float("-inf"))
    return scores, chosen


def _choose(q: Tensor, side: Side, block: Block, part: Tensor) -> Tensor:
    """As `common.choose`, from the scores of the block's columns where they are those of means."""
    config, per_chunk = side.config, side.config.clusters_per_chunk
    count, group, height, _ = q.shape
    clusters = side.lookup.counts.shape[2]
    probes = min(config.num_probes, clusters)
    chosen = torch.full((count, group, height, probes), -1, dtype=torch.int32, device=q.device)
    num_far = (block.before + block.full - block.after) * per_chunk
    best = min(probes, num_far)
    if best == 0:
        return chosen
    spans = [slice(0, block.before * per_chunk)]
    if block.after < block.full:
        spans.append(slice(block.after * per_chunk, block.full * per_chunk))
    if config.residual != "centroid" or config.probe_spread:
        index = side.lookup
        mean, variance, counts = (
            _cut(t.flatten(0, 1), spans) for t in (index.mean_key, index.variance, index.counts)
        )
        part = choice_scores(q.flatten(1, 2), mean, variance, config.probe_spread)
        part += torch.log(counts.to(part.dtype)).unsqueeze(1)
        part = part.view(count, group, height, -1)
    top = part.topk(best, -1)
    names = top.indices
    if len(spans) == 2:
        names = names + (names >= spans[0].stop) * (spans[1].start - spans[0].stop)
    usable = top.values > float("-inf")
    chosen[..., :best] = torch.where(usable, names, -1).to(torch.int32)
    return chosen


def _hide_opened(
    part: Tensor, side: Side, block: Block, chosen: Tensor, spans: list[slice]
) -> None:
    """Columns whose cluster a row has opened get -inf."""
    picks = chosen.long()
    if side.config.residual == "centroid":
        width = part.shape[-1]
        if len(spans) == 2:
            picks = picks - (picks >= spans[1].start) * (spans[1].start - spans[0].stop)
        # What is not open points at a spare column, which is dropped.
        padded = torch.zeros((*part.shape[:-1], width + 1), dtype=torch.bool, device=part.device)
        padded.scatter_(3, torch.where(chosen < 0, width, picks), True)
        part.masked_fill_(padded[..., :width], float("-inf"))
        return
    clusters = side.lookup.counts.shape[2]
    opened = torch.zeros((*part.shape[:-1], clusters + 1), dtype=torch.bool, device=part.device)
    opened.scatter_(3, torch.where(chosen < 0, clusters, picks), True)
    owner = _cut(side.columns.owner, spans).long()[:, None, None].expand(part.shape)
    part.masked_fill_(opened.gather(3, owner), float("-inf"))
