"""Random numbers: a function of seed, stream and index, with the promised distributions."""

from __future__ import annotations

import pytest
import torch

from longspan import ConfigError
from longspan._random import (
    first_head_of,
    integers,
    normal,
    permutation,
    random_bits,
    seed_of_heads,
    uniform,
)


def test_a_slice_can_be_drawn_alone():
    whole = normal(3, "planes", (8, 5))
    assert torch.equal(normal(3, "planes", (2, 5), offset=4 * 5), whole[4:6])


def test_seed_and_stream_change_everything():
    base = random_bits(1, "a", (1000,))
    for other in (random_bits(2, "a", (1000,)), random_bits(1, "b", (1000,)),
                  random_bits(1 + 2**32, "a", (1000,))):  # fmt: skip
        assert (base == other).float().mean() < 0.01
    assert torch.equal(base, random_bits(1, "a", (1000,)))


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_bits_are_balanced_and_pairwise_independent(seed):
    count = 200_000
    bits = random_bits(seed, "x", (count,))
    table = ((bits[:, None] >> torch.arange(32)) & 1).double() - 0.5
    bound = 5 * 0.5 / count**0.5
    assert table.mean(0).abs().max() < bound
    correlation = (table.T @ table) / count * 4 - torch.eye(32)
    assert correlation.abs().max() < 6 / count**0.5
    serial = (table[1:] * table[:-1]).mean(0) * 4  # neighbours in the index
    assert serial.abs().max() < 6 / count**0.5


@pytest.mark.parametrize("seed", [0, 7])
def test_moments(seed):
    x = normal(seed, "n", (400_000,), dtype=torch.float64)
    assert abs(x.mean()) < 5 / 400_000**0.5
    assert abs(x.var() - 1) < 5 * (2 / 400_000) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / 400_000) ** 0.5
    u = uniform(seed, "u", (400_000,))
    assert u.min() > 0
    assert u.max() < 1
    assert abs(u.double().mean() - 0.5) < 5 * (1 / 12 / 400_000) ** 0.5


def test_integers_and_permutation():
    draws = integers(5, "i", (70_000,), 7)
    counts = torch.bincount(draws, minlength=7).double()
    assert counts.numel() == 7
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 30  # chi-squared, 6 degrees of freedom
    order = permutation(5, "p", 1000)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert (order == torch.arange(1000)).sum() < 10


def test_seed_and_first_head_travel_as_one_number():
    for seed, head in ((0, 1), (2**48 - 1, 7), (123, 2**14 - 1)):
        assert first_head_of(seed_of_heads(seed, head)) == (seed, head)
        assert seed_of_heads(seed, head) < 2**63  # fits an operator's schema
    for seed in (0, -5, 2**61):
        assert seed_of_heads(seed, 0) == seed
        assert first_head_of(seed) == (seed, 0)
    for seed, head in ((-1, 1), (2**48, 1), (0, 2**14), (0, -1)):
        with pytest.raises(ConfigError, match="head_offset"):
            seed_of_heads(seed, head)
