"""Few queries against a long cache in plain torch: reads only what the queries visit."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._validation import Call
from ..config import HyperConfig
from ..plan import ChunkIndex, Columns
from .common import choice_scores, wide_dtype
from .dense import blocks

__all__ = ["MOST_QUERIES", "decode_forward"]

MOST_QUERIES = 16


def decode_forward(
    call: Call, config: HyperConfig, index: ChunkIndex, columns: Columns
) -> tuple[Tensor, Tensor]:
    """Output and lse of a causal call without key_lengths, as `eager_forward`, no gradient."""
    wide = wide_dtype(call)
    batch, heads, n_q, dim = call.query.shape
    kv_heads, width = call.key.shape[1], call.value.shape[-1]
    group = heads // kv_heads
    output = call.query.new_zeros((batch, heads, n_q, width))
    lse = call.query.new_full((batch, heads, n_q), float("-inf"), dtype=wide)
    per_chunk = config.clusters_per_chunk
    for block in blocks(n_q, call.key.shape[2], call.query_offset, True, config):
        rows = block.rows
        q = (call.scale * call.query[:, :, rows].to(wide)).reshape(batch, kv_heads, -1, dim)
        near = block.keys[0]
        keys, values = [call.key[:, :, near]], [call.value[:, :, near]]
        place = torch.arange(near.start, near.stop, device=q.device)
        at = torch.arange(rows.start, rows.stop, device=q.device) + call.query_offset
        hidden = [(place > at[:, None]).repeat(group, 1).expand(batch, kv_heads, -1, -1)]
        if block.before:
            extra = index.globals[:, :, : block.before].flatten(2).long()
            sinks = torch.arange(config.num_sinks, device=q.device).expand(batch, kv_heads, -1)
            extra = torch.cat((sinks, extra), 2)
            keys.append(_take(call.key, extra))
            values.append(_take(call.value, extra))
            hidden.append(hidden[0].new_zeros(()).expand(*q.shape[:3], extra.shape[2]))
        scores = [q @ torch.cat(keys, 2).to(wide).transpose(-1, -2)]
        scores[0] = scores[0].masked_fill(torch.cat(hidden, -1), float("-inf"))
        totals = [torch.cat(values, 2).to(wide)]
        opened = None
        if block.before:
            clusters = block.before * per_chunk
            drawn = columns.key.shape[2] // max(index.globals.shape[2], 1) * block.before
            names = _choose(q, config, index, clusters)
            far = q @ columns.key[:, :, :drawn].transpose(-1, -2)
            if columns.variance is not None:
                spread = columns.variance[:, :, :drawn].transpose(-1, -2)
                far = far + 0.5 * (q.square() @ spread)
            far = far + columns.bias[:, :, :drawn].unsqueeze(2)
            marks = torch.zeros((*q.shape[:3], clusters + 1), dtype=torch.bool, device=q.device)
            marks.scatter_(3, torch.where(names < 0, clusters, names), True)
            owner = columns.owner[:, :, :drawn].long().unsqueeze(2).expand(far.shape)
            scores.append(far.masked_fill(marks.gather(3, owner), float("-inf")))
            totals.append(columns.value[:, :, :drawn])
            opened = _opened(call, index, names, wide)
        if opened is not None:
            open_keys, _, missing = opened
            part = (open_keys @ q.unsqueeze(-1)).squeeze(-1)
            scores.append(part.masked_fill(missing, float("-inf")))
        joined = torch.cat(scores, -1)
        top = joined.amax(-1, keepdim=True)
        top = top.masked_fill(top == float("-inf"), 0.0)
        p = torch.exp(joined - top)
        mass = p.sum(-1, keepdim=True)
        parts = torch.split(p, [s.shape[-1] for s in scores], -1)
        result = parts[0] @ totals[0]
        if len(totals) > 1:
            result = result + parts[1] @ totals[1]
        if opened is not None:
            result = result + (parts[-1].unsqueeze(-2) @ opened[1]).squeeze(-2)
        result = result / mass.masked_fill(mass == 0, 1.0)
        output[:, :, rows] = result.reshape(batch, heads, -1, width).to(output.dtype)
        lse[:, :, rows] = (top + torch.log(mass)).reshape(batch, heads, -1)
    return output, lse


def _choose(q: Tensor, config: HyperConfig, index: ChunkIndex, clusters: int) -> Tensor:
    """(B, H_kv, rows, P) int64, -1: none; among the first `clusters` clusters."""
    flat = q.flatten(0, 1)
    scores = choice_scores(
        flat,
        index.mean_key[:, :, :clusters].flatten(0, 1),
        index.variance[:, :, :clusters].flatten(0, 1),
        config.probe_spread,
    ).view(*q.shape[:3], clusters)
    scores += torch.log(index.counts[:, :, :clusters].to(q.dtype)).unsqueeze(2)
    best = scores.topk(min(config.num_probes, clusters), -1)
    return torch.where(best.values > float("-inf"), best.indices, -1)


def _opened(
    call: Call, index: ChunkIndex, names: Tensor, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Keys and values (B, H_kv, rows, n, .) of the opened clusters, and which are none."""
    flat = names.clamp(min=0).flatten(2)
    counts = index.counts.long().gather(2, flat).view(names.shape)
    counts = counts.masked_fill(names < 0, 0)
    most = int(counts.amax()) if counts.numel() else 0
    if most == 0:
        return None
    rank = torch.arange(most, device=names.device)
    starts = index.starts.long().gather(2, flat).view(names.shape)
    missing = (rank >= counts.unsqueeze(-1)).flatten(3)  # (B, H_kv, rows, P * most)
    place = (starts.unsqueeze(-1) + rank).flatten(3).masked_fill(missing, 0)
    at = index.order.long().gather(2, place.flatten(2))
    keys, values = (
        _take(tensor, at).to(wide).view(*missing.shape, tensor.shape[-1])
        for tensor in (call.key, call.value)
    )
    return keys, values, missing


def _take(tensor: Tensor, at: Tensor) -> Tensor:
    return tensor.gather(2, at.unsqueeze(-1).expand(-1, -1, -1, tensor.shape[-1]))
