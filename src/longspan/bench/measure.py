"""Time and memory of one call, and the row that stores them."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["Timing", "append_rows", "make_row", "peak_bytes", "time_call"]


class Timing(NamedTuple):
    """Quantiles of the time of one call in ms, and the clock that took them."""

    ms_p20: float
    ms_p50: float
    ms_p80: float
    timer: str


def time_call(
    fn: Callable[[], Any],
    *,
    device: torch.device | str,
    warmup_ms: float = 25.0,
    measure_ms: float = 100.0,
    least_calls: int = 3,
) -> Timing:
    """Time `fn`: device events on CUDA, with the L2 cache cleared before each call; else the clock.

    Args:
        fn: the call; its result is dropped.
        device: where it runs.
        warmup_ms, measure_ms: how long to warm up and to measure, at least one call each.
        least_calls: calls that are measured even if they take longer than `measure_ms`.
    """
    if torch.device(device).type == "cuda":
        return _time_on_cuda(fn, warmup_ms, measure_ms, least_calls)
    start = time.perf_counter()
    fn()
    while (time.perf_counter() - start) * 1e3 < warmup_ms:
        fn()
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < least_calls or (time.perf_counter() - start) * 1e3 < measure_ms:
        before = time.perf_counter()
        fn()
        samples.append((time.perf_counter() - before) * 1e3)
    return Timing(*_quantiles(samples), "perf_counter")


def peak_bytes(fn: Callable[[], Any], device: torch.device | str) -> int | None:
    """Device memory that `fn` needs beyond what was allocated before it; None off CUDA."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = fn()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def make_row(
    *,
    mechanism: str,
    impl: str,
    config: Any,
    shape: dict[str, Any],
    stage: str,
    timing: Timing | None,
    environment: dict[str, Any],
    verified: bool,
    max_abs_error: float | None = None,
    peak: int | None = None,
    **notes: Any,
) -> dict[str, Any]:
    """One measurement as a flat dictionary.

    Args:
        mechanism, impl: what ran.
        config: its settings (a dataclass, stored as name(field=value, ...)) or a string.
        shape: batch, heads, kv_heads, length, head_dim, dtype, is_causal.
        stage: "forward", "backward", "forward_backward" or "decode"; stored as `pass`.
        timing: None for a row that only verifies.
        environment: from `environment()`.
        verified: the result was compared with an oracle before the clock started.
        max_abs_error: from that comparison.
        peak: from `peak_bytes`.
        **notes: further keys, e.g. floor_ms.
    """
    if is_dataclass(config) and not isinstance(config, type):
        fields = ", ".join(f"{name}={value!r}" for name, value in asdict(config).items())
        config = f"{type(config).__name__}({fields})"
    clock = timing._asdict() if timing is not None else dict.fromkeys(Timing._fields)
    return {
        "mechanism": mechanism,
        "impl": impl,
        "config": config,
        **shape,
        "pass": stage,
        **clock,
        "peak_bytes": peak,
        "max_abs_error": max_abs_error,
        "verified": verified,
        **notes,
        **environment,
    }


def append_rows(path: str | os.PathLike[str], rows: list[dict[str, Any]]) -> None:
    """Append rows to a JSON lines file, made if missing; finished rows survive an interruption."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row) + "\n")


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _time_on_cuda(
    fn: Callable[[], Any], warmup_ms: float, measure_ms: float, least_calls: int
) -> Timing:
    size = 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    cache = torch.empty(max(size, 1), dtype=torch.int8, device="cuda")

    def run(count: int) -> list[float]:
        pairs = [[_event() for _ in range(2)] for _ in range(count)]
        for start, end in pairs:  # queued without waiting: the host's launch time is hidden
            cache.zero_()
            start.record()
            fn()
            end.record()
        torch.cuda.synchronize()
        return [float(start.elapsed_time(end)) for start, end in pairs]

    run(1)
    estimate = max(run(1)[0], 1e-3)
    run(int(warmup_ms / estimate))
    return Timing(*_quantiles(run(max(least_calls, int(measure_ms / estimate)))), "cuda events")


def _quantiles(samples: list[float]) -> tuple[float, float, float]:
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return cuts[1], statistics.median(samples), cuts[7]
