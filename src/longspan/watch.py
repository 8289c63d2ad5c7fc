"""Signs of life: what tells a rank that stopped from one that is slow."""

from __future__ import annotations

import threading
import time
from typing import Any

from .compat import default_store

__all__ = ["Heartbeat"]


class Heartbeat:
    """A thread that counts up a number in the store, and reads those of the other ranks on demand.

    Args:
        prefix: of its keys; equal on all ranks of a group and used by no other.
        rank: of this process in the group.
        timeout: seconds without a beat after which a rank counts as stopped.
    """

    def __init__(self, prefix: str, rank: int, timeout: float) -> None:
        self._prefix = prefix
        self._rank = rank
        self._timeout = timeout
        self._stop = threading.Event()
        # A connection of its own: a store's client serves one call at a time.
        self._store: Any = default_store().clone()
        self._thread = threading.Thread(target=self._beat, name="longspan-heartbeat", daemon=True)

    def start(self) -> None:
        """Beat until `stop`."""
        self._store.set(self._key(self._rank), "0")
        self._thread.start()

    def stop(self) -> None:
        """No beat any more; returns at once."""
        self._stop.set()

    def stopped(self, *, wait: bool) -> list[int]:
        """Ranks without a beat for `timeout` seconds.

        Args:
            wait: look on for up to that long, until one is found; else look at what is there.
        """
        first = self._read()
        if first is None:
            return [0]  # the store lives in rank 0, unless torchrun holds it
        start = time.monotonic()
        while wait and time.monotonic() - start < self._timeout:
            time.sleep(self._timeout / 20)
        now = self._read()
        if now is None:
            return [0]
        if not wait:
            return []
        return [rank for rank, beats in now.items() if beats == first.get(rank, "")]

    def _beat(self) -> None:
        beats = 0
        while not self._stop.wait(self._timeout / 10):
            beats += 1
            try:
                self._store.set(self._key(self._rank), str(beats))
            except RuntimeError:
                return  # the store is gone; the main thread notices by itself

    def _read(self) -> dict[int, str] | None:
        """Beats of the other ranks that have begun; None without a store."""
        beats = {}
        rank = 0
        try:
            while True:
                key = self._key(rank)
                if not self._store.check([key]):
                    break
                if rank != self._rank:
                    beats[rank] = self._store.get(key).decode()
                rank += 1
        except RuntimeError:
            return None
        return beats

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/beat/{rank}"
