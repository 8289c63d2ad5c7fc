"""Opened clusters, cluster by cluster: the queries that opened it meet its keys in dense tiles.

Every query opens clusters of its own, so walking queries would gather keys and multiply vectors.
Turned round, each cluster has a list of queries; a tile of TILE of them meets the keys of one
*piece* (up to `capacity` keys of a cluster) in one matrix product. A pair of query and piece is an
*entry*: entries are made in order of rows, sorted by piece, and summed back in order of rows, so
that bits repeat on every device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plan import ChunkIndex

__all__ = ["Pieces", "keys_of_pieces", "make_pieces", "opened_backward", "opened_forward"]

TILE = 32


class Pieces(NamedTuple):
    """Clusters cut in runs of `capacity` keys, of all key/value heads: g = b H_kv + h."""

    keys: Tensor  # (pieces, capacity, D) wide
    values: Tensor  # (pieces, capacity, D_v + 1) wide; the last column is one
    bias: Tensor  # (pieces, capacity) wide: 0, or -inf beyond the end
    first: Tensor  # (B * H_kv * M,) int64: first piece of each cluster
    number: Tensor  # (B * H_kv * M,) int64: pieces of each cluster
    slots: Tensor  # (B * H_kv, C * S) int64: pieces * capacity slot of each ordered key; -1: none


class _Tiles(NamedTuple):
    rows: Tensor  # (tiles, TILE) int64: flat query row, any one where `used` is false
    used: Tensor  # (tiles, TILE) bool
    piece: Tensor  # (tiles,) int64
    slot: Tensor  # (entries,) int64: place of each entry, in order of rows, among tiles * TILE
    entry_rows: Tensor  # (entries,) int64
    row_ends: Tensor  # (rows + 1,) int64: entries of row r are row_ends[r] : row_ends[r + 1]
    piece_ends: Tensor  # (pieces + 1,) int64: tiles of each piece


def make_pieces(
    key: Tensor, value: Tensor, index: ChunkIndex, capacity: int, wide: torch.dtype
) -> Pieces:
    """Keys (B, H_kv, N_k, D) and values of all clusters, copied into pieces."""
    batch, heads, _, dim = key.shape
    groups, ordered = batch * heads, index.order.shape[2]
    counts = index.counts.long().reshape(-1)
    number = (counts + capacity - 1) // capacity
    ends = number.cumsum(0)
    first = ends - number
    total = int(ends[-1]) if ends.numel() else 0
    clusters = index.counts.shape[2]
    # The slot of the key at place i of the order: its cluster's first piece, plus its rank.
    labels = index.labels.long().gather(2, index.order.long()).reshape(groups, ordered)
    base = torch.arange(groups, device=key.device).unsqueeze(-1) * clusters
    at = (labels.clamp(min=0) + base).reshape(-1)
    starts = index.starts.long().reshape(-1)
    places = torch.arange(ordered, device=key.device).expand(groups, -1).reshape(-1)
    slots = first[at] * capacity + places - starts[at]
    slots = torch.where(labels.reshape(-1) < 0, -1, slots).reshape(groups, ordered)
    source = torch.full((total * capacity + 1,), -1, dtype=torch.int64, device=key.device)
    flat = torch.arange(groups, device=key.device).unsqueeze(-1) * key.shape[2]
    target = torch.where(slots < 0, total * capacity, slots).reshape(-1)
    source.scatter_(0, target, (index.order.long().reshape(groups, ordered) + flat).reshape(-1))
    source = source[:-1]
    empty = source < 0
    picks = source.clamp(min=0)
    keys = key.reshape(-1, dim)[picks].to(wide)
    values = F.pad(value.reshape(-1, value.shape[-1])[picks].to(wide), (0, 1), value=1.0)
    bias = torch.zeros_like(picks, dtype=wide).masked_fill(empty, float("-inf"))
    return Pieces(
        keys.view(total, capacity, dim),
        values.view(total, capacity, value.shape[-1] + 1),
        bias.view(total, capacity),
        first,
        number,
        slots,
    )


def keys_of_pieces(pieces: Pieces, index: ChunkIndex, grads: Tensor, total: Tensor) -> None:
    """Add grads (pieces, capacity, X) to the keys that they belong to, total (B, H_kv, N_k, X)."""
    if grads.shape[0] == 0:
        return
    flat = grads.reshape(-1, grads.shape[-1])
    rows = flat[pieces.slots.clamp(min=0)]  # (groups, C * S, X), in order of clusters
    rows = rows.masked_fill((pieces.slots < 0).unsqueeze(-1), 0.0)
    at = index.order.long().reshape(*pieces.slots.shape, 1).expand(-1, -1, rows.shape[-1])
    by_position = torch.zeros_like(rows).scatter_(1, at, rows)  # each position occurs once
    total[:, :, : index.order.shape[2]] += by_position.reshape(
        *index.order.shape[:2], -1, rows.shape[-1]
    )


def opened_forward(q: Tensor, chosen: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """Attention over the opened clusters alone.

    q is (B, H_kv, G, R, D), scaled and wide; chosen (B, H_kv, G, R, P). Returns the output
    (B, H_kv, G, R, D_v) and lse (B, H_kv, G, R); zeros and -inf where nothing is open.
    """
    rows = chosen.shape[:-1]
    width = pieces.values.shape[-1]
    if chosen.numel() == 0 or pieces.keys.shape[0] == 0 or not bool((chosen >= 0).any()):
        return q.new_zeros((*rows, width - 1)), q.new_full(rows, float("-inf"))
    tiles = _tiles(chosen, pieces)
    flat = q.reshape(-1, q.shape[-1])
    scores = _scores(flat, tiles, pieces)
    top = scores.amax(-1)  # finite: a piece has at least one key
    weights = scores.sub_(top.unsqueeze(-1)).exp_()
    part = (weights @ pieces.values[tiles.piece]).view(-1, width)
    entry_top = top.view(-1)[tiles.slot]
    best = top.new_full((flat.shape[0],), float("-inf"))
    best.scatter_reduce_(0, tiles.entry_rows, entry_top, "amax")
    total = F.embedding_bag(
        tiles.slot, part, tiles.row_ends, mode="sum", include_last_offset=True,
        per_sample_weights=torch.exp(entry_top - best[tiles.entry_rows]),
    )  # fmt: skip
    mass = total[:, -1]
    empty = mass == 0
    output = total[:, :-1] / torch.where(empty, 1.0, mass).unsqueeze(-1)
    lse = torch.where(empty, float("-inf"), best + torch.log(torch.where(empty, 1.0, mass)))
    return output.view(*rows, -1), lse.view(rows)


def opened_backward(
    q: Tensor,
    chosen: Tensor,
    pieces: Pieces,
    lse: Tensor,
    grad_output: Tensor,
    delta: Tensor,
    d_keys: Tensor,
    d_values: Tensor,
) -> Tensor:
    """Gradient of the scaled q; adds to d_keys and d_values, shaped like the pieces.

    lse and delta (B, H_kv, G, R) are of the whole rows; grad_output is (B, H_kv, G, R, D_v) wide.
    """
    if chosen.numel() == 0 or pieces.keys.shape[0] == 0 or not bool((chosen >= 0).any()):
        return torch.zeros_like(q)
    tiles = _tiles(chosen, pieces)
    flat = q.reshape(-1, q.shape[-1])
    scores = _scores(flat, tiles, pieces)
    at = tiles.rows
    p = scores.sub_(lse.reshape(-1)[at].unsqueeze(-1)).exp_()
    p = p.masked_fill_(~tiles.used.unsqueeze(-1), 0.0)
    do = grad_output.reshape(-1, grad_output.shape[-1])[at]  # (tiles, TILE, D_v)
    values = pieces.values[tiles.piece][..., :-1]
    ds = (do @ values.transpose(1, 2)).sub_(delta.reshape(-1)[at].unsqueeze(-1)).mul_(p)
    dq = (ds @ pieces.keys[tiles.piece]).view(-1, q.shape[-1])
    dq = F.embedding_bag(tiles.slot, dq, tiles.row_ends, mode="sum", include_last_offset=True)
    every = torch.arange(tiles.piece.numel(), device=q.device)
    for total, part in (
        (d_values, p.transpose(1, 2) @ do),
        (d_keys, ds.transpose(1, 2) @ flat[at]),
    ):
        summed = F.embedding_bag(every, part.flatten(1), tiles.piece_ends, mode="sum",
                                 include_last_offset=True)  # fmt: skip
        total += summed.view_as(total)
    return dq.view_as(q)


def _scores(flat: Tensor, tiles: _Tiles, pieces: Pieces) -> Tensor:
    scores = flat[tiles.rows] @ pieces.keys[tiles.piece].transpose(1, 2)
    scores += pieces.bias[tiles.piece].unsqueeze(1)
    return scores  # (tiles, TILE, capacity)


def _tiles(chosen: Tensor, pieces: Pieces) -> _Tiles:
    """Lists of queries, by piece, cut in tiles."""
    device = chosen.device
    batch, kv_heads, group, length, probes = chosen.shape
    heads = batch * kv_heads
    num_rows, clusters = heads * group * length, pieces.first.numel() // max(heads, 1)
    flat = chosen.reshape(heads, -1).long()
    base = torch.arange(heads, device=device).unsqueeze(-1) * clusters
    opened = (flat >= 0).reshape(-1)
    cluster = (flat.clamp(min=0) + base).reshape(-1)
    number = torch.where(opened, pieces.number[cluster], 0)
    row_of = torch.arange(num_rows, device=device).repeat_interleave(probes)
    entry_rows = row_of.repeat_interleave(number)
    entry_ends = number.cumsum(0)
    piece = (pieces.first[cluster] - (entry_ends - number)).repeat_interleave(number)
    piece = piece + torch.arange(piece.numel(), device=device)
    per_row = number.view(num_rows, probes).sum(1)
    row_ends = F.pad(per_row.cumsum(0), (1, 0))
    ordered, from_entry = piece.to(torch.int32).sort(stable=True)
    counts = torch.bincount(piece, minlength=pieces.keys.shape[0])
    starts = counts.cumsum(0) - counts
    per_piece = (counts + TILE - 1) // TILE
    piece_ends = F.pad(per_piece.cumsum(0), (1, 0))
    tile_piece = torch.arange(counts.numel(), device=device).repeat_interleave(per_piece)
    inside = torch.arange(tile_piece.numel(), device=device) - piece_ends[tile_piece]
    rank = (inside * TILE).unsqueeze(-1) + torch.arange(TILE, device=device)
    used = rank < counts[tile_piece].unsqueeze(-1)
    rank = torch.minimum(rank, counts[tile_piece].unsqueeze(-1) - 1)
    rows = entry_rows[from_entry[rank + starts[tile_piece].unsqueeze(-1)]]
    shift = piece_ends[:-1] * TILE - starts
    places = torch.arange(piece.numel(), device=device) + shift[ordered.long()]
    slot = torch.empty_like(places).scatter_(0, from_entry, places)
    return _Tiles(rows, used, tile_piece, slot, entry_rows, row_ends, piece_ends)
