"""Inputs, float64 oracles and error budgets: for our tests and for yours."""

from .inputs import INPUT_KINDS, make_qkv
from .oracles import in_float64, softmax_oracle, stick_breaking_oracle
from .tolerances import assert_within_budget, relative_error

__all__ = [
    "INPUT_KINDS",
    "assert_within_budget",
    "in_float64",
    "make_qkv",
    "relative_error",
    "softmax_oracle",
    "stick_breaking_oracle",
]
