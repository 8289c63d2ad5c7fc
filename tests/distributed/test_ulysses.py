"""Head exchange equals one process, for every mechanism of the registry."""

from __future__ import annotations

import inspect

import pytest
import torch
from context_checks import (
    check_head_offset,
    check_ulysses,
    check_ulysses_infini,
    check_ulysses_packed,
)

from longspan import StickBreakingConfig
from longspan.mechanisms import MECHANISMS


def draws_by_head(name):
    """Whether a rank can reproduce one process: no random numbers, or drawn by head number."""
    parameters = inspect.signature(MECHANISMS[name].function).parameters
    return "seed" not in parameters or "head_offset" in parameters


NAMES = [name for name in sorted(MECHANISMS) if draws_by_head(name)]
OTHERS = sorted(set(MECHANISMS) - set(NAMES))


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


@pytest.mark.parametrize("name", OTHERS)
def test_draws_that_a_rank_cannot_repeat_are_refused(two_ranks, name):
    with pytest.raises(AssertionError, match="takes no head_offset"):
        two_ranks.run(
            check_ulysses, name=name, kind="contiguous", length=24, kv_heads=4, lengths=None
        )


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
