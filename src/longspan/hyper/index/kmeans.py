"""Lloyd's algorithm, batched, without random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assign", "train_centroids"]


def train_centroids(x: Tensor, num_clusters: int, iterations: int, valid: Tensor) -> Tensor:
    """Centroids (G, K, D) of the rows of x (G, N, D) that `valid` (G, N) marks.

    Starts from rows at equal distances. A cluster that loses all rows keeps its centroid.
    """
    _, length, _ = x.shape
    picks = ((2 * torch.arange(num_clusters, device=x.device) + 1) * length) // (2 * num_clusters)
    centroids = x[:, picks]
    weights = valid.to(x.dtype).unsqueeze(-1)
    for _ in range(iterations):
        labels = assign(x, centroids)
        member = torch.nn.functional.one_hot(labels, num_clusters).to(x.dtype) * weights
        count = member.sum(1).unsqueeze(-1)  # (G, K, 1)
        total = member.transpose(1, 2) @ x
        centroids = torch.where(count > 0, total / count.clamp(min=1), centroids)
    return centroids


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """int64 (G, N): the nearest centroid of each row, the first of equals."""
    distance = (centroids * centroids).sum(-1).unsqueeze(1) - 2 * (x @ centroids.transpose(1, 2))
    return distance.argmin(-1)
