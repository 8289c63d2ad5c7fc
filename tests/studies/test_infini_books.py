"""Books with memory: the same batches, losses whole and by segment, resuming, verdicts, report."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest
import torch

from longspan.errors import ConfigError
from longspan.models import Transformer
from longspan.studies.infini_books.card import model_card as books_card
from longspan.studies.infini_books.page import build_report
from longspan.studies.infini_books.run import FULL, LABELS, SMALL, attention_of, run_books
from longspan.studies.report import render_html, render_markdown
from longspan.studies.stick_breaking_length.data import open_data
from longspan.train import load_trained

SIZES = dataclasses.replace(
    SMALL, model={"width": 16, "layers": 1, "heads": 2}, length=512, segment=64, steps=12,
    log_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("books-study")
    calls = 0
    while True:
        calls += 1
        assert calls < 60
        outcome = run_books(open_data(prepared), folder, sizes=SIZES, device="cpu", stop_after=1.0)
        if outcome.is_finished:
            return folder, outcome.rows, calls


def test_rows(finished):
    folder, rows, calls = finished
    assert calls > 1
    assert len({row["key"] for row in rows}) == len(rows)
    assert [row["model"] for row in rows if row["kind"] == "trained"] == list(LABELS)
    pairs = {(row["model"], row["length"]) for row in rows if row["kind"] == "loss"}
    assert pairs == {(name, length) for name in LABELS for length in (512, 64)}
    for row in rows:
        if row["kind"] == "loss":
            assert len(row["by_segment"]) == 8
            assert sum(row["by_segment"]) / 8 == pytest.approx(row["loss"], rel=1e-5)
    gates = {row["model"]: row["gates"] for row in rows if row["kind"] == "trained"}
    assert [len(gates[name]) for name in ("infini", "window", "infini-delta", "full")] == [
        1,
        0,
        1,
        0,
    ]
    kept = Transformer.load(folder / "models" / "infini")
    assert kept.config.attention == attention_of("infini", 64)


def test_what_a_window_cannot_see(finished):
    """Read by segments, the first segment of each window is the same; later ones are not."""
    _, rows, _ = finished
    found = {(r["model"], r["length"]): r["by_segment"] for r in rows if r["kind"] == "loss"}
    for name in LABELS:
        assert found[name, 512][0] == pytest.approx(found[name, 64][0], rel=1e-5)
        assert found[name, 512][4] != pytest.approx(found[name, 64][4], rel=1e-6)


def test_killed_training_gives_the_same_losses(finished, prepared, tmp_path):
    _, rows, _ = finished
    whole = run_books(open_data(prepared), tmp_path, sizes=SIZES, device="cpu", only=["infini"])
    for row in whole.rows:
        if row["kind"] == "loss":
            other = next(r for r in rows if r["key"] == row["key"])
            assert row["loss"] == other["loss"]


def test_report(finished):
    _, rows, _ = finished
    report = build_report(rows)
    text = render_markdown(report)
    loss = next(r["loss"] for r in rows if r["kind"] == "loss" and r["model"] == "cache")
    assert f"{math.exp(loss):.2f}" in text
    assert "<script" not in render_html(report)
    assert {verdict.outcome for verdict in report.verdicts} == {"not measured"}  # tiny sizes
    with pytest.raises(ConfigError, match="trained model"):
        build_report([])


@pytest.mark.parametrize(
    ("infini", "outcome"), [(2.8, "reproduced"), (2.95, "partly"), (3.2, "not reproduced")]
)
def test_verdicts_follow_the_losses(infini, outcome):
    rows = [{"key": "t", "study": "infini-books", "kind": "trained", "model": "infini", "steps": 10,
             "tokens": 100, "seconds": 1.0, "num_parameters": 5, "tokens_per_second": 9.0,
             "curve": [[10, 3.0]], "sizes": dataclasses.asdict(FULL), "gates": [[0.1, 0.97]],
             "gates_before": [[0.2, 0.8]], "compiled": "no"}]  # fmt: skip
    found = {("infini", 32768): infini, ("window", 32768): 3.0, ("cache", 32768): 2.9,
             ("infini", 2048): 3.1, ("full", 32768): 2.7}  # fmt: skip
    rows += [
        {"key": f"{name}{length}", "study": "infini-books", "kind": "loss", "model": name,
         "length": length, "loss": loss, "window_losses": [loss + 0.2, loss - 0.2 + 1e-4],
         "by_segment": [loss] * 16}
        for (name, length), loss in found.items()
    ]  # fmt: skip
    verdicts = build_report(rows).verdicts
    assert verdicts[0].outcome == outcome
    assert verdicts[1].outcome == ("reproduced" if infini < 3.1 else "not reproduced")
    untrained = [{**row, "loss": 3.05, "window_losses": [3.25, 2.85 + 1e-4]}
                 if row.get("model") == "full" else row for row in rows]  # fmt: skip
    verdict = build_report(untrained).verdicts[0]
    assert verdict.outcome == "not measured"
    assert "too little" in verdict.numbers


def test_unknown_model(prepared, tmp_path):
    with pytest.raises(ConfigError, match="infini-delta"):
        run_books(open_data(prepared), tmp_path, sizes=SIZES, device="cpu", only=["infini-delt"])


def test_model_is_shipped(finished, prepared, tmp_path):
    folder, rows, _ = finished
    path = Path(__file__).parents[2] / "tools" / "ship_study.py"
    spec = importlib.util.spec_from_file_location("ship_books", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    home = tmp_path / "shipped"
    tool.ship_books(
        [folder], prepared / "tokenizer.json", rows_path=tmp_path / "r.jsonl", shipped=home
    )
    kept = next(r for r in rows if r["kind"] == "kept" and r["length"] == 512)
    assert f"{kept['loss']:.4f}" in (home / "infini" / "README.md").read_text()
    trained = load_trained(home / "infini")
    ids = torch.tensor([trained.tokenizer.encode("the cat sat on the mat").ids])
    assert trained.model(ids).shape[-1] == trained.model.config.vocab_size
    with pytest.raises(ConfigError, match="kept model"):
        books_card([row for row in rows if row["kind"] != "kept"])
