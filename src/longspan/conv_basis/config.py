"""Settings of Conv-Basis attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ConfigError, nearest_name

__all__ = ["ConvBasisConfig"]

_RECOVER = ("binary", "grid", "segment", "means")
_ON_VIOLATION = ("exact", "warn", "raise", "return")
_GRADIENTS = ("approximant", "exact")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvBasisConfig:
    """How the score matrix is read as few Toeplitz pieces, and what happens where it is not.

    num_bases: k, the largest number of contiguous key segments; inside one, a score depends on
        the lag only. At least 1.
    probe_length: T, entries of a column that are compared to find a border. At least 1.
    threshold: delta, least sum of absolute changes (nats) over T entries at a border. Above
        2 * probe_length * noise.
    noise: eps, largest deviation of a score from the Toeplitz pieces, nats. At least 0.
    recover: "binary" (the paper's search; it reads the whole sequence), "grid" (borders at equal
        distances, whatever the content), "segment" (borders of the best piecewise constant fit of
        sampled columns; reads the whole sequence), "means" (one kernel in closed form from the
        mean query and key, rotated by `rope_base`, with an offset for each row and key).
    rope_base: base of the rotary embedding that was applied to queries and keys, in the layout
        of transformers (halves); None: none was applied. Only for recover="means".
    near_window: lags below it are computed exactly. 0: none.
    num_sinks: the first keys are computed exactly. 0: none.
    check_rows: rows whose exact and modelled weights are compared. 0: no check.
    max_tv: largest 95 % quantile of their total variation distance, in [0, 1].
    on_violation: what to do with a head above it: "exact" (compute the head exactly), "warn",
        "raise", or "return" the approximation without a check.
    gradient: "approximant" (the exact derivative of what was computed, in almost linear time) or
        "exact" (that of exact attention at the same inputs, in quadratic time).
    min_length: sequences shorter than this are computed exactly. 0: none.

    Raises:
        ConfigError: a field has the wrong type or is out of range.
    """

    num_bases: int = 16
    probe_length: int = 16
    threshold: float = 0.5
    noise: float = 0.005
    recover: str = "binary"
    rope_base: float | None = None
    near_window: int = 0
    num_sinks: int = 0
    check_rows: int = 64
    max_tv: float = 0.05
    on_violation: str = "exact"
    gradient: str = "approximant"
    min_length: int = 4096

    def __post_init__(self) -> None:
        for name, least in (("num_bases", 1), ("probe_length", 1), ("near_window", 0),
                            ("num_sinks", 0), ("check_rows", 0), ("min_length", 0)):  # fmt: skip
            self._check_int(name, least)
        for name in ("threshold", "noise", "max_tv"):
            self._check_number(name)
        if self.rope_base is not None:
            self._check_number("rope_base")
            if self.rope_base <= 1:
                raise ConfigError(
                    f"ConvBasisConfig: rope_base is {self.rope_base}; it must be above 1, e.g. "
                    "10000.0, or None where no rotary embedding was applied."
                )
        for name, allowed in (("recover", _RECOVER), ("on_violation", _ON_VIOLATION),
                              ("gradient", _GRADIENTS)):  # fmt: skip
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(
                    f"ConvBasisConfig: {name} is {value!r}. {nearest_name(str(value), allowed)}"
                )
        if self.max_tv > 1:
            raise ConfigError(
                f"ConvBasisConfig: max_tv is {self.max_tv}; a total variation distance lies in "
                "[0, 1]. Nearest valid: 1.0."
            )
        least_threshold = 2 * self.probe_length * self.noise
        if self.threshold <= least_threshold:
            raise ConfigError(
                f"ConvBasisConfig: threshold is {self.threshold}; it must be above "
                f"2 * probe_length * noise = {least_threshold:.6g}, or every column would start a "
                "segment. Raise threshold, or lower noise or probe_length; the paper's bound "
                f"needs {2.5 * least_threshold:.6g}."
            )

    def _check_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(
                f"ConvBasisConfig: {name} is {type(value).__name__} {value!r}; it must be an int "
                f">= {least}. Nearest valid: {_nearest(value, least)}."
            )

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < 0:
            raise ConfigError(
                f"ConvBasisConfig: {name} is {type(value).__name__} {value!r}; it must be a finite "
                "number >= 0. Pass e.g. 0.5."
            )


def _nearest(value: object, least: int) -> int:
    try:
        return max(least, round(float(value)))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return least
