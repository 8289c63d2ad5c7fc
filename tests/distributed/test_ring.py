"""Ring attention over processes equals one process: outputs, logs and every gradient."""

from __future__ import annotations

import pytest
import torch
from context_checks import check_low_precision, check_ring, check_ring_packed

from longspan import ExactConfig, StickBreakingConfig, WindowConfig

EXACT = ExactConfig()
PACKED = [0, 3, 3, 17, 18, 40, 53]


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    "case",
    [
        {"config": EXACT, "length": 32},
        {"config": EXACT, "length": 37, "lengths": [37, 11]},
        {"config": EXACT, "length": 21, "is_causal": False, "lengths": [2, 21]},
        {"config": EXACT, "length": 24, "kv_heads": 1},
        {"config": EXACT, "length": 3},
        {"config": WindowConfig(window=5, num_sinks=2), "length": 41},
        {"config": WindowConfig(window=30, num_sinks=11), "length": 41, "lengths": [41, 9]},
        {"config": WindowConfig(window=4, num_sinks=1), "length": 29, "is_causal": False},
        {"config": WindowConfig(window=100, num_sinks=0), "length": 23},
        {"config": WindowConfig(window=2, num_sinks=1), "length": 3},
        {"config": StickBreakingConfig(), "length": 32, "bias": True},
        {"config": StickBreakingConfig(attend_current=True), "length": 37, "lengths": [5, 37]},
        {"config": StickBreakingConfig(remainder="value"), "length": 26, "lengths": [26, 13]},
        {"config": StickBreakingConfig(window=6), "length": 41, "bias": True},
        {"config": StickBreakingConfig(window=3, attend_current=True), "length": 30},
        {"config": StickBreakingConfig(), "length": 3},
        {"config": StickBreakingConfig(), "length": 37, "bias": True, "recompute": False},
    ],
    ids=str,
)
def test_ring_equals_one_process(ranks, kind, case):
    ranks.run(check_ring, kind=kind, **case)


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    "config",
    [EXACT, WindowConfig(window=6, num_sinks=2), StickBreakingConfig(remainder="value"),
     StickBreakingConfig(window=4)],
    ids=str,
)  # fmt: skip
def test_packed_documents(ranks, kind, config):
    ranks.run(check_ring_packed, config=config, kind=kind, marks=PACKED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_and_repeatable_bits(ranks, dtype):
    ranks.run(check_low_precision, dtype=dtype)
