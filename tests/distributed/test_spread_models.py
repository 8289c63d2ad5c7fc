"""Models whose sequences are spread over ranks train as one process does."""

from __future__ import annotations

import pytest
from model_checks import (
    check_mean_gradients,
    check_transformer,
    check_transformers_model,
    check_window_config_of_layers,
)

from longspan import ExactConfig, StickBreakingConfig, WindowConfig

WINDOW = WindowConfig(window=5, num_sinks=2)


@pytest.mark.parametrize(
    "case",
    [
        {"config": ExactConfig(), "kind": "zigzag", "scheme": "ring"},
        {"config": ExactConfig(), "kind": "zigzag", "scheme": "ring", "checkpointing": True},
        {"config": ExactConfig(), "kind": "zigzag", "scheme": "ring", "lengths": [29, 12]},
        {"config": (ExactConfig(), WINDOW), "kind": "zigzag", "scheme": "ring",
         "marks": [0, 9, 10, 29]},
        {"config": WINDOW, "kind": "contiguous", "scheme": "ulysses"},
        {"config": StickBreakingConfig(), "kind": "contiguous", "scheme": "ring"},
    ],
    ids=str,
)  # fmt: skip
def test_transformer_trains_as_one_process(ranks, case):
    ranks.run(check_transformer, **case)


@pytest.mark.parametrize(
    ("arch", "config", "kind", "scheme"),
    [
        ("llama", None, "zigzag", "ring"),
        ("qwen3", "window:window=5,num_sinks=1", "contiguous", "ring"),
        ("gemma3", None, "zigzag", "ring"),
        ("llama", "window:window=5", "zigzag", "ulysses"),
    ],
)
def test_transformers_model_trains_as_one_process(two_ranks, arch, config, kind, scheme):
    two_ranks.run(check_transformers_model, arch=arch, config=config, kind=kind, scheme=scheme)


def test_selected_layers(two_ranks):
    two_ranks.run(check_window_config_of_layers)


def test_averaged_gradients(ranks):
    ranks.run(check_mean_gradients)
