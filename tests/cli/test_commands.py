import json

import pytest

from longspan.mechanisms import MECHANISMS


def test_info_says_what_a_bug_report_needs(longspan):
    code, out, _ = longspan("info")
    assert code == 0
    import torch

    assert torch.__version__ in out
    for name in MECHANISMS:
        assert name in out
    for extra in ("hf", "cli", "report", "eval", "train"):
        assert f"\n {extra} " in out
    assert "models are kept in" in out


def test_models_lists_what_can_be_fetched(longspan):
    code, out, _ = longspan("models")
    assert code == 0
    assert "smollm2-135m" in out
    assert "gemma3-270m" in out


def test_perplexity_by_layers_resumes(longspan, folder, book, tmp_path):
    arguments = [
        "ppl", "--model", folder, "--text", book, "--attention", "window:window=16",
        "--patched", "0,2,4", "--window", 128, "--stride", 64, "--tokens", 400, "--out", tmp_path,
    ]  # fmt: skip
    code, out, messages = longspan(*arguments)
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["num_patched_layers"] for row in rows] == [0, 2, 4]
    assert "399 scored tokens, window 128, stride 64" in out
    assert f"{rows[2]['perplexity']:.1f}" in out
    code, again, messages = longspan(*arguments)
    assert (code, again) == (0, out)
    assert messages.count("kept from an earlier run") == 3


def test_tail(longspan, folder, book, tmp_path):
    code, out, _ = longspan(
        "ppl", "--model", folder, "--text", book, "--attention", "window:window=16",
        "--contexts", "32,256", "--tail", 64, "--out", tmp_path,
    )  # fmt: skip
    assert code == 0
    assert "loss on the last 64 tokens" in out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["mechanism"], row["context"]) for row in rows] == [
        ("exact", 32), ("exact", 256), ("window", 32), ("window", 256),
    ]  # fmt: skip


def test_passkey(longspan, folder, book, tmp_path):
    code, out, _ = longspan(
        "passkey", "--model", folder, "--text", book, "--attention", "window:window=16",
        "--lengths", "400,450", "--depths", "0,1", "--trials", 2, "--haystack", "book",
        "--out", tmp_path,
    )  # fmt: skip
    assert code == 0
    assert out.count("keys found by generation") == 2
    assert "0/2 (0 % to 65.8 %)" in out.replace("\u00a0", " ")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all(row["found_low"] == 0.0 for row in rows)


def test_bench_measures_reports_and_shows(longspan, tmp_path):
    arguments = [
        "bench", "--attention", "window:window=16", "--lengths", "64,128", "--head-dims", 16,
        "--passes", "forward,backward", "--heads", 2, "--out", tmp_path, "--device", "cpu",
    ]  # fmt: skip
    code, out, _ = longspan(*arguments)
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all(row["verified"] for row in rows)
    assert all(row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] for row in rows)
    for base, row in zip(rows[::2], rows[1::2], strict=True):
        assert base["is_baseline"]
        assert row["speedup"] == base["ms_p50"] / row["ms_p50"]
    assert out.count("window:window=16, ") == 2  # one crossover sentence for each pass
    assert (tmp_path / "bench.png").stat().st_size > 5000
    assert "<svg" in (tmp_path / "bench.html").read_text()
    code, shown, _ = longspan("bench", "--show", tmp_path / "rows.jsonl")
    assert code == 0
    assert out.startswith(shown[:400])


@pytest.fixture
def small_cases(monkeypatch):
    from longspan.bench import selfcheck

    small = selfcheck.CheckCase(name="small", n_q=40, n_k=60, head_dim=16)
    monkeypatch.setattr(selfcheck, "_CASES", (small,))
    run = selfcheck.run_selfcheck
    monkeypatch.setattr(
        selfcheck, "run_selfcheck", lambda *args, **kw: run(*args, **kw, cases=(small,))
    )


def test_selfcheck_passes_here(longspan, small_cases):
    code, out, _ = longspan("selfcheck", "--device", "cpu", "--mechanism", "window")
    assert code == 0
    assert "window" in out
    assert "0 are wrong" in out
    assert "WRONG" not in out


def test_selfcheck_tells_each_result_at_once(longspan, small_cases, monkeypatch):
    """A pipe gets whole lines, each before the next check begins, and a reason once.

    Also where the progress bar is on a terminal.
    """
    from rich.console import Console

    from longspan.cli import _console

    monkeypatch.setattr(_console, "errors", Console(stderr=True, force_terminal=True))
    flushed = []
    tell = print

    def noted(*args, flush=False, **extra):
        flushed.append(flush)
        tell(*args, flush=flush, **extra)

    monkeypatch.setattr("builtins.print", noted)
    code, out, _ = longspan("selfcheck", "--device", "cpu", "--mechanism", "window")
    assert code == 0
    lines = out.splitlines()
    eager = [line for line in lines if line.startswith("window") and "eager" in line]
    assert len(eager) == 2
    assert all(line.endswith("right") and len(line) < 80 for line in eager)
    assert len(flushed) == 5  # headings, two implementations, two dtypes
    assert all(flushed)
    assert out.count("window, triton: skipped, query is on cpu") == 1
    assert lines[-1] == "2 checks ran on cpu, 0 are wrong."


def test_selfcheck_finds_a_wrong_kernel(longspan, small_cases, monkeypatch):
    from longspan.window.impl import eager

    right = eager.eager_forward

    def wrong(*args):
        output, lse = right(*args)
        return 1.01 * output, lse

    monkeypatch.setattr(eager, "eager_forward", wrong)
    code, out, _ = longspan("selfcheck", "--device", "cpu", "--mechanism", "window")
    assert code == 1
    assert "WRONG" in out
