"""Small statistics of results: Wilson intervals, averages over stretches of positions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

__all__ = ["bucket_edges", "bucket_means", "standard_error", "wilson_interval"]


def wilson_interval(successes: int, trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a success rate; 95 % by default.

    It stays inside [0, 1] and is sensible for 0 or all successes, where the usual
    p +- z sqrt(p (1 - p) / n) has width 0. No trials give (0, 1).

    Example:
        >>> low, high = wilson_interval(5, 5)
        >>> round(low, 3), high
        (0.566, 1.0)
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes: {successes} came; must lie in 0 .. trials = {trials}.")
    if trials == 0:
        return 0.0, 1.0
    rate, square = successes / trials, z * z
    middle = (rate + square / (2 * trials)) / (1 + square / trials)
    spread = math.sqrt(rate * (1 - rate) / trials + square / (4 * trials * trials))
    half = z * spread / (1 + square / trials)
    # At the ends the formula gives 0 and 1 up to rounding; say so exactly.
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == trials else min(1.0, middle + half)
    return low, high


def bucket_edges(start: int, stop: int, num_buckets: int) -> list[int]:
    """Edges of at most `num_buckets` stretches of nearly equal width covering start .. stop - 1."""
    count = max(1, min(num_buckets, stop - start))
    return [start + (stop - start) * i // count for i in range(count + 1)]


def bucket_means(values: Sequence[float], positions_from: int, edges: Sequence[int]) -> list[float]:
    """Mean of `values` (their first at position `positions_from`) in each stretch of `edges`."""
    means = []
    for low, high in itertools.pairwise(edges):
        part = values[low - positions_from : high - positions_from]
        means.append(math.fsum(part) / len(part) if part else math.nan)
    return means


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values; NaN for fewer than two."""
    count = len(values)
    if count < 2:
        return math.nan
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return math.sqrt(variance / count)
