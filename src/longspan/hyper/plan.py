"""What is decided before attention is computed: integers and index vectors, no gradients.

index -> choose -> attend. An implementation may make a plan by any means (plain torch, kernels),
and any implementation can attend with any plan; tests pass one plan to all of them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["ChunkIndex", "Columns", "SortedIndex"]


class ChunkIndex(NamedTuple):
    """Clusters of the full chunks ("chunks"). C chunks of S keys, K clusters each, M = C K.

    C = N_k // S. Cluster g belongs to chunk g // K. A key of a full chunk is in exactly one
    cluster, or a sink (position < num_sinks), or a global. Chunks beyond N // S of a batch entry
    with key_lengths N hold padding: their numbers mean nothing and no query may use them (see
    `geometry.far_before`).
    """

    order: Tensor  # (B, H_kv, C * S) int32: key positions, chunk by chunk, cluster by cluster;
    #   sinks and globals at the end of their chunk, in order of position
    starts: Tensor  # (B, H_kv, M) int32: cluster g holds order[starts[g] : starts[g] + counts[g]]
    counts: Tensor  # (B, H_kv, M) int32: 0 .. S
    labels: Tensor  # (B, H_kv, C * S) int32: cluster of each key, in order of position; -1: none
    globals: Tensor  # (B, H_kv, C, num_globals) int32: positions
    mean_key: Tensor  # (B, H_kv, M, D) float32 (float64 for float64): of the keys as given
    samples: Tensor  # (B, H_kv, C * R) int32: sampled positions, R = num_samples; R = 0 if none
    sample_bias: Tensor  # (B, H_kv, C * R) float32: log of the weight of each sample; -inf: void
    variance: Tensor  # (B, H_kv, M, D) as mean_key: of each cluster's keys, for probe_spread,
    #   d and d + D/2 sharing their mean; (B, H_kv, 0, D) if probe_spread is 0


class Columns(NamedTuple):
    """What stands for the far keys that are not visited ("chunks"), R columns per chunk.

    Column m belongs to chunk m // R and counts for a query if that chunk is far and the query has
    not opened cluster owner[m]. Its score is scale * q . key + bias (+ half the variance).
    Made from key and value by differentiable torch operations, so an implementation returns the
    gradients of these tensors and torch carries them to key and value.
    """

    key: Tensor  # (B, H_kv, C * R, D) float32 (float64)
    value: Tensor  # (B, H_kv, C * R, D_v)
    bias: Tensor  # (B, H_kv, C * R); -inf: void. Constant
    owner: Tensor  # (B, H_kv, C * R) int32: a cluster
    variance: Tensor | None  # (B, H_kv, C * R, D): score += scale**2 / 2 * sum_d q_d**2 variance_d


class SortedIndex(NamedTuple):
    """Sorted queries and keys of the nodes of a `geometry.Recursion` ("recursion").

    Node n owns query_order[query_bases[n] : query_bases[n + 1]], rows of the query, and the same
    of keys. Its i-th run of q_block rows meets its i-th run of k_block keys.
    """

    query_order: Tensor  # (B, H, query_bases[-1]) int32
    key_order: Tensor  # (B, H_kv, key_bases[-1]) int32
    samples: Tensor  # (B, H_kv, nodes, R) int32: key positions; R = 0 if none
    sample_bias: Tensor  # (B, H_kv, nodes, R) float32: log weight
    sample_owner: Tensor  # (B, H_kv, nodes, R) int32: the key block, within its node, of the sample
