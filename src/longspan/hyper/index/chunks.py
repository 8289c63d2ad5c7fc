"""Clusters inside of chunks of consecutive keys. A chunk's index depends on its own keys only."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import HyperConfig
from ..plan import ChunkIndex
from .kmeans import assign, train_centroids
from .lsh import gray_rank, sign_codes
from .pca import balanced_order
from .samples import draw_uniforms, sample_ranks

__all__ = ["build_chunk_index", "cluster_means", "member_matrix", "shared_in_pairs"]

_ROWS_AT_ONCE = 2**24  # elements of the (chunks, S, K) matrices held at a time


def build_chunk_index(
    key: Tensor,
    value: Tensor,
    config: HyperConfig,
    projections: Tensor | None,
    seed: int,
    first_chunk: int = 0,
) -> ChunkIndex:
    """Index of all full chunks of key (B, H_kv, N_k, D), value (B, H_kv, N_k, D_v).

    Args:
        projections: (H_kv, D, r), for index="lsh".
        seed: makes the samples, which also depend on the chunk's number.
        first_chunk: number of the first chunk in the stream; positions stay relative to `key`.
    """
    if key.is_cuda and config.index == "pca" and not torch.compiler.is_compiling():
        from ..impl.triton.chunks_index import can_index, triton_chunk_index

        if can_index(key, config):
            return triton_chunk_index(key, config, first_chunk)
    batch, heads, length, dim = key.shape
    size, per_chunk = config.chunk_size, config.clusters_per_chunk
    chunks = length // size
    wide = torch.float64 if key.dtype is torch.float64 else torch.float32
    device = key.device
    groups = batch * heads * chunks
    keys = key[:, :, : chunks * size].detach().reshape(groups, size, dim)
    numbers = torch.arange(first_chunk, first_chunk + chunks, device=device).repeat(batch * heads)
    sinks = torch.arange(size, device=device) + (numbers * size).unsqueeze(-1) < config.num_sinks

    labels = torch.empty((groups, size), dtype=torch.int32, device=device)
    mean_key = torch.empty((groups, per_chunk, dim), dtype=wide, device=device)
    variance = torch.empty((groups, per_chunk if config.probe_spread else 0, dim), dtype=wide,
                           device=device)  # fmt: skip
    step = max(1, _ROWS_AT_ONCE // (size * max(per_chunk, dim)))
    for start in range(0, groups, step):
        part = slice(start, start + step)
        x = keys[part].to(wide)
        mean = x.mean(1, keepdim=True)
        x = torch.nan_to_num(x - mean)  # what is not finite may have any label
        planes = None
        if projections is not None:
            owner = torch.arange(start, start + x.shape[0], device=device) // chunks % heads
            planes = projections.to(device)[owner]
        labels[part] = _labels(x, mean, config, ~sinks[part], planes)
        centre = cluster_means(x, labels[part], per_chunk)
        mean_key[part] = centre + mean
        if config.probe_spread:
            square = cluster_means(x.square(), labels[part], per_chunk)
            variance[part] = shared_in_pairs((square - centre.square()).clamp(min=0))

    counts = torch.zeros((groups, per_chunk + 1), dtype=torch.int32, device=device)
    counts.scatter_add_(1, labels.long(), torch.ones_like(labels))
    order = labels.argsort(dim=1, stable=True)
    base = (torch.arange(chunks, device=device) * size).repeat(batch * heads).unsqueeze(-1)
    starts = counts[:, :per_chunk].cumsum(1) - counts[:, :per_chunk] + base
    left = counts[:, per_chunk]  # sinks and globals, last in the order
    order = order + base
    globals_ = _globals(order, sinks, left, config)

    def shaped(tensor: Tensor) -> Tensor:
        return tensor.to(torch.int32).reshape(batch, heads, chunks * tensor.shape[1])

    cluster_base = (torch.arange(chunks, device=device) * per_chunk).repeat(batch * heads)
    marked = torch.where(labels < per_chunk, labels + cluster_base.unsqueeze(-1), -1)
    samples, bias = _samples(order, left, value, chunks, config, seed, first_chunk)
    return ChunkIndex(
        order=shaped(order),
        starts=shaped(starts),
        counts=shaped(counts[:, :per_chunk]),
        labels=shaped(marked),
        globals=globals_.to(torch.int32).reshape(batch, heads, chunks, config.num_globals),
        mean_key=mean_key.reshape(batch, heads, chunks * per_chunk, dim),
        samples=shaped(samples),
        sample_bias=bias.reshape(batch, heads, chunks * bias.shape[1]),
        variance=variance.reshape(batch, heads, chunks * variance.shape[1], dim),
    )


def member_matrix(labels: Tensor, num_clusters: int, dtype: torch.dtype) -> Tensor:
    """(G, K, S): 1 where key s is in cluster k; labels (G, S) beyond K - 1 are in none."""
    names = torch.arange(num_clusters, device=labels.device)[:, None]
    return (labels.unsqueeze(1) == names).to(dtype)


def cluster_means(x: Tensor, labels: Tensor, num_clusters: int) -> Tensor:
    """(G, K, D): mean row of each cluster, zero for empty ones. Matrix products: deterministic."""
    member = member_matrix(labels, num_clusters, x.dtype)
    return (member @ x) / member.sum(-1, keepdim=True).clamp(min=1)


def shared_in_pairs(variance: Tensor) -> Tensor:
    """The mean of entries d and d + D // 2 (D even), the two that rotary embedding turns together.

    Shifting all positions turns each pair by one angle, which leaves the trace of its covariance,
    and the length of the query's pair, as they are.
    """
    half = variance.shape[-1] // 2
    if variance.shape[-1] % 2:
        return variance
    mean = (variance[..., :half] + variance[..., half:]) / 2
    return torch.cat((mean, mean), -1)


def _labels(
    x: Tensor, mean: Tensor, config: HyperConfig, valid: Tensor, planes: Tensor | None
) -> Tensor:
    """(G, S) int: 0 .. K - 1, or K for sinks and globals. x is centred."""
    per_chunk, size = config.clusters_per_chunk, config.chunk_size
    if config.index == "kmeans":
        centroids = train_centroids(x, per_chunk, config.num_iterations, valid)
        labels = assign(x, centroids)
    else:
        if config.index == "pca":
            order = balanced_order(x, config.cluster_size, valid)
        else:
            assert planes is not None
            hashed = x if config.center_keys else x + mean
            rank = gray_rank(sign_codes(hashed, planes), planes.shape[-1])
            order = torch.where(valid, rank, 1 << planes.shape[-1]).argsort(dim=1, stable=True)
        cut = torch.arange(size, device=x.device) // config.cluster_size
        labels = torch.empty_like(order).scatter_(1, order, cut.expand_as(order))
    labels = torch.where(valid, labels, per_chunk)
    if config.num_globals:
        means = cluster_means(x, labels, per_chunk)
        index = labels.clamp(max=per_chunk - 1).unsqueeze(-1).expand_as(x)
        apart = (x - means.gather(1, index)).square().sum(-1).masked_fill(~valid, -1.0)
        far = apart.topk(config.num_globals, dim=1).indices
        labels = labels.scatter(1, far, per_chunk)
    return labels


def _globals(order: Tensor, sinks: Tensor, left: Tensor, config: HyperConfig) -> Tensor:
    """(G, num_globals) positions: the end of the order, without the sinks, which come first."""
    if config.num_globals == 0:
        return order[:, :0]
    return order[:, -config.num_globals :]


def _samples(
    order: Tensor,
    left: Tensor,
    value: Tensor,
    chunks: int,
    config: HyperConfig,
    seed: int,
    first_chunk: int,
) -> tuple[Tensor, Tensor]:
    """Positions (G, R) and log weights (G, R) of the samples of each chunk."""
    if config.residual in ("centroid", "none"):
        return order[:, :0], torch.zeros_like(order[:, :0], dtype=torch.float32)
    batch, heads = value.shape[:2]
    draws = draw_uniforms(seed, "hyper/chunk-samples", heads, chunks, config.num_samples,
                          first_chunk, value.device)  # fmt: skip
    draws = draws.reshape(1, heads * chunks, config.num_samples).expand(batch, -1, -1).flatten(0, 1)
    norms = None
    if config.residual == "value_norm":
        size = order.shape[1]
        flat = value[:, :, : chunks * size].detach().float().square().sum(-1)
        flat = torch.nan_to_num(flat, posinf=0.0).flatten(0, 1)
        norms = flat.gather(1, order.reshape(batch * heads, chunks * size)).view(order.shape)
    ranks, bias = sample_ranks(draws, order.shape[1] - left, config.residual, norms)
    return order.gather(1, ranks), bias
