"""Head exchange equals one process, for every mechanism of the registry."""

from __future__ import annotations

import pytest
import torch
from context_checks import (
    check_head_offset,
    check_ulysses,
    check_ulysses_infini,
    check_ulysses_packed,
)

from longspan import HyperConfig, StickBreakingConfig
from longspan.mechanisms import MECHANISMS

NAMES = sorted(MECHANISMS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("kind", "length", "kv_heads", "lengths"),
    [("zigzag", 37, 4, [37, 20]), ("contiguous", 24, 1, None), ("zigzag", 18, 2, None)],
)
def test_ulysses_equals_one_process(ranks, name, kind, length, kv_heads, lengths):
    ranks.run(
        check_ulysses, name=name, kind=kind, length=length, kv_heads=kv_heads, lengths=lengths
    )


@pytest.mark.parametrize("name", [name for name in NAMES if MECHANISMS[name].has_varlen])
def test_packed_documents(ranks, name):
    ranks.run(check_ulysses_packed, name=name, kind="zigzag", marks=[0, 5, 5, 18, 19, 33])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_states_and_per_token_arguments_of_infini(ranks, kv_heads):
    ranks.run(check_ulysses_infini, kv_heads=kv_heads)


def test_per_head_arguments_and_settings(ranks):
    bias = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
    ranks.run(
        check_ulysses, name="stick_breaking", kind="zigzag", length=21, kv_heads=2,
        settings={"logit_bias": bias, "scale": 0.3},
        config=StickBreakingConfig(remainder="value", window=7),
    )  # fmt: skip


def test_random_draws_follow_the_heads(two_ranks):
    two_ranks.run(check_head_offset)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "config",
    [
        HyperConfig(index="lsh", residual="uniform", num_samples=3, window=6, num_sinks=1,
                    chunk_size=8, cluster_size=2, num_probes=1, num_projections=3),
        HyperConfig(index="kmeans", residual="value_norm", num_samples=3, window=6, num_sinks=1,
                    chunk_size=8, cluster_size=2, num_probes=1),
        HyperConfig.paper(num_samples=4, block_size=4, min_length=8, num_projections=3),
    ],
    ids=["lsh", "kmeans", "paper"],
)  # fmt: skip
def test_hyper_attention_draws_as_one_process(ranks, kv_heads, config):
    ranks.run(
        check_ulysses, name="hyper", kind="zigzag", length=43, kv_heads=kv_heads, config=config,
        settings={"seed": 5},
    )  # fmt: skip
