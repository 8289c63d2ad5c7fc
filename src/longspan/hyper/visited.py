"""How many scores are computed: counted from the geometry, without tensors."""

from __future__ import annotations

from .config import HyperConfig
from .geometry import recursion

__all__ = ["visited_fraction"]


def visited_fraction(
    config: HyperConfig, n_q: int, n_k: int, *, is_causal: bool, query_offset: int = 0
) -> float:
    """Share of the scores that exact attention would compute, index columns included.

    Opened clusters count with cluster_size keys each. 1.0 if there are none; at most 1.0.
    """
    visible = _visible(n_q, n_k, is_causal, query_offset)
    if visible == 0:
        return 1.0
    if config.structure == "recursion":
        visited = _recursion(config, n_q, n_k, is_causal, query_offset)
    else:
        visited = _chunks(config, n_q, n_k, is_causal, query_offset)
    return min(1.0, visited / visible)


def _visible(n_q: int, n_k: int, is_causal: bool, offset: int) -> int:
    if not is_causal:
        return n_q * n_k
    return _clamped_sum(offset + 1, offset + n_q + 1, n_k)


def _clamped_sum(start: int, stop: int, most: int) -> int:
    """Sum of min(max(x, 0), most) over start <= x < stop."""

    def below(x: int) -> int:
        inside = min(max(x, 0), most + 1)
        return inside * (inside - 1) // 2 + max(x - most - 1, 0) * most

    return below(stop) - below(start)


def _chunks(config: HyperConfig, n_q: int, n_k: int, is_causal: bool, offset: int) -> int:
    size, window, full = config.chunk_size, config.window, n_k // config.chunk_size
    per_chunk = config.clusters_per_chunk
    drawn = 0 if config.residual in ("centroid", "none") else config.num_samples
    total, row = 0, 0
    while row < n_q:
        p = row + offset
        before = min(max((p - window + 1) // size, 0), full)
        after = full if is_causal else min(max(-(-(p + window) // size), before), full)
        # Rows up to the next one at which a border moves.
        stop = min(row + size - (p - window + 1) % size, row + size - (p + window - 1) % size, n_q)
        far = before + full - after
        rows = stop - row
        if is_causal:
            near = _clamped_sum(p + 1 - before * size, p + 1 + rows - before * size,
                                n_k - before * size)  # fmt: skip
        else:
            near = rows * ((after - before) * size + n_k - full * size)
        each = far * (per_chunk + drawn + config.num_globals)
        each += config.num_sinks if before else 0
        each += min(config.num_probes, far * per_chunk) * config.cluster_size
        total += near + rows * each
        row = stop
    return total


def _recursion(config: HyperConfig, n_q: int, n_k: int, is_causal: bool, offset: int) -> int:
    geometry = recursion(n_q, n_k, is_causal, offset, config.block_size, config.min_length)
    total = 0
    for leaf in geometry.leaves:
        rows, keys = leaf.q_end - leaf.q_start, leaf.k_end - leaf.k_start
        if is_causal:
            first = leaf.q_start + offset + 1 - leaf.k_start
            total += _clamped_sum(first, first + rows, keys)
        else:
            total += rows * keys
    for node in geometry.nodes:
        keys = node.k_end - node.k_start
        columns = 0
        if config.residual == "centroid":
            columns = -(-keys // node.k_block)
        elif config.residual != "none":
            columns = config.num_samples
        total += (node.q_end - node.q_start) * (min(node.k_block, keys) + columns)
    return total
