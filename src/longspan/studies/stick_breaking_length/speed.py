"""What early stop saves in the trained model: time, visited key tiles, and its effect on loss."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...bench.measure import time_call
from ...exact.api import exact_attention
from ...exact.config import ExactConfig
from ...models.transformer import Transformer
from ...stick_breaking.api import stick_breaking_attention
from ...stick_breaking.config import StickBreakingConfig
from ...train.trained import with_settings

__all__ = ["STOPS", "early_stop_rows", "stopped"]

#: None: the full walk. 2**-14: below the rounding of a bfloat16 output. 2**-7: visible in it.
STOPS: tuple[float | None, ...] = (None, 2.0**-14, 2.0**-7)


def stopped(model: Transformer, early_stop: float | None) -> Transformer:
    """The same weights with another setting of early stop."""
    attention = dataclasses.replace(model.config.attention, early_stop=early_stop)
    return with_settings(model, attention=attention)


@torch.no_grad()
def early_stop_rows(
    model: Transformer, ids: Tensor, *, dtype: torch.dtype, backends: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Measure one text.

    Args:
        model: a trained stick-breaking model.
        ids: (1, N) on its device.
        dtype: of the body.
        backends: of exact attention, timed on the same queries, keys and values.

    Returns:
        One row per early stop: `visited_fraction` (key tiles walked, of a full walk),
        `attention_ms` (all layers, forward), `prefill_ms` (the whole body). Then one row per
        backend with `attention_ms`.
    """
    device = ids.device
    rows: list[dict[str, Any]] = []
    calls = _record(model, ids, dtype)
    full = sum(int(visited.sum()) for _, visited in calls)
    for stop in STOPS:
        other = stopped(model, stop)
        visited = sum(int(v.sum()) for _, v in _record(other, ids, dtype))
        config = StickBreakingConfig(early_stop=stop)

        def attend(config: StickBreakingConfig = config) -> None:
            for q, k, v in (qkv for qkv, _ in calls):
                stick_breaking_attention(q, k, v, config=config)

        rows.append(
            {
                "mechanism": "stick_breaking",
                "early_stop": stop,
                "visited_fraction": visited / full,
                "attention_ms": _time(attend, device),
                "prefill_ms": _time(partial(_read, other, ids, dtype), device),
            }
        )
    for backend in backends:
        exact = ExactConfig(backend=backend)

        def attend_exactly(exact: ExactConfig = exact) -> None:
            for q, k, v in (qkv for qkv, _ in calls):
                exact_attention(q, k, v, is_causal=True, config=exact)

        rows.append(
            {
                "mechanism": "exact",
                "backend": backend,
                "attention_ms": _time(attend_exactly, device),
            }
        )
    return rows


def _time(fn: Callable[[], Any], device: torch.device) -> float:
    return time_call(fn, device=device, warmup_ms=10.0, measure_ms=60.0).ms_p50


def _read(model: Transformer, ids: Tensor, dtype: torch.dtype) -> Tensor:
    enabled = dtype is torch.bfloat16
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=enabled):
        return model.hidden(ids)


def _record(
    model: Transformer, ids: Tensor, dtype: torch.dtype
) -> list[tuple[tuple[Tensor, Tensor, Tensor], Tensor]]:
    recorder = _Recorder()
    with contextlib.ExitStack() as stack:
        stack.enter_context(recorder)
        _read(model, ids, dtype)
    assert recorder.calls, "a stick-breaking model calls its operator in every layer"
    return recorder.calls


class _Recorder(TorchFunctionMode):
    """Keeps inputs and visited tiles of each stick-breaking call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Tensor, Tensor, Tensor], Tensor]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.longspan.stick_breaking_fwd.default:
            query, key, value = (t.detach() for t in args[:3])
            self.calls.append(((query, key, value), result[3]))
        return result
