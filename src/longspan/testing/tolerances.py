"""The error budget: how wrong a low-precision result may be."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_within_budget", "relative_error"]


def assert_within_budget(
    actual: Tensor,
    oracle: Tensor,
    low_precision: Tensor,
    *,
    factor: float = 2.0,
    magnitude: float = 1.0,
    label: str = "result",
) -> None:
    """Assert |actual - oracle| <= factor * |low_precision - oracle| + 4 ulp, in the maximum norm.

    Args:
        actual: what is tested.
        oracle: the same in float64.
        low_precision: plain torch in the dtype of `actual`.
        factor: how many times the error of plain torch is allowed.
        magnitude: size at which the floor of 4 ulp is taken, if larger than the result itself;
            needed where plain torch is exact by luck (the gradient for one key is zero).
        label: named in the failure.

    Raises:
        AssertionError: over budget, or NaN where the oracle has none.
    """
    oracle = oracle.double()
    eps = torch.finfo(actual.dtype).eps
    size = max(low_precision.detach().abs().nan_to_num().amax().item(), magnitude)
    budget = factor * _distance(low_precision, oracle) + 4 * eps * size
    error = _distance(actual, oracle)
    assert error <= budget, f"{label}: error {error:.3e} > budget {budget:.3e}"


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """|actual - oracle| / |oracle| in the Frobenius norm; NaN counts as infinite error."""
    difference = float((actual.double() - oracle.double()).norm())
    if difference != difference:
        return float("inf")
    return difference / max(float(oracle.double().norm()), torch.finfo(torch.float64).tiny)


def _distance(actual: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference; equal infinities differ by 0, a NaN on one side by infinity."""
    if actual.numel() == 0:
        return 0.0
    actual = actual.detach().double()
    difference = torch.where(actual == oracle, 0.0, (actual - oracle.detach()).abs())
    return float(torch.nan_to_num(difference, nan=float("inf")).amax())
