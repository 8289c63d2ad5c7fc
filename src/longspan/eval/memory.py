"""Peak memory of a block of code, above what was in use when it began."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from types import TracebackType

import torch

__all__ = ["PeakMemory"]

_STATM = "/proc/self/statm"


class PeakMemory:
    """Measure the peak memory of a `with` block.

    On CUDA: the allocator's own peak (`torch.cuda.max_memory_allocated`) minus what was allocated
    at entry. On Linux CPUs: the highest resident size of the process, sampled from
    /proc/self/statm, minus the size at entry; free heap is first given back to the system, so that
    a block that could reuse freed memory does not look cheaper than it is. Peaks shorter than the
    sampling period can be missed. Elsewhere memory is not measured.

    Attributes:
        peak_bytes: bytes above the entry, or None where it cannot be measured.
        method: how it was measured, for the record.
    """

    def __init__(self, device: torch.device, *, period: float = 0.002) -> None:
        self.device = device
        self.period = period
        self.peak_bytes: int | None = None
        self.method = "unavailable on this system"
        self._sampler: threading.Thread | None = None
        self._done = threading.Event()
        self._highest = 0
        self._before = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            self.method = "torch.cuda.max_memory_allocated"
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu" and os.path.exists(_STATM):
            self.method = f"resident size sampled every {1000 * self.period:g} ms"
            _give_back_free_heap()
            self._before = self._highest = _resident_bytes()
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif self._sampler is not None:
            self._highest = max(self._highest, _resident_bytes())
            self._done.set()
            self._sampler.join()
            self.peak_bytes = self._highest - self._before

    def _sample(self) -> None:
        while not self._done.is_set():
            self._highest = max(self._highest, _resident_bytes())
            time.sleep(self.period)


def _resident_bytes() -> int:
    with open(_STATM, "rb") as handle:
        return int(handle.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _give_back_free_heap() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # another C library: growth may then be underestimated
        return
