"""How long a study may take: a budget that its sizes follow, and a moment to stop at."""

from __future__ import annotations

import time

__all__ = ["Clock", "OutOfTime"]


class OutOfTime(Exception):
    """The call's time is up; what is finished is kept, and the same command goes on."""


class Clock:
    """Seconds left in this call.

    Args:
        stop_after: seconds from now; None for no end.
    """

    def __init__(self, stop_after: float | None = None) -> None:
        self.begin = time.monotonic()
        self.stop_after = stop_after

    @property
    def seconds(self) -> float:
        """Since the call began."""
        return time.monotonic() - self.begin

    @property
    def left(self) -> float | None:
        """Seconds left, at least 0; None for no end."""
        return None if self.stop_after is None else max(0.0, self.stop_after - self.seconds)

    def check(self, needed: float = 0.0) -> None:
        """Raise OutOfTime if fewer than `needed` seconds are left.

        At most a quarter of the call is kept free, so that short calls get somewhere too.
        """
        left = self.left
        if left is not None and left <= min(needed, (self.stop_after or 0.0) / 4):
            raise OutOfTime
