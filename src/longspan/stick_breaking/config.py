"""Settings of stick-breaking attention."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError, nearest_name

__all__ = ["REMAINDERS", "StickBreakingConfig"]

REMAINDERS = ("drop", "value")


@dataclass(frozen=True, kw_only=True, slots=True)
class StickBreakingConfig:
    """Stick-breaking attention (arXiv:2410.17980): what is computed.

    attend_current: a query also sees the key at its own position, first of all. False, as in the
        paper, starts at the key before it.
    remainder: what becomes of the stick that no key took. "drop" leaves it; "value" gives it to
        the value at the query's own position, so that the weights sum to one. (A learned vector
        per head is `longspan.nn.StickBreakingAttention(remainder="embedding")`.)
    window: number of nearest keys a query sees, or None for all before it. Exact.
    early_stop: stop walking towards far keys once less than this share of the stick is left, in
        (0, 1); the weights that are dropped sum to less than it. None walks all keys. 2**-14 is
        below the rounding of a bfloat16 output.
    gate_threshold: gates sigmoid(z) below this count as zero, in (0, 1). Inference only: a call
        that needs gradients raises.
    """

    attend_current: bool = False
    remainder: str = "drop"
    window: int | None = None
    early_stop: float | None = None
    gate_threshold: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.attend_current, bool):
            raise ConfigError(
                f"StickBreakingConfig: attend_current is {self.attend_current!r}; it must be "
                "True or False."
            )
        if self.remainder not in REMAINDERS:
            hint = nearest_name(str(self.remainder), REMAINDERS)
            if self.remainder == "embedding":
                hint = (
                    "A learned vector is a parameter: use "
                    'longspan.nn.StickBreakingAttention(remainder="embedding"). ' + hint
                )
            raise ConfigError(f"StickBreakingConfig: remainder is {self.remainder!r}. {hint}")
        if self.window is not None and (
            isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1
        ):
            raise ConfigError(
                f"StickBreakingConfig: window is {self.window!r}; it must be None or an int >= 1: "
                "the number of nearest keys a query sees."
            )
        for name, value, fix in (
            ("early_stop", self.early_stop, "None for the full walk, or e.g. 2**-14"),
            ("gate_threshold", self.gate_threshold, "None to keep all gates, or e.g. 0.01"),
        ):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise ConfigError(
                    f"StickBreakingConfig: {name} is {value!r}; it must lie strictly between 0 "
                    f"and 1. Use {fix}."
                )
