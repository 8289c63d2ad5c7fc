"""Head exchange equals one process, for every mechanism of the registry."""

from __future__ import annotations

import inspect

import pytest
import torch
from context_checks import (
    check_head_offset,
    check_refused,
    check_ulysses,
    check_ulysses_infini,
    check_ulysses_packed,
)

from longspan import StickBreakingConfig
from longspan.mechanisms import MECHANISMS


def draws_by_local_head(mechanism):
    """Whether a rank would draw the random numbers of other heads: such are refused."""
    parameters = inspect.signature(mechanism.function).parameters
    return "seed" in parameters and "head_offset" not in parameters


NAMES = sorted(name for name, m in MECHANISMS.items() if not draws_by_local_head(m))
REFUSED = sorted(set(MECHANISMS) - set(NAMES))


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


@pytest.mark.parametrize("name", REFUSED)
def test_mechanisms_that_cannot_be_cut_by_heads_are_refused(two_ranks, name):
    two_ranks.run(check_refused, name=name)
