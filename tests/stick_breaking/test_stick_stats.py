"""Statistics say what was walked and how far sticks last."""

from __future__ import annotations

import pytest
import torch

from longspan import (
    ConfigError,
    StickBreakingConfig,
    stick_breaking_attention_stats,
    stick_breaking_attention_with_remainder,
)
from longspan.testing import make_qkv


@pytest.mark.parametrize("rules", [{}, {"attend_current": True}, {"window": 9}])
def test_spans_are_where_the_rest_falls(rules):
    q, k, v = make_qkv(2, 4, 30, 8, kv_heads=2, n_k=40, dtype=torch.float64)
    bias = torch.tensor([0.0, -1.0, -2.0, -5.0])
    common = {"enable_gqa": True, "logit_bias": bias, "query_offset": 6}
    thresholds = (0.5, 0.05)
    stats = stick_breaking_attention_stats(
        q, k, v, config=StickBreakingConfig(**rules), thresholds=thresholds, **common
    )
    # the rest after the d nearest keys is log_rest with a window of d
    rest = [torch.ones(2, 4, 30).double()]
    for d in range(1, min(rules.get("window", 40), 40) + 1):
        config = StickBreakingConfig(**{**rules, "window": d})
        part = stick_breaking_attention_with_remainder(q, k, v, config=config, **common)
        rest.append(part.log_rest.exp())
    rest = torch.stack(rest)
    current = int(rules.get("attend_current", False))
    seen = (torch.arange(30) + 6 + current).clamp(max=min(rules.get("window", 40), 40))
    for index, threshold in enumerate(thresholds):
        below = rest < threshold
        is_spent = below.any(0)
        wanted = torch.where(is_spent, below.int().argmax(0), seen.expand(2, 4, 30))
        assert torch.equal(stats.is_spent[index], is_spent)
        assert torch.equal(stats.spans[index], wanted.int())
    assert bool(stats.is_spent[0].any())
    assert not bool(stats.is_spent[1].all())


def test_visited_tiles_of_a_full_walk_and_an_early_stop():
    q, k, v = make_qkv(1, 2, 1000, 8)
    bias = torch.tensor([1.0, -20.0])
    full = stick_breaking_attention_stats(q, k, v, logit_bias=bias, thresholds=(), impl="eager")
    assert full.visited_fraction == 1.0
    assert full.total_tiles.tolist() == [1, 2, 3, 4]
    assert torch.equal(full.visited_tiles[0, 0], full.total_tiles)
    config = StickBreakingConfig(early_stop=2**-14)
    stats = stick_breaking_attention_stats(q, k, v, logit_bias=bias, config=config, impl="eager")
    assert stats.visited_tiles[0, 0].tolist() == [1, 2, 2, 2]
    assert stats.visited_tiles[0, 1].tolist() == [1, 2, 3, 4]
    assert stats.visited_fraction == pytest.approx(17 / 20)
    assert (stats.query_block, stats.key_block) == (256, 256)
    assert torch.equal(stats.visited_keys, stats.visited_tiles * 256)


def test_visited_tiles_do_not_depend_on_neighbours():
    q, k, v = make_qkv(2, 1, 600, 8)
    lengths = torch.tensor([600, 100])
    stats = stick_breaking_attention_stats(q, k, v, key_lengths=lengths, impl="eager")
    assert stats.visited_tiles[:, 0].tolist() == [[1, 2, 3], [1, 1, 1]]


def test_thresholds_are_checked():
    q, k, v = make_qkv(1, 1, 4, 4)
    with pytest.raises(ConfigError, match=r"thresholds holds 1\.5"):
        stick_breaking_attention_stats(q, k, v, thresholds=(1.5,))
