"""Dense HyperAttention: the definition, given a plan; float64 for float64 inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._dense import causal_visible
from ..._validation import Call
from ...types import AttentionOutput
from ..config import HyperConfig
from ..geometry import Recursion, far_after, far_before
from ..plan import ChunkIndex, Columns, SortedIndex
from .common import full_chunks, make_columns, wide_dtype, without_padding

__all__ = ["chunks_reference", "chunks_visible", "near_visible", "recursion_reference"]


def near_visible(call: Call, config: HyperConfig) -> Tensor:
    """(B or 1, N_q, N_k) bool: visible keys that are in no far chunk of the query."""
    device = call.query.device
    n_q, n_k = call.query.shape[2], call.key.shape[2]
    positions = (torch.arange(n_q, device=device) + call.query_offset)[None]
    chunk = torch.arange(n_k, device=device) // config.chunk_size
    full = full_chunks(call, config)[:, None]
    far = chunk < far_before(positions, config, full).unsqueeze(-1)
    if not call.is_causal:
        after = far_after(positions, config, full).unsqueeze(-1)
        far = far | ((chunk >= after) & (chunk < full.unsqueeze(-1)))
    return causal_visible(call)[:, 0] & ~far


def chunks_reference(
    call: Call, config: HyperConfig, index: ChunkIndex, chosen: Tensor
) -> AttentionOutput:
    """softmax over near keys, sinks, globals, opened clusters (exact) and columns (the rest)."""
    columns = make_columns(call, config, index)
    visible, opened = chunks_visible(call, config, index, chosen)
    return _attend(call, visible, columns, _columns_seen(call, config, index, columns, opened))


def chunks_visible(
    call: Call, config: HyperConfig, index: ChunkIndex, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """(B, H, N_q, N_k) bool: keys visited exactly; (B, H, N_q, M) bool: clusters opened."""
    device = call.query.device
    batch, heads, n_q, _ = call.query.shape
    n_k, kv_heads = call.key.shape[2], call.key.shape[1]
    groups = heads // max(kv_heads, 1)
    near = near_visible(call, config)
    far = causal_visible(call)[:, 0] & ~near
    # The cluster of every key: (B, H_kv, N_k), -1 for sinks, globals and keys of no full chunk.
    labels = torch.full((batch, kv_heads, n_k), -1, device=device)
    labels[:, :, : index.labels.shape[2]] = index.labels.long()
    labels = labels.repeat_interleave(groups, 1)
    opened = torch.zeros((batch, heads, n_q, index.counts.shape[2] + 1), dtype=torch.bool,
                         device=device)  # fmt: skip
    opened.scatter_(3, torch.where(chosen < 0, index.counts.shape[2], chosen).long(), True)
    opened = opened[..., :-1]  # (B, H, N_q, M)
    if opened.shape[-1]:
        is_open = opened.gather(3, labels.clamp(min=0).unsqueeze(2).expand(-1, -1, n_q, -1))
    else:
        is_open = torch.zeros((batch, heads, n_q, n_k), dtype=torch.bool, device=device)
    free = (labels < 0).unsqueeze(2)
    return near[:, None] | (far[:, None] & (free | is_open)), opened


def _columns_seen(
    call: Call, config: HyperConfig, index: ChunkIndex, columns: Columns, opened: Tensor
) -> Tensor:
    """(B, H, N_q, columns) bool: columns of far chunks whose cluster is not open."""
    device = call.query.device
    batch, heads, n_q, _ = call.query.shape
    groups = heads // max(call.key.shape[1], 1)
    per_chunk = columns.key.shape[2] // max(1, index.counts.shape[2] // config.clusters_per_chunk)
    chunk = torch.arange(columns.key.shape[2], device=device) // max(per_chunk, 1)
    full = full_chunks(call, config)[:, None]
    positions = (torch.arange(n_q, device=device) + call.query_offset)[None]
    seen = chunk < far_before(positions, config, full).unsqueeze(-1)
    if not call.is_causal:
        after = far_after(positions, config, full).unsqueeze(-1)
        seen = seen | ((chunk >= after) & (chunk < full.unsqueeze(-1)))
    owner = columns.owner.repeat_interleave(groups, 1).long()
    if opened.shape[-1]:
        taken = opened.gather(3, owner.unsqueeze(2).expand(-1, -1, n_q, -1))
        seen = seen[:, None] & ~taken
    else:
        seen = seen[:, None].expand(batch, heads, -1, -1)
    return seen


def recursion_reference(
    call: Call, config: HyperConfig, geometry: Recursion, index: SortedIndex
) -> AttentionOutput:
    """softmax over leaves and matched blocks (exact) and each node's residual columns.

    For calls without key_lengths: every key is visible to every query of a node.
    """
    device = call.query.device
    batch, heads, n_q, _ = call.query.shape
    n_k, kv_heads = call.key.shape[2], call.key.shape[1]
    groups = heads // max(kv_heads, 1)
    visible = torch.zeros((batch, heads, n_q, n_k), dtype=torch.bool, device=device)
    allowed = causal_visible(call)
    for leaf in geometry.leaves:
        area = (slice(leaf.q_start, leaf.q_end), slice(leaf.k_start, leaf.k_end))
        visible[:, :, *area] = allowed[:, :, *area]
    parts: list[Columns] = []
    seen: list[Tensor] = []
    rows = torch.arange(n_q, device=device)
    for number, node in enumerate(geometry.nodes):
        q_base, k_base = geometry.query_bases[number], geometry.key_bases[number]
        of_query = index.query_order[:, :, q_base : q_base + node.q_end - node.q_start].long()
        of_key = index.key_order[:, :, k_base : k_base + node.k_end - node.k_start].long()
        q_block = torch.full((batch, heads, n_q), -1, device=device)
        ranks = torch.arange(of_query.shape[2], device=device) // node.q_block
        q_block.scatter_(2, of_query, ranks.expand_as(of_query))
        k_block = torch.full((batch, kv_heads, n_k), -2, device=device)
        ranks = torch.arange(of_key.shape[2], device=device) // node.k_block
        k_block.scatter_(2, of_key, ranks.expand_as(of_key))
        k_block = k_block.repeat_interleave(groups, 1)
        visible |= q_block.unsqueeze(-1) == k_block.unsqueeze(2)
        columns = _node_columns(call, config, index, number, of_key, node.k_block)
        parts.append(columns)
        inside = (rows >= node.q_start) & (rows < node.q_end)
        owner = columns.owner.repeat_interleave(groups, 1)
        seen.append(inside[:, None] & (owner.unsqueeze(2) != q_block.unsqueeze(-1)))
    if not parts:
        wide = wide_dtype(call)
        empty = call.key[:, :, :0].to(wide)
        parts.append(Columns(empty, call.value[:, :, :0].to(wide), empty[..., 0],
                             empty[..., 0].int(), None))  # fmt: skip
        seen.append(visible[..., :0])
    variances = [part.variance for part in parts if part.variance is not None]
    joined = Columns(
        torch.cat([part.key for part in parts], 2),
        torch.cat([part.value for part in parts], 2),
        torch.cat([part.bias for part in parts], 2),
        torch.cat([part.owner for part in parts], 2),
        torch.cat(variances, 2) if variances else None,
    )
    return _attend(call, visible, joined, torch.cat(seen, -1))


def _node_columns(
    call: Call, config: HyperConfig, index: SortedIndex, number: int, of_key: Tensor, block: int
) -> Columns:
    """Residual columns of one node; centroid columns are the means of its key blocks."""
    wide = wide_dtype(call)
    key, value = call.key.to(wide), call.value.to(wide)

    def gather(tensor: Tensor, at: Tensor) -> Tensor:
        return tensor.gather(2, at.unsqueeze(-1).expand(-1, -1, -1, tensor.shape[-1]))

    if config.residual == "centroid":
        keys, values = (torch.split(gather(t, of_key), block, 2) for t in (key, value))
        mean = torch.stack([part.mean(2) for part in keys], 2)
        counts = torch.tensor([part.shape[2] for part in keys], device=key.device, dtype=wide)
        owner = torch.arange(len(keys), dtype=torch.int32, device=key.device)
        variance = None
        if config.variance_term:
            variance = torch.stack([part.var(2, correction=0) for part in keys], 2)
        shape = (*key.shape[:2], -1)
        return Columns(mean, torch.stack([part.mean(2) for part in values], 2),
                       torch.log(counts).expand(shape), owner.expand(shape), variance)  # fmt: skip
    at = index.samples[:, :, number].long()
    return Columns(gather(key, at), gather(value, at), index.sample_bias[:, :, number].to(wide),
                   index.sample_owner[:, :, number], None)  # fmt: skip


def _attend(call: Call, visible: Tensor, columns: Columns, seen: Tensor) -> AttentionOutput:
    """Softmax over visible keys and seen columns, (B, H, N_q, N_k) and (B, H, N_q, columns)."""
    wide = wide_dtype(call)
    groups = call.query.shape[1] // max(call.key.shape[1], 1)
    key, value = without_padding(call)
    q = call.query.to(wide)
    k, v = (t.to(wide).repeat_interleave(groups, 1) for t in (key, value))
    used = visible.any(-2).unsqueeze(-1)  # what no row sees cannot reach the result
    k, v = torch.where(used, k, 0.0), torch.where(used, v, 0.0)
    exact = call.scale * (q @ k.transpose(-1, -2))
    rest = call.scale * (q @ columns.key.repeat_interleave(groups, 1).transpose(-1, -2))
    if columns.variance is not None:
        spread = columns.variance.repeat_interleave(groups, 1).transpose(-1, -2)
        rest = rest + 0.5 * call.scale**2 * (q.square() @ spread)
    rest = rest + columns.bias.repeat_interleave(groups, 1).unsqueeze(2)
    scores = torch.cat((exact, rest), -1)
    scores = torch.where(torch.cat((visible, seen), -1), scores, float("-inf"))
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.sum(-1, True)
    empty = top == float("-inf") if scores.shape[-1] else torch.ones_like(top, dtype=torch.bool)
    top = torch.where(empty, 0.0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    safe = torch.where(empty, 1.0, total)
    values = torch.cat((v, columns.value.repeat_interleave(groups, 1)), 2)
    output = (weights / safe) @ values
    lse = torch.where(empty, float("-inf"), top + torch.log(safe)).squeeze(-1)
    return AttentionOutput(output.to(call.query.dtype), lse)
