"""HyperAttention over ranks equals one process: output, lse and every gradient."""

from __future__ import annotations

import pytest
from hyper_checks import check_clusters

from longspan import HyperConfig

SMALL = {"chunk_size": 8, "cluster_size": 2, "window": 5, "num_probes": 3, "num_sinks": 2}


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    "case",
    [
        {"config": HyperConfig(**SMALL), "length": 96},
    ],
    ids=str,
)
def test_clusters_equal_one_process(ranks, kind, case):
    ranks.run(check_clusters, kind=kind, **case)
