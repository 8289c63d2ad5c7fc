"""How numbers look to people: few digits, units, a sign where a change is meant."""

from __future__ import annotations

import math

__all__ = [
    "MISSING",
    "bytes_text",
    "change_text",
    "count_text",
    "percent_text",
    "ratio_text",
    "seconds_text",
    "signed_text",
    "value_text",
]

MISSING = "\u2013"  # en dash
_MINUS = "\u2212"
_TIMES = "\u00d7"


def value_text(value: float | None, digits: int = 3) -> str:
    """A positive quantity with `digits` significant digits, never in exponent form below 1e7."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞"
    if value == 0:
        return "0"
    size = int(f"{value:.{digits - 1}e}".partition("e")[2])  # after rounding: 99.96 has size 2
    if size >= 7 or size < -5:
        return f"{value:.{digits - 1}e}"
    rounded = round(value, digits - 1 - size)
    return f"{rounded:,.{max(0, digits - 1 - size)}f}"


def change_text(share: float | None) -> str:
    """A change as a signed percentage: 0.0123 is "+1.2 %"."""
    if share is None or math.isnan(share):
        return MISSING
    if math.isinf(share):
        return "+∞"
    percent = 100 * share
    if abs(percent) < 0.005:
        return "0\u00a0%"
    digits = 2 if abs(percent) < 1 else 1 if abs(percent) < 100 else 0
    sign = "+" if percent > 0 else _MINUS
    return f"{sign}{abs(percent):,.{digits}f}\u00a0%"


def percent_text(share: float | None) -> str:
    """A share of a whole: 0.0312 is "3.1 %", 1 is "100 %"."""
    if share is None or math.isnan(share):
        return MISSING
    percent = 100 * share
    if percent in (0.0, 100.0):
        return f"{percent:.0f}\u00a0%"
    # Never round up to a whole that it is not.
    shown = min(percent, 99.9) if percent < 100 else percent
    return f"{shown:.2f}\u00a0%" if percent < 1 else f"{shown:.1f}\u00a0%"


def seconds_text(seconds: float | None) -> str:
    """A duration with a unit that suits it."""
    if seconds is None or math.isnan(seconds):
        return MISSING
    if seconds < 1e-3:
        return f"{value_text(1e6 * seconds)}\u00a0µs"
    if seconds < 1:
        return f"{value_text(1e3 * seconds)}\u00a0ms"
    if seconds < 120:
        return f"{value_text(seconds)}\u00a0s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def bytes_text(count: float | None) -> str:
    """A size in binary units."""
    if count is None or math.isnan(count):
        return MISSING
    power = min(4, int(math.log2(abs(count)) / 10)) if count else 0
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{value_text(count / 1024**power)}\u00a0{unit}"


def ratio_text(ratio: float | None) -> str:
    """A ratio to exact attention, two digits."""
    return MISSING if ratio is None else f"{value_text(ratio, 2)}{_TIMES}"


def signed_text(value: float) -> str:
    """A signed quantity, two digits."""
    return f"{'+' if value >= 0 else _MINUS}{value_text(abs(value), 2)}"


def count_text(count: float) -> str:
    """A whole number with thousands separators."""
    return f"{count:,.0f}"
