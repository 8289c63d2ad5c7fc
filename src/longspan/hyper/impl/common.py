"""Shared by the implementations: the index of a call, its columns, and each query's choice."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._validation import Call
from ..config import HyperConfig
from ..geometry import far_after, far_before
from ..index.chunks import build_chunk_index, member_matrix
from ..plan import ChunkIndex, Columns

__all__ = [
    "choice_scores",
    "choose",
    "chunk_index",
    "columns_backward",
    "full_chunks",
    "make_columns",
    "wide_dtype",
]

_SCORES_AT_ONCE = 2**23


def wide_dtype(call: Call) -> torch.dtype:
    """The dtype that is computed in."""
    return torch.float64 if call.query.dtype is torch.float64 else torch.float32


def full_chunks(call: Call, config: HyperConfig) -> Tensor:
    """(B or 1,) int64: chunks without padding."""
    if call.key_lengths is None:
        length = torch.tensor([call.key.shape[2]], device=call.query.device)
    else:
        length = call.key_lengths.long().clamp(max=call.key.shape[2])
    return length // config.chunk_size


def chunk_index(
    call: Call, config: HyperConfig, projections: Tensor | None, seed: int
) -> ChunkIndex:
    """The index of the call's keys; padding counts as zeros."""
    key, value = without_padding(call)
    return build_chunk_index(key, value, config, projections, seed)


def without_padding(call: Call) -> tuple[Tensor, Tensor]:
    """Key and value with zeros beyond key_lengths: 0 * NaN is NaN."""
    if call.key_lengths is None:
        return call.key, call.value
    places = torch.arange(call.key.shape[2], device=call.key.device)
    padding = (places >= call.key_lengths[:, None])[:, None, :, None]
    return call.key.masked_fill(padding, 0.0), call.value.masked_fill(padding, 0.0)


def choose(call: Call, config: HyperConfig, index: ChunkIndex) -> Tensor:
    """(B, H, N_q, P) int32: the far clusters that each query opens, best first; -1: none left.

    The best by scale * q . mean_key + log(count), over the clusters of its far chunks;
    P = min(num_probes, clusters). Empty clusters are never opened.
    """
    batch, heads, n_q, dim = call.query.shape
    kv_heads, clusters = index.counts.shape[1:]
    probes = min(config.num_probes, clusters)
    chosen = torch.full((batch, heads, n_q, probes), -1, dtype=torch.int32,
                        device=call.query.device)  # fmt: skip
    if probes == 0 or chosen.numel() == 0:
        return chosen
    wide = wide_dtype(call)
    bias = torch.log(index.counts.to(wide))  # -inf for empty clusters
    full = full_chunks(call, config)[:, None]  # (B or 1, 1)
    per_chunk = config.clusters_per_chunk
    groups = heads // max(kv_heads, 1)
    most = clusters // per_chunk
    height = max(1, min(n_q, _SCORES_AT_ONCE // max(1, batch * heads * clusters)))
    height = max(16, height // 16 * 16) if height >= 16 else height
    names = torch.arange(clusters, device=call.query.device) // per_chunk
    for start in range(0, n_q, height):
        rows = slice(start, min(start + height, n_q))
        positions = torch.arange(rows.start, rows.stop, device=names.device) + call.query_offset
        before = far_before(positions[None], config, full)  # (B or 1, rows)
        after = torch.full_like(before, most)
        reach = clusters
        if call.is_causal:
            last = rows.stop - 1 + call.query_offset
            reach = min(max((last - config.window + 1) // config.chunk_size, 0), most) * per_chunk
            if reach == 0:
                continue
        else:
            after = far_after(positions[None], config, full)
        seen = names[:reach] < before.unsqueeze(-1)  # (B or 1, rows, reach)
        if not call.is_causal:
            seen = seen | ((names >= after.unsqueeze(-1)) & (names < full.unsqueeze(-1)))
        q = call.query[:, :, rows].to(wide).reshape(batch, kv_heads, -1, dim)
        scores = choice_scores(
            (call.scale * q).flatten(0, 1), index.mean_key[:, :, :reach].flatten(0, 1),
            index.variance[:, :, :reach].flatten(0, 1), config.probe_spread,
        )  # fmt: skip
        scores = scores.view(batch, kv_heads, groups, -1, reach)
        scores = scores + bias[:, :, None, None, :reach]
        scores = scores.masked_fill(~seen[:, None, None], float("-inf")).nan_to_num(
            nan=float("-inf"), posinf=torch.finfo(wide).max, neginf=float("-inf"))  # fmt: skip
        best = scores.topk(min(probes, reach), dim=-1)
        picks = torch.where(best.values == float("-inf"), -1, best.indices).to(torch.int32)
        chosen[:, :, rows, : picks.shape[-1]] = picks.reshape(batch, heads, -1, picks.shape[-1])
    return chosen


def choice_scores(q: Tensor, mean_key: Tensor, variance: Tensor, spread: float) -> Tensor:
    """(E, rows, clusters): what clusters are chosen by, but for log(count). q is scaled.

    q . mean + spread * sqrt(sum_d q_d^2 variance_d)
    """
    scores = q @ mean_key.to(q.dtype).transpose(1, 2)
    if spread:
        scores += spread * (q.square() @ variance.to(q.dtype).transpose(1, 2)).clamp_(min=0).sqrt_()
    return scores


def make_columns(call: Call, config: HyperConfig, index: ChunkIndex) -> Columns:
    """The columns of the residual, in the dtype that is computed in; differentiable."""
    wide = wide_dtype(call)
    key, value = without_padding(call)
    batch, kv_heads = key.shape[:2]
    clusters = index.counts.shape[2]
    device = key.device
    if config.residual == "centroid":
        size, per_chunk = config.chunk_size, config.clusters_per_chunk
        chunks = clusters // per_chunk
        counts = index.counts.clamp(min=1).to(wide).unsqueeze(-1)
        local = index.labels.reshape(batch * kv_heads * chunks, size)
        local = torch.where(local < 0, per_chunk, local % per_chunk)

        def mean(tensor: Tensor) -> Tensor:
            width = tensor.shape[-1]
            rows = tensor[:, :, : chunks * size].to(wide).reshape(local.shape[0], size, width)
            total = member_matrix(local, per_chunk, wide) @ rows
            return total.reshape(batch, kv_heads, clusters, width) / counts

        mean_key, variance = mean(key), None
        if config.variance_term:
            variance = (mean(key.to(wide).square()) - mean_key.square()).clamp(min=0)
        bias = torch.log(index.counts.to(wide))
        owner = torch.arange(clusters, dtype=torch.int32, device=device)
        return Columns(mean_key, mean(value), bias, owner.expand(batch, kv_heads, -1), variance)
    at = index.samples.long()  # (B, H_kv, C * R), empty for "none"
    return Columns(
        _gather(key, at).to(wide),
        _gather(value, at).to(wide),
        index.sample_bias.to(wide),
        index.labels.gather(2, at),
        None,
    )


def columns_backward(
    call: Call,
    config: HyperConfig,
    index: ChunkIndex,
    columns: Columns,
    grads: tuple[Tensor, Tensor, Tensor | None],
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Add to dk and dv, both wide, what the gradients of key, value and variance make of them."""
    d_key, d_value, d_variance = grads
    if config.residual == "centroid":
        labels = index.labels.long()
        at = labels.clamp(min=0)
        share = torch.where(
            labels < 0, 0.0, 1.0 / index.counts.clamp(min=1).gather(2, at).to(dk.dtype)
        ).unsqueeze(-1)
        length = labels.shape[2]
        if d_variance is not None:
            key, _ = without_padding(call)
            apart = key[:, :, :length].to(dk.dtype) - _gather(columns.key, at)
            dk[:, :, :length] += 2.0 * share * apart * _gather(d_variance, at)
        dk[:, :, :length] += share * _gather(d_key, at)
        dv[:, :, :length] += share * _gather(d_value, at)
        return
    # A key may be drawn several times: summed in a fixed order by a product with the draws.
    add_rows(dk, index.samples, d_key)
    add_rows(dv, index.samples, d_value)


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[b, h, index[b, h, i]] += rows[b, h, i], in the order of i: deterministic everywhere."""
    flat = total.view(-1, total.shape[-1])
    base = torch.arange(total.shape[0] * total.shape[1], device=total.device) * total.shape[2]
    at = (index.long().flatten(0, 1) + base.unsqueeze(-1)).flatten()
    if total.device.type == "cpu":
        flat.index_add_(0, at, rows.reshape(-1, rows.shape[-1]).to(total.dtype))
        return
    flat.index_put_((at,), rows.reshape(-1, rows.shape[-1]).to(total.dtype), accumulate=True)


def _gather(tensor: Tensor, at: Tensor) -> Tensor:
    return tensor.gather(2, at.unsqueeze(-1).expand(-1, -1, -1, tensor.shape[-1]))
