"""The self check passes here, and notices a broken implementation."""

from __future__ import annotations

import pytest

from longspan import ConfigError
from longspan.bench.selfcheck import CheckCase, check_cases, run_selfcheck
from longspan.mechanisms import MECHANISMS

SMALL = (
    CheckCase(name="short", n_q=40, n_k=40, head_dim=16),
    CheckCase(name="padded", n_q=30, n_k=130, head_dim=20, is_padded=True),
)


def test_everything_registered_passes():
    seen = []
    rows = run_selfcheck("cpu", cases=SMALL, on_row=seen.append)
    assert seen == rows
    assert {row.mechanism for row in rows} == set(MECHANISMS)
    for row in rows:
        assert row.passed or row.skipped_reason, row
        assert row.impl != "reference"
    ran = {row.mechanism for row in rows if row.passed}
    assert ran == set(MECHANISMS)


def test_skipped_rows_say_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = run_selfcheck("cpu", ["window"], cases=SMALL[:1])
    reasons = {row.impl: row.skipped_reason for row in rows}
    assert "need a CUDA device" in reasons["triton"]
    assert reasons["eager"] is None
    assert {row.dtype for row in rows} == {"bfloat16", "float32"}


def test_a_wrong_gradient_is_noticed(monkeypatch):
    from longspan.window.impl import eager

    right = eager.eager_backward

    def wrong(*args):
        dq, dk, dv = right(*args)
        return dq, dk * 1.1, dv

    monkeypatch.setattr(eager, "eager_backward", wrong)
    rows = [r for r in run_selfcheck("cpu", ["window"], cases=SMALL[:1]) if r.impl == "eager"]
    assert rows
    assert not any(row.passed for row in rows)


def test_cases_reach_past_the_default_window():
    assert max(case.n_k for case in check_cases()) > 1024


def test_unknown_mechanism():
    with pytest.raises(ConfigError, match="Did you mean 'window'"):
        run_selfcheck("cpu", ["windw"])
