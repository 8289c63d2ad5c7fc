"""Infini-attention over processes, by passing memories, equals one process."""

from __future__ import annotations

import infini_checks
import pytest

UPDATES = ["linear", "delta", "delta_corrected", "gated_delta"]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("local", ["segment", "sliding"])
def test_state_passing_equals_one_process(ranks, update, local):
    ranks.run(infini_checks.check_state_passing, update=update, local=local)


@pytest.mark.parametrize(
    "case",
    [
        {"update": "linear", "state": 12, "positions": True},
        {"update": "delta", "state": 12, "local": "sliding", "positions": True},
        {"update": "linear", "state": 6, "local": "sliding", "first_segment": "gated"},
        {"update": "linear", "lengths": [53, 20]},
        {"update": "delta", "lengths": [7, 53], "local": "sliding"},
        {"update": "linear", "feature_map": "dpfp", "first_segment": "gated"},
        {"update": "delta", "length": 5},
        {"update": "linear", "length": 6, "local": "sliding", "state": 12},
        {"update": "linear", "length": 13},
        {"update": "delta", "state": 12, "local": "sliding", "lengths": [53, 3]},
    ],
    ids=str,
)
def test_state_passing_cases(ranks, case):
    ranks.run(infini_checks.check_state_passing, **case)


def test_streams_of_ranks(ranks):
    ranks.run(infini_checks.check_chunks_of_ranks)


def test_what_moves_does_not_grow(two_ranks):
    two_ranks.run(infini_checks.check_bytes)


def test_refusals(two_ranks):
    two_ranks.run(infini_checks.check_refusals)
