"""HyperConfig: refusals name the field, what came, what is allowed, and the nearest valid value."""

from __future__ import annotations

import pytest
import torch

from longspan import ConfigError, HyperConfig, ShapeError, hyper_attention
from longspan.testing import make_qkv


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"structure": "chunk"}, "structure is 'chunk'.*Did you mean 'chunks'"),
        ({"index": "kmean"}, "Did you mean 'kmeans'"),
        ({"residual": "centroids"}, "Did you mean 'centroid'"),
        ({"window": 0}, "window is 0; it must be an int >= 1. Nearest valid: 1"),
        ({"window": 2.0}, "window is float 2.0.*Nearest valid: 2"),
        ({"num_probes": -1}, "num_probes is -1.*>= 0"),
        ({"num_projections": 17}, "from 1 to 16. Nearest valid: 16"),
        ({"cluster_size": 24}, "power of two. Nearest valid: 32"),
        ({"cluster_size": 20}, "power of two. Nearest valid: 16"),
        (
            {"chunk_size": 500, "index": "kmeans"},
            "no multiple of cluster_size 16. Nearest valid: 496",
        ),
        ({"chunk_size": 48}, "power of two times. Nearest valid: 64"),
        ({"structure": "recursion"}, "works for structure='chunks' only"),
        ({"structure": "recursion", "index": "lsh"}, "num_sinks is 4.*Set both to 0"),
        ({"variance_term": True, "residual": "none"}, "needs residual='centroid'"),
        ({"num_globals": 600}, "leave nothing of a chunk"),
        ({"center_keys": 1}, "center_keys is 1; it must be True or False"),
        ({"max_error": -0.1}, "max_error is -0.1"),
        ({"probe_spread": float("nan")}, "probe_spread is nan"),
        ({"num_samples": 0}, "num_samples is 0"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ConfigError, match=message):
        HyperConfig(**settings)


def test_paper_is_the_paper():
    paper = HyperConfig.paper()
    assert (paper.structure, paper.index, paper.residual) == ("recursion", "lsh", "uniform")
    assert not paper.center_keys
    assert HyperConfig.paper(block_size=64).block_size == 64
    assert paper.block_size == paper.num_samples == 256


def test_projections_are_checked():
    q, k, v = make_qkv(1, 4, 8, 16, kv_heads=2)
    lsh = HyperConfig(index="lsh")
    right = torch.randn(2, 16, 8)
    hyper_attention(q, k, v, enable_gqa=True, config=lsh, projections=right)
    with pytest.raises(ShapeError, match=r"projections is \(4, 16, 8\).*\(2, 16, 8\)"):
        hyper_attention(q, k, v, enable_gqa=True, config=lsh, projections=right.repeat(2, 1, 1))
    with pytest.raises(ShapeError, match="float tensor"):
        hyper_attention(q, k, v, enable_gqa=True, config=lsh, projections=right.long())
    with pytest.raises(ShapeError, match="no hash planes"):
        hyper_attention(
            q, k, v, enable_gqa=True, config=HyperConfig(index="pca"), projections=right
        )
    with pytest.raises(ShapeError, match="seed is str"):
        hyper_attention(q, k, v, enable_gqa=True, seed="0")
