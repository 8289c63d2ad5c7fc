import math
from itertools import pairwise

import pytest

from longspan.eval.statistics import bucket_edges, bucket_means, standard_error, wilson_interval


def test_wilson_matches_its_defining_equation():
    # The ends solve |rate - p| = z sqrt(p (1 - p) / n).
    for successes, trials in [(3, 10), (7, 9), (50, 400)]:
        for end in wilson_interval(successes, trials, z=1.7):
            gap = abs(successes / trials - end)
            assert gap == pytest.approx(1.7 * math.sqrt(end * (1 - end) / trials), rel=1e-9)


def test_wilson_ends():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 5)[0] == 0.0
    assert wilson_interval(5, 5)[1] == 1.0
    assert wilson_interval(0, 5)[1] == pytest.approx(1 - wilson_interval(5, 5)[0])
    with pytest.raises(ValueError, match=r"successes: 6 came"):
        wilson_interval(6, 5)


def test_buckets_cover_everything_once():
    for start, stop, count in [(1, 1024, 32), (1, 5, 32), (0, 100, 7)]:
        edges = bucket_edges(start, stop, count)
        assert edges[0] == start
        assert edges[-1] == stop
        assert all(a < b for a, b in pairwise(edges))
        assert len(edges) - 1 == min(count, stop - start)


def test_bucket_means_weighted_give_the_mean():
    values = [float(i * i % 17) for i in range(99)]
    edges = bucket_edges(1, 100, 8)
    means = bucket_means(values, 1, edges)
    total = sum(m * (b - a) for m, a, b in zip(means, edges[:-1], edges[1:], strict=True))
    assert total == pytest.approx(sum(values))


def test_standard_error():
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)
    assert math.isnan(standard_error([1.0]))
