"""sortLSH: queries and keys of every node of the recursion, each sorted by bucket."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import HyperConfig
from ..geometry import Recursion
from ..plan import SortedIndex
from .kmeans import assign, train_centroids
from .lsh import gray_rank, sign_codes
from .samples import draw_uniforms, sample_ranks

__all__ = ["bucket_labels", "build_sorted_index"]

_TRAINING_ROWS = 8192


def build_sorted_index(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Recursion,
    config: HyperConfig,
    projections: Tensor | None,
    seed: int,
) -> SortedIndex:
    """Orders of all nodes; labels are computed once and sorted stably inside of each node."""
    device = query.device
    nodes = geometry.nodes
    if nodes:
        of_query, of_key = bucket_labels(query, key, config, projections)
    else:
        of_query, of_key = query[..., 0].long(), key[..., 0].long()  # there is nothing to sort

    def orders(labels: Tensor, spans: list[tuple[int, int]]) -> Tensor:
        parts = [labels[:, :, a:b].argsort(dim=-1, stable=True) + a for a, b in spans]
        return (torch.cat(parts, -1) if parts else labels[:, :, :0]).to(torch.int32)

    query_order = orders(of_query, [(node.q_start, node.q_end) for node in nodes])
    key_order = orders(of_key, [(node.k_start, node.k_end) for node in nodes])
    batch, heads = key.shape[:2]
    count = config.num_samples if config.residual not in ("centroid", "none") else 0
    samples = torch.zeros((batch, heads, len(nodes), count), dtype=torch.int32, device=device)
    bias, owner = torch.zeros_like(samples, dtype=torch.float32), torch.zeros_like(samples)
    if count:
        draws = draw_uniforms(seed, "hyper/node-samples", heads, len(nodes), count, 0, device)
        for number, node in enumerate(nodes):
            base, size = geometry.key_bases[number], node.k_end - node.k_start
            part = key_order[:, :, base : base + size].flatten(0, 1).long()
            norms = None
            if config.residual == "value_norm":
                norms = value.detach().float().square().sum(-1).flatten(0, 1).gather(1, part)
            ranks, weight = sample_ranks(
                draws[:, number].repeat(batch, 1),
                torch.full((batch * heads,), size, device=device),
                config.residual,
                norms,
            )
            shape = (batch, heads, count)
            samples[:, :, number] = part.gather(1, ranks).to(torch.int32).reshape(shape)
            bias[:, :, number] = weight.reshape(shape)
            owner[:, :, number] = (ranks // node.k_block).to(torch.int32).reshape(shape)
    return SortedIndex(query_order, key_order, samples, bias, owner)


def bucket_labels(
    query: Tensor, key: Tensor, config: HyperConfig, projections: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Buckets (B, H, N_q) and (B, H_kv, N_k), int64; alike rows get near numbers."""
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    q, k = query.detach().to(wide), key.detach().to(wide)
    if config.center_keys:
        k = k - k.mean(2, keepdim=True)
    batch, heads, n_q, dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(batch, kv_heads, -1, dim)
    if config.index == "lsh":
        assert projections is not None
        planes = projections.to(q.device)
        bits = planes.shape[-1]
        of_query = gray_rank(sign_codes(grouped, planes), bits)
        of_key = gray_rank(sign_codes(k, planes), bits)
        return of_query.reshape(batch, heads, n_q), of_key
    rows = torch.nn.functional.normalize(k, dim=-1).flatten(0, 1)
    stride = max(1, rows.shape[1] // _TRAINING_ROWS)
    training = rows[:, ::stride]
    valid = torch.ones(training.shape[:2], dtype=torch.bool, device=q.device)
    num_clusters = min(1 << config.num_projections, training.shape[1])
    centroids = train_centroids(training, num_clusters, config.num_iterations, valid)
    centroids = centroids.gather(1, _line(centroids).unsqueeze(-1).expand_as(centroids))
    of_key = assign(rows, centroids).reshape(batch, kv_heads, -1)
    unit = torch.nn.functional.normalize(centroids, dim=-1)
    of_query = (grouped.flatten(0, 1) @ unit.transpose(1, 2)).argmax(-1)
    return of_query.reshape(batch, heads, n_q), of_key


def _line(centroids: Tensor) -> Tensor:
    """(G, K): an order of the centroids in which neighbours are alike (nearest unvisited next)."""
    groups, count, _ = centroids.shape
    distance = torch.cdist(centroids, centroids)
    order = torch.zeros((groups, count), dtype=torch.int64, device=centroids.device)
    here = order[:, :1]
    for step in range(1, count):
        distance.scatter_(2, here.unsqueeze(1).expand(-1, count, -1), float("inf"))
        here = distance.gather(1, here.unsqueeze(-1).expand(-1, -1, count)).argmin(-1)
        order[:, step : step + 1] = here
    return order
