"""Does everything compute what it says, on this machine? The library behind `longspan selfcheck`.

Each implementation of each registered mechanism runs a few cases, forward and backward, and is
compared with the mechanism's own reference in float64 on the same inputs. The budget comes from
the machine: twice the relative error that plain exact attention has in the same dtype.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._validation import validate
from ..errors import LongspanError
from ..mechanisms import MECHANISMS, Mechanism, get_mechanism
from ..testing import make_qkv
from ..types import Impl

__all__ = ["CheckCase", "CheckRow", "check_cases", "run_selfcheck"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckCase:
    """Shapes of one causal call; the last entry of a padded batch has 100 keys less."""

    name: str
    n_q: int
    n_k: int
    head_dim: int
    heads: int = 4
    kv_heads: int = 2
    is_padded: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckRow:
    """One implementation, case and dtype.

    error: largest absolute error, of the result or gradient that is worst against its budget.
    budget: what was allowed for it.
    passed: error <= budget everywhere; False if skipped.
    seconds: time of the check, the reference included.
    skipped_reason: why it did not run; None if it did.
    """

    mechanism: str
    impl: str
    case: str
    dtype: str
    error: float
    budget: float
    passed: bool
    seconds: float
    skipped_reason: str | None = None


_CASES = (
    CheckCase(name="prefill", n_q=1500, n_k=1500, head_dim=64),
    CheckCase(name="wide heads", n_q=300, n_k=1400, head_dim=128),
    CheckCase(name="odd head dim", n_q=700, n_k=700, head_dim=80, kv_heads=4),
    CheckCase(name="padding", n_q=1200, n_k=1200, head_dim=64, is_padded=True),
    CheckCase(name="decoding", n_q=1, n_k=1300, head_dim=64),
)


def check_cases() -> tuple[CheckCase, ...]:
    """The cases that `run_selfcheck` runs."""
    return _CASES


def run_selfcheck(
    device: torch.device | str | None = None,
    mechanisms: Iterable[str] | None = None,
    *,
    cases: Iterable[CheckCase] = _CASES,
    on_row: Callable[[CheckRow], None] | None = None,
) -> list[CheckRow]:
    """Compare every implementation with its float64 reference on `device`.

    A mechanism runs with its default settings. If its `api.py` has
    `example_arguments(query) -> dict`, the result is passed on as further keyword arguments.

    Args:
        device: default: the CUDA device if there is one, else the CPU.
        mechanisms: names; default: all that are registered.
        cases: shapes; default: `check_cases()`.
        on_row: called with each finished row, e.g. to move a progress bar.

    Returns:
        One CheckRow per mechanism, implementation, case and dtype, in this order.

    Raises:
        ConfigError: an unknown mechanism.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    names = tuple(MECHANISMS) if mechanisms is None else tuple(mechanisms)
    listed = [get_mechanism(name) for name in names]
    rows = []
    for mechanism in listed:
        for row in _check(mechanism, device, tuple(cases)):
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return rows


def _check(
    mechanism: Mechanism, device: torch.device, cases: tuple[CheckCase, ...]
) -> Iterator[CheckRow]:
    half = (torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.bfloat16,)
    for case in cases:
        for dtype in (*half, torch.float32):
            start = time.perf_counter()
            q, k, v = make_qkv(2, case.heads, case.n_q, case.head_dim, n_k=case.n_k,
                               kv_heads=case.kv_heads, dtype=dtype, device=device)  # fmt: skip
            common = _common(case, device)
            call = validate(mechanism.name, q, k, v, **common)
            reports = mechanism.implementations(call, mechanism.config_class())
            shown = {"mechanism": mechanism.name, "case": case.name, "dtype": str(dtype)[6:]}
            oracle = budgets = None
            for report in reports:
                if report.impl is Impl.REFERENCE:
                    continue
                reason, got = report.refusal, None
                if reason is None:
                    try:
                        if oracle is None:
                            oracle = _run(mechanism, Impl.REFERENCE, _wide(q, k, v), common)
                            budgets = _budgets(oracle, q, k, v, common)
                        got = _run(mechanism, report.impl, (q, k, v), common)
                    except LongspanError as refusal:
                        reason = str(refusal)
                error, budget = float("nan"), float("nan")
                if got is not None and oracle is not None and budgets is not None:
                    error, budget = _worst(got, oracle, budgets)
                yield CheckRow(impl=report.impl.value, error=error, budget=budget,
                               passed=error <= budget, seconds=time.perf_counter() - start,
                               skipped_reason=reason, **shown)  # fmt: skip
                start = time.perf_counter()


def _common(case: CheckCase, device: torch.device) -> dict[str, Any]:
    common: dict[str, Any] = {
        "is_causal": True,
        "enable_gqa": True,
        "query_offset": case.n_k - case.n_q,
    }
    if case.is_padded:
        lengths = [case.n_k, case.n_k - 100]
        common["key_lengths"] = torch.tensor(lengths, dtype=torch.int32, device=device)
    return common


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.double() for tensor in tensors)


def _run(
    mechanism: Mechanism, impl: Impl, inputs: tuple[Tensor, ...], common: dict[str, Any]
) -> list[Tensor]:
    """Output and gradients of query, key and value."""
    api = importlib.import_module(f"..{mechanism.package}.api", __package__)
    extra = api.example_arguments(inputs[0]) if hasattr(api, "example_arguments") else {}
    q, k, v = (tensor.detach().requires_grad_() for tensor in inputs)
    result = mechanism.function(q, k, v, impl=impl, **common, **extra)
    output = result if isinstance(result, Tensor) else result.output
    return _with_gradients(output, (q, k, v))


def _with_gradients(output: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad(output, inputs, upstream.to(output), allow_unused=True)
    pairs = zip(inputs, grads, strict=True)
    return [output.detach(), *(torch.zeros_like(t) if g is None else g for t, g in pairs)]


def _budgets(
    oracle: list[Tensor], q: Tensor, k: Tensor, v: Tensor, common: dict[str, Any]
) -> list[float]:
    """Twice the relative error of plain exact attention, at the size of the oracle, plus 4 ulp."""
    budgets = []
    exact, plain = (_plain_exact(t, common) for t in (_wide(q, k, v), (q, k, v)))
    for wanted, right, rounded in zip(oracle, exact, plain, strict=True):
        size = float(wanted.abs().amax())
        relative = _error(rounded, right) / max(float(right.abs().amax()), 1e-30)
        floor = 4 * torch.finfo(q.dtype).eps * max(size, 1.0)
        budgets.append(2 * relative * size + floor)
    return budgets


def _plain_exact(inputs: tuple[Tensor, ...], common: dict[str, Any]) -> list[Tensor]:
    """Dense exact attention, written as one writes it, in the dtype of the inputs."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in inputs)
    groups = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(groups, 1).transpose(-1, -2)) * q.shape[-1] ** -0.5
    j = torch.arange(k.shape[2], device=q.device)
    p = torch.arange(q.shape[2], device=q.device)[:, None] + common["query_offset"]
    hidden = (j > p)[None, None]
    if "key_lengths" in common:
        hidden = hidden | (j >= common["key_lengths"][:, None, None, None])
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
    return _with_gradients(weights @ v.repeat_interleave(groups, 1), (q, k, v))


def _error(actual: Tensor, oracle: Tensor) -> float:
    difference = (actual.double() - oracle).abs()
    return float(torch.nan_to_num(difference, nan=float("inf")).amax())


def _worst(got: list[Tensor], oracle: list[Tensor], budgets: list[float]) -> tuple[float, float]:
    errors = [_error(a, b) for a, b in zip(got, oracle, strict=True)]
    return max(zip(errors, budgets, strict=True), key=lambda pair: pair[0] / pair[1])
