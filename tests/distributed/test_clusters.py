"""HyperAttention over ranks equals one process: output, lse and every gradient."""

from __future__ import annotations

import pytest
from hyper_checks import check_bytes, check_clusters, check_refusals, check_scheme

from longspan import HyperConfig

SMALL = {"chunk_size": 8, "cluster_size": 2, "window": 5, "num_probes": 3, "num_sinks": 2}


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    "case",
    [
        {"config": HyperConfig(**SMALL), "length": 96},
        {"config": HyperConfig(**SMALL, index="kmeans"), "length": 101, "kv_heads": 1},
        {"config": HyperConfig(**SMALL, index="lsh", center_keys=False), "length": 91, "chunks": 2},
        {"config": HyperConfig(**SMALL, num_globals=2, variance_term=True), "length": 88},
        {"config": HyperConfig(**SMALL, probe_spread=1.5), "length": 75, "kv_heads": 4},
        {"config": HyperConfig(**SMALL, residual="uniform", num_samples=3), "length": 96},
        {"config": HyperConfig(**SMALL, residual="value_norm", num_samples=4), "length": 81},
        {"config": HyperConfig(**SMALL, residual="none"), "length": 70},
        {"config": HyperConfig(**SMALL | {"window": 21, "num_probes": 0}), "length": 93},
        {"config": HyperConfig(**SMALL | {"window": 500}), "length": 40},
        {"config": HyperConfig(**SMALL | {"num_sinks": 0, "window": 1}), "length": 41},
        {"config": HyperConfig(**SMALL), "length": 5},
        {"config": HyperConfig(**SMALL), "length": 17},
    ],
    ids=str,
)
def test_clusters_equal_one_process(ranks, kind, case):
    ranks.run(check_clusters, kind=kind, **case)


def test_bytes_fall_where_queries_agree(two_ranks):
    """Queries that look for the same keys open few clusters; unlike ones open all of them."""
    (_, keys), (few, _) = two_ranks.run(check_bytes, agree=True)
    _, (many, _) = two_ranks.run(check_bytes, agree=False)
    assert few < 0.4 * keys
    assert many > 0.9 * keys


def test_refusals(ranks):
    ranks.run(check_refusals)


def test_scheme_by_name(two_ranks):
    two_ranks.run(check_scheme)
