"""Signs of life: what tells a rank that stopped from one that is slow."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from .compat import default_store

__all__ = ["EXIT_CODE", "Heartbeat"]

#: With `exit_when_stopped`, what a process returns whose neighbour stopped.
EXIT_CODE = 75
_BEATS = 10  # per timeout
_CLOSED = "closed"


class Heartbeat:
    """A thread that counts up a number in the store, and watches those of the other ranks.

    Args:
        prefix: of its keys; equal on all ranks of a group and used by no other.
        rank, size: of this process in the group, and of the group.
        timeout: seconds without a beat after which a rank counts as stopped.
        exit_when_stopped: end this process then, with a line on standard error. The only way out
            of a kernel that waits for a rank that is gone.
    """

    def __init__(
        self, prefix: str, rank: int, size: int, timeout: float, exit_when_stopped: bool
    ) -> None:
        self._prefix, self._rank, self._timeout = prefix, rank, timeout
        self._exit = exit_when_stopped
        self._stop = threading.Event()
        # A connection of its own: a store's client serves one call at a time.
        self._store: Any = default_store().clone()
        now = time.monotonic()
        self._beats = {other: ("", now) for other in range(size) if other != rank}
        self._thread = threading.Thread(target=self._run, name="longspan-heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No beat any more; the others are told that this rank left on purpose."""
        self._stop.set()
        self._thread.join()
        try:
            self._store.set(self._key(self._rank), _CLOSED)
        except RuntimeError:
            return  # the store is gone, and with it whoever could read this

    def stopped(self, *, wait: bool = False) -> list[int]:
        """Ranks without a beat for the timeout, and ranks that left.

        Args:
            wait: look on until there is one, at most for the timeout and two beats.
        """
        deadline = time.monotonic() + self._timeout * (1 + 2 / _BEATS)
        while True:
            now = time.monotonic()
            silent = [r for r, (_, since) in self._beats.items() if now - since > self._timeout]
            left = [r for r, (beat, _) in self._beats.items() if beat == _CLOSED]
            if silent or left or not wait or now > deadline:
                return sorted({*silent, *left})
            time.sleep(self._timeout / (4 * _BEATS))

    def _run(self) -> None:
        count = 0
        while True:
            count += 1
            try:
                self._store.set(self._key(self._rank), str(count))
                self._look()
            except RuntimeError:
                if not self._stop.is_set():
                    self._end("the store does not answer, so the process that holds it stopped")
                return
            if self._stop.wait(self._timeout / _BEATS):
                return

    def _look(self) -> None:
        for rank, (seen, since) in self._beats.items():
            key = self._key(rank)
            beat = self._store.get(key).decode() if self._store.check([key]) else ""
            now = time.monotonic()
            if beat != seen:
                self._beats[rank] = (beat, now)
            elif beat != _CLOSED and now - since > self._timeout:
                self._end(f"rank {rank} gave no sign of life for {self._timeout:g} s")

    def _end(self, reason: str) -> None:
        if not self._exit:
            return
        sys.stderr.write(
            f"longspan: rank {self._rank} ends: {reason}. Start all ranks again from the last "
            "checkpoint.\n"
        )
        sys.stderr.flush()
        os._exit(EXIT_CODE)

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/beat/{rank}"
