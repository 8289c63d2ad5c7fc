"""Settings of window attention."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError

__all__ = ["WindowConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowConfig:
    """Which keys a query sees: those near to it, and the first ones.

    window: the query at key index p sees keys p - window < j <= p, itself included (as
        `sliding_window` in transformers); not causal: |p - j| < window. At least 1.
    num_sinks: every query also sees keys j < num_sinks (j <= p when causal). At least 0.

    Raises:
        ConfigError: a field is no int or out of range.
    """

    window: int = 1024
    num_sinks: int = 4

    def __post_init__(self) -> None:
        for name, value, least in (("window", self.window, 1), ("num_sinks", self.num_sinks, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(
                    f"WindowConfig: {name} is {type(value).__name__} {value!r}; it must be an int "
                    f">= {least}. Nearest valid: {_nearest(value, least)}."
                )
            if value < least:
                raise ConfigError(
                    f"WindowConfig: {name} is {value}; it must be an int >= {least}. "
                    f"Nearest valid: {least}."
                )


def _nearest(value: object, least: int) -> int:
    try:
        return max(least, round(float(value)))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return least
