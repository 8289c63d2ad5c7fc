"""Run the benchmark: check a mechanism against its reference, then time it beside exact."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..errors import LongspanError
from ..eval.jobs import Listener, SilentListener
from ..eval.memory import PeakMemory
from ..eval.rows import RowFile, provenance, settings_key
from ..exact.config import ExactConfig
from ..mechanisms import get_mechanism
from ..testing import assert_within_budget, make_qkv
from .measure import time_call
from .registry import Case, Shape

__all__ = ["run_bench", "verify"]

_VERIFY_LENGTH = 1536  # the dense float64 reference needs length x length memory
_VERIFY_HEADS = 2

Inputs = tuple[Tensor, Tensor, Tensor]


def run_bench(
    cases: Sequence[Case],
    shapes: Sequence[Shape],
    rows: RowFile,
    *,
    device: torch.device,
    notes: Mapping[str, Any] | None = None,
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Time every case at every shape, and exact attention beside it.

    Within a shape the baseline is timed first, in the same process and on the same inputs. A case
    that refuses a shape (or runs out of memory) gives a row with the reason and no time. Rows that
    are there already are kept if the baseline of their shape is, too.

    Returns:
        The rows in order: per shape the baseline, then the cases.
    """
    listener = listener or SilentListener()
    baseline = Case(label="exact", mechanism="exact", config=ExactConfig())
    results: list[dict[str, Any]] = []
    for shape in shapes:
        base: dict[str, Any] | None = None
        for case in (baseline, *cases):
            settings = _settings(case, shape, device)
            key = settings_key(settings)
            label = f"{case.label}, {shape.pass_name}, {shape.length} tokens"
            row = rows.find(key)
            if row is None:
                listener.begin(label)
                measured = _measure(case, shape, device)
                if base is not None and base.get("ms_p50") and measured["ms_p50"]:
                    measured["speedup"] = base["ms_p50"] / measured["ms_p50"]
                start = {"key": key, "label": case.label, "is_baseline": case is baseline}
                row = {**start, **settings, **measured, **provenance(device), **(notes or {})}
                rows.append(row)
                listener.finish(label, row, "")
            else:
                listener.finish(label, row, "kept")
            base = row if case is baseline else base
            results.append(row)
    return results


def _settings(case: Case, shape: Shape, device: torch.device) -> dict[str, Any]:
    return {
        "kind": "bench",
        "mechanism": case.mechanism,
        "config": dataclasses.asdict(case.config),
        "device_type": device.type,
        **shape.row(),
        "version": __version__,
    }


def _inputs(shape: Shape, device: torch.device, *, dtype: torch.dtype | None = None) -> Inputs:
    return make_qkv(
        shape.batch,
        shape.heads,
        shape.length,
        shape.head_dim,
        kv_heads=shape.kv_heads,
        dtype=dtype or getattr(torch, shape.dtype),
        device=device,
    )


def _call(case: Case, shape: Shape, impl: str = "auto") -> Callable[..., Tensor]:
    function = get_mechanism(case.mechanism).function

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = function(
            query,
            key,
            value,
            is_causal=True,
            enable_gqa=shape.heads != shape.kv_heads,
            config=case.config,
            impl=impl,
        )
        return output if isinstance(output, Tensor) else output.output

    return run


def _results(call: Callable[..., Tensor], inputs: Inputs, backward: bool) -> list[Tensor]:
    """The output, and for the backward pass the three gradients under a fixed upstream gradient."""
    leaves = [tensor.detach().clone().requires_grad_(backward) for tensor in inputs]
    output = call(*leaves)
    if not backward:
        return [output.detach()]
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(output.shape, generator=generator).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def verify(case: Case, shape: Shape, device: torch.device) -> tuple[bool, float, int]:
    """Compare what would be timed with the float64 reference of the same approximation.

    Returns:
        Whether it is within the error budget, the largest absolute error, and the length at which
        it was checked (the reference is dense, so long shapes are checked at a shorter length).
    """
    length = min(shape.length, _VERIFY_LENGTH)
    heads = min(shape.heads, _VERIFY_HEADS)
    small = dataclasses.replace(shape, batch=1, heads=heads, kv_heads=1, length=length)
    backward = shape.pass_name == "backward"
    inputs = _inputs(small, device)
    doubles = (inputs[0].double(), inputs[1].double(), inputs[2].double())
    reference = _call(case, small, "reference")
    actual = _results(_call(case, small), inputs, backward)
    oracle = _results(reference, doubles, backward)
    plain = _results(reference, inputs, backward)
    error, is_good = 0.0, True
    for one, exact, low in zip(actual, oracle, plain, strict=True):
        error = max(error, float((one.double() - exact).abs().max()))
        try:
            assert_within_budget(one, exact, low)
        except AssertionError:
            is_good = False
    return is_good and math.isfinite(error), error, length


def _measure(case: Case, shape: Shape, device: torch.device) -> dict[str, Any]:
    empty = {"ms_p20": None, "ms_p50": None, "ms_p80": None, "peak_bytes": None, "speedup": None}
    try:
        is_good, error, length = verify(case, shape, device)
        checked = {"verified": is_good, "max_abs_error": error, "verified_length": length}
        return {**empty, **checked, "refusal": None, **_time(case, shape, device)}
    except (LongspanError, torch.OutOfMemoryError) as refused:
        reason = "out of memory" if isinstance(refused, torch.OutOfMemoryError) else str(refused)
        return {**empty, "verified": False, "max_abs_error": None, "refusal": reason}


def _time(case: Case, shape: Shape, device: torch.device) -> dict[str, Any]:
    inputs = _inputs(shape, device)
    call = _call(case, shape)
    if shape.pass_name == "forward":
        with torch.no_grad():
            return _clock(lambda: call(*inputs), device)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    output = call(*leaves)
    upstream = torch.randn_like(output)
    return _clock(lambda: torch.autograd.grad(output, leaves, upstream, retain_graph=True), device)


def _clock(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    with PeakMemory(device) as memory:
        call()
    peak = {"peak_bytes": memory.peak_bytes, "peak_method": memory.method}
    return {**time_call(call, device=device)._asdict(), **peak}


def count_lines(cases: Sequence[Case], shapes: Sequence[Shape]) -> int:
    """Number of rows that `run_bench` returns."""
    return len(shapes) * (1 + len(cases))
