"""Small settings in which every part of the estimator is at work."""

from __future__ import annotations

from longspan import HyperConfig
from longspan._validation import validate
from longspan.hyper.impl.common import choose, chunk_index
from longspan.hyper.index.lsh import draw_projections

SMALL = {"window": 8, "chunk_size": 32, "cluster_size": 4, "num_probes": 3, "num_sinks": 2}
CHUNKS = {
    "kmeans": HyperConfig(index="kmeans", **SMALL),
    "pca": HyperConfig(index="pca", num_globals=2, probe_spread=1.0, **SMALL),
    "lsh": HyperConfig(index="lsh", **SMALL),
    "variance": HyperConfig(index="pca", variance_term=True, **SMALL),
    "uniform": HyperConfig(index="pca", residual="uniform", num_samples=6, **SMALL),
    "stratified": HyperConfig(index="pca", residual="stratified", num_samples=6, **SMALL),
    "value_norm": HyperConfig(index="kmeans", residual="value_norm", num_samples=6, **SMALL),
    "none": HyperConfig(index="lsh", center_keys=False, residual="none", **SMALL),
    "no probes": HyperConfig(index="kmeans", **{**SMALL, "num_probes": 0}),
}
PAPER = {"block_size": 8, "min_length": 16, "num_samples": 8}
RECURSIONS = {
    "paper": HyperConfig.paper(**PAPER),
    "paper kmeans": HyperConfig.paper(index="kmeans", num_projections=4, **PAPER),
    "paper stratified": HyperConfig.paper(residual="stratified", center_keys=True, **PAPER),
    "paper value_norm": HyperConfig.paper(residual="value_norm", **PAPER),
    "paper centroid": HyperConfig.paper(residual="centroid", variance_term=True, **PAPER),
    "paper none": HyperConfig.paper(residual="none", **PAPER),
}
ALL = {**CHUNKS, **RECURSIONS}


def make_plan(q, k, v, config, **common):
    """A validated call with its index and choice (structure="chunks")."""
    call = validate("test", q, k, v, enable_gqa=True, **common)
    planes = draw_projections(0, k.shape[1], k.shape[3], config.num_projections, k.device)
    index = chunk_index(call, config, planes, 0)
    return call, index, choose(call, config, index)
