"""Rows hold what a reader needs to judge a number."""

from __future__ import annotations

import json
import time

import pytest
import torch

from longspan import WindowConfig
from longspan.bench.environment import environment
from longspan.bench.measure import Timing, append_rows, make_row, peak_bytes, time_call

SHAPE = {
    "batch": 1, "heads": 2, "kv_heads": 2, "length": 8, "head_dim": 4, "dtype": "float32",
    "is_causal": True,
}  # fmt: skip


def test_time_of_a_pause():
    timing = time_call(lambda: time.sleep(0.003), device="cpu", warmup_ms=1, measure_ms=12)
    assert 3.0 <= timing.ms_p20 <= timing.ms_p50 <= timing.ms_p80
    assert timing.timer == "perf_counter"


def test_slow_calls_are_measured_more_than_once():
    calls = []
    time_call(lambda: calls.append(time.sleep(0.002)), device="cpu", warmup_ms=0, measure_ms=0)
    assert len(calls) == 1 + 3


def test_memory_is_unknown_on_the_cpu():
    assert peak_bytes(lambda: torch.ones(1000), "cpu") is None


@pytest.mark.gpu
def test_memory_on_a_gpu():
    assert peak_bytes(lambda: torch.empty(2**20, device="cuda"), "cuda") == 2**22


def test_rows_are_flat_and_complete(tmp_path):
    row = make_row(mechanism="window", impl="eager", config=WindowConfig(window=8), shape=SHAPE,
                   stage="forward", timing=Timing(1.0, 2.0, 3.0, "perf_counter"),
                   environment=environment("cpu"), verified=True, floor_ms=0.5)  # fmt: skip
    append_rows(tmp_path / "new" / "rows.jsonl", [row])
    append_rows(tmp_path / "new" / "rows.jsonl", [row])
    lines = (tmp_path / "new" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row, row]
    wanted = (
        "mechanism impl config batch heads kv_heads length head_dim dtype is_causal pass ms_p20 "
        "ms_p50 ms_p80 peak_bytes max_abs_error verified timer device driver torch triton longspan "
        "commit dirty command time"
    )
    assert set(wanted.split()) <= set(row)
    assert row["config"] == "WindowConfig(window=8, num_sinks=4)"
    assert not any(isinstance(value, (dict, list)) for value in row.values())


def test_environment_names_no_directory(monkeypatch):
    told = environment("cpu")
    assert told["torch"] == torch.__version__
    assert not told["command"].startswith("python /")
    monkeypatch.setenv("LONGSPAN_COMMIT", "abc")
    assert environment("cpu")["commit"] == "abc"
