"""The whole study at tiny sizes: rows, resuming, the report; and its parts by themselves."""

import dataclasses
import json
import math

import pytest
import torch

from longspan import StickBreakingConfig
from longspan.errors import ConfigError
from longspan.eval.extrapolation import (
    book_windows,
    position_edges,
    position_losses,
    window_losses,
)
from longspan.models import Transformer, TransformerConfig, next_token_loss
from longspan.studies.report import render_html, render_markdown
from longspan.studies.stick_breaking_length.data import open_data, prepare_data
from longspan.studies.stick_breaking_length.page import build_report
from longspan.studies.stick_breaking_length.recall import (
    VOCABULARY,
    RecallBatches,
    draw_recall,
    recall_accuracy,
)
from longspan.studies.stick_breaking_length.run import run_study
from longspan.studies.stick_breaking_length.sizes import FULL
from longspan.studies.stick_breaking_length.speed import STOPS, early_stop_rows
from longspan.studies.stick_breaking_length.variants import READINGS, VARIANTS
from longspan.train import IGNORED
from longspan.train.trained import with_settings


@pytest.fixture(scope="module")
def finished(prepared, tiny_sizes, tmp_path_factory):
    """The study, cut into calls by a clock that is always up."""
    folder = tmp_path_factory.mktemp("study")
    calls = 1
    settings = {"sizes": tiny_sizes, "budget_minutes": 0.05, "device": "cpu"}
    outcome = run_study(open_data(prepared), folder, stop_after=2.0, **settings)
    while not outcome.is_finished:
        assert not outcome.failures
        assert calls < 60
        calls += 1
        outcome = run_study(open_data(prepared), folder, stop_after=2.0, **settings)
    return folder, outcome.rows, calls


def kinds(rows):
    return {kind: [r for r in rows if r["kind"] == kind] for kind in {r["kind"] for r in rows}}


def test_every_row_is_there_once(finished, tiny_sizes):
    folder, rows, calls = finished
    assert calls > 1
    found = kinds(rows)
    assert len({row["key"] for row in rows}) == len(rows)
    assert len(found["plan"]) == 1
    assert [row["variant"] for row in found["trained"]] == list(VARIANTS)
    assert len(found["length"]) == len(READINGS) * len(tiny_sizes.lengths)
    assert len(found["positions"]) == len(READINGS)
    assert len(found["early_stop"]) == len(tiny_sizes.speed_lengths)
    assert {row["variant"] for row in found["recall"]} == {"stick-breaking", "rope", "nope"}
    assert {row["variant"] for row in found["sibling"]} == {"stick-breaking", "rope"}
    on_disk = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len(on_disk) == len(rows)
    assert all(row["device"] and row["torch"] and row["time"] for row in rows)


def test_all_variants_got_the_same(finished):
    _, rows, _ = finished
    trained = kinds(rows)["trained"]
    assert len({(row["steps"], row["tokens"]) for row in trained}) == 1
    sizes = [row["num_parameters"] for row in trained]
    assert max(sizes) < 1.02 * min(sizes)  # forget gates are all that differs
    for row in trained:
        assert row["final_loss"] < math.log(300)


def test_scalings_change_nothing_at_the_trained_length(finished, tiny_sizes):
    _, rows, _ = finished
    loss = {(r["reading"], r["length"]): r["loss"] for r in kinds(rows)["length"]}
    short, long = tiny_sizes.lengths
    assert loss["rope", short] == loss["rope-yarn", short] == loss["rope-ntk", short]
    assert len({loss[name, long] for name in ("rope", "rope-yarn", "rope-ntk")}) == 3


def test_rows_agree_with_the_small_model(finished, prepared, tiny_sizes):
    """The number reported for the kept model is what its file gives."""
    folder, rows, _ = finished
    row = next(r for r in kinds(rows)["sibling"] if r["variant"] == "stick-breaking")
    file = folder / "models" / "stick-breaking" / "model.safetensors"
    assert file.stat().st_size == row["bytes"]
    model = Transformer.load(file.parent).float()
    assert isinstance(model.config.attention, StickBreakingConfig)
    windows, _ = book_windows(
        open_data(prepared).heldout, length=64, per_book=tiny_sizes.windows_per_book
    )
    parts = torch.cat([windows[:, :32], windows[:, 32:64]])
    targets = torch.cat([windows[:, 1:33], windows[:, 33:65]])
    with torch.no_grad():
        logits = model(parts)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert row["losses"]["32"] == pytest.approx(loss.item(), rel=1e-5)


def test_report(finished):
    _, rows, _ = finished
    report = build_report(rows)
    page, text = render_html(report), render_markdown(report)
    for reading in READINGS:
        assert reading.label in page
        assert f"| {reading.label} |" in text
    loss = next(
        r["loss"] for r in kinds(rows)["length"]
        if r["reading"] == "fox" and r["length"] == 64
    )  # fmt: skip
    assert f"{math.exp(loss):.2f}" in page
    assert f"{math.exp(loss):.2f}" in text
    assert report.verdicts[0].outcome == "not measured"  # 32 tokens say nothing about 2^11
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert text.count("| --- |") == 0
    half = build_report([row for row in rows if row["kind"] in ("plan", "trained")])
    assert half.verdicts[-1].outcome == "not measured"
    with pytest.raises(ConfigError, match="none with the plan"):
        build_report([])


def test_shipping(finished, prepared, tmp_path, monkeypatch):
    """What the tool puts into the package is found by name and is the model of the study."""
    import importlib.util
    from pathlib import Path

    from longspan.models import shipped
    from longspan.train.trained import load_trained

    folder, rows, _ = finished
    path = Path(__file__).resolve().parents[2] / "tools" / "ship_study.py"
    spec = importlib.util.spec_from_file_location("ship_study", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    home = tmp_path / "models" / "shipped"
    tool.ship([folder], prepared / "tokenizer.json", rows_path=tmp_path / "r.jsonl", shipped=home)
    monkeypatch.setattr(shipped, "files", lambda package: tmp_path / "models")
    assert list(shipped.shipped_models()) == ["longspan-rope", "longspan-stick-breaking"]
    loaded = load_trained("longspan-stick-breaking")
    kept = Transformer.load(folder / "models" / "stick-breaking").float()
    assert torch.equal(loaded.model.embedding.weight, kept.embedding.weight)
    row = next(r for r in kinds(rows)["sibling"] if r["variant"] == "rope")
    card = (home / "rope" / "README.md").read_text()
    assert f"{row['losses']['32']:.4f}" in card
    assert "longspan study" in card
    monkeypatch.setattr(tool, "MOST_BYTES", 10)
    with pytest.raises(SystemExit, match="above 10"):
        tool.ship([folder], prepared / "tokenizer.json", shipped=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_only_some_phases(prepared, tiny_sizes, tmp_path, finished):
    """What a second process with the plan of the first does."""
    (tmp_path / "plan.json").write_text((finished[0] / "plan.json").read_text())
    settings = {"sizes": tiny_sizes, "budget_minutes": 0.05, "device": "cpu"}
    outcome = run_study(open_data(prepared), tmp_path, only=["small:rope"], **settings)
    assert outcome.is_finished
    assert [(row["kind"], row["variant"]) for row in outcome.rows] == [("sibling", "rope")]
    whole = next(
        row for row in finished[1] if row["kind"] == "sibling" and row["variant"] == "rope"
    )
    assert outcome.rows[0]["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    with pytest.raises(ConfigError, match="no phase"):
        run_study(open_data(prepared), tmp_path, only=["small:fox"], **settings)


def made_up(stick, rope, *, trained=2048):
    """Rows of a study with these losses by length, over four books."""
    books = ["a", "b", "c", "d"]
    sizes = dataclasses.asdict(dataclasses.replace(FULL, length=trained))
    rows = [{"kind": "plan", "key": "p", "sizes": sizes, "tokens": 1, "epochs": 1.0, "steps": 10,
             "vocab_size": 9, "budget_minutes": 1.0}]  # fmt: skip
    for name, losses in (("stick-breaking", stick), ("rope", rope)):
        for n, loss in losses.items():
            windows = [loss + 0.1 * i + 1e-4 * (i % 2) for i in range(4)]
            rows.append({"kind": "length", "key": f"{name}{n}", "reading": name, "length": n,
                         "loss": loss, "window_losses": windows, "books": books})  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("stick", "outcome"),
    [
        ((3.00, 2.98, 2.97, 2.96), "reproduced"),
        ((3.00, 2.96, 2.97, 2.98), "partly"),
        ((3.00, 3.05, 3.10, 3.20), "not reproduced"),
    ],
)
def test_verdicts_follow_the_numbers(stick, outcome):
    lengths = (2048, 4096, 8192, 16384)
    losses = dict(zip(lengths, stick, strict=True))
    rope = dict(zip(lengths, (2.9, 3.0, 3.5, 4.0), strict=True))
    report = build_report(made_up(losses, rope))
    assert report.verdicts[0].outcome == outcome
    assert f"{math.exp(stick[-1]):.2f} at 16,384" in report.verdicts[0].numbers
    assert report.verdicts[1].outcome == "reproduced"
    worse = build_report(made_up(losses, dict.fromkeys(lengths, 2.5)))
    assert worse.verdicts[1].outcome == "not reproduced"


def test_losses_of_windows_are_those_of_the_model(prepared):
    heldout = open_data(prepared).heldout
    windows, names = book_windows(heldout, length=64, per_book=2)
    assert windows.shape == (6, 65)
    assert names == [name for name in heldout.names for _ in range(2)]
    assert torch.equal(windows[1, :1], windows[0, -1:])
    model = Transformer(TransformerConfig(vocab_size=300, width=16, layers=1, heads=2)).eval()
    whole = window_losses(model, windows, length=64)
    with torch.no_grad():
        wanted = next_token_loss(model(windows), windows)
    assert whole.mean().item() == pytest.approx(wanted.item(), rel=1e-5)
    parts = window_losses(model, windows, length=16)
    torch.testing.assert_close(parts[:, :16], whole[:, :16])
    again = window_losses(model, windows[:, 16:33], length=16)
    torch.testing.assert_close(parts[:, 16:32], again)
    with pytest.raises(ConfigError, match="does not divide"):
        window_losses(model, windows, length=24)
    with pytest.raises(ConfigError, match="longest book"):
        book_windows(heldout, length=10**6, per_book=1)


def test_position_buckets():
    edges = position_edges(512)
    assert edges[0] == 0
    assert edges[-1] == 512
    assert {16, 32, 64, 128, 256} <= set(edges)
    losses = torch.arange(512.0).repeat(3, 1)
    buckets = position_losses(losses, edges)
    assert buckets[0]["loss"] == pytest.approx(7.5)
    assert buckets[0]["error"] == 0.0
    assert sum((b["to"] - b["from"]) * b["loss"] for b in buckets) == pytest.approx(512 * 255.5)


def test_recall_asks_for_the_latest_value():
    batch = draw_recall(20, 8, (1, 2))
    assert batch.inputs.max() < VOCABULARY
    repeated = 0
    for row, goals in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        latest, seen = {}, set()
        for key, value in zip(row[:40:2], row[1:40:2], strict=True):
            repeated += key in seen
            seen.add(key)
            latest[key] = value
        assert set(goals[:40]) == {IGNORED}
        for place in range(40, len(row), 2):
            assert goals[place] == latest[row[place]] == row[place + 1]
            assert goals[place + 1] == IGNORED
    assert repeated > 8
    again = draw_recall(20, 8, (1, 2))
    assert torch.equal(again.inputs, batch.inputs)
    assert not torch.equal(draw_recall(20, 8, (1, 3)).inputs, batch.inputs)


def test_recall_batches_grow():
    source = RecallBatches((2, 4, 8), batch_size=2, steps=90)
    sizes = [(source.batch(step).inputs.shape[1] - 64) // 2 for step in range(90)]
    assert set(sizes[:10]) == {2}
    assert set(sizes[30:]) == {2, 4, 8}


class Oracle(torch.nn.Module):
    """Answers from the sequence itself: the latest value, or the first one (stale)."""

    def __init__(self, latest):
        super().__init__()
        self.latest = latest
        self.embedding = torch.nn.Embedding(VOCABULARY, VOCABULARY)
        self.head = torch.nn.Identity()

    def hidden(self, ids):
        out = torch.zeros(*ids.shape, VOCABULARY)
        for b, row in enumerate(ids.tolist()):
            known = {}
            for i in range(0, len(row), 2):
                if row[i] in known:
                    out[b, i, known[row[i]]] = 1
                if self.latest or row[i] not in known:
                    known[row[i]] = row[i + 1]
        return out


def test_recall_is_scored():
    settings = {"sequences": 8, "seed": 3, "dtype": torch.float32}
    right = recall_accuracy(Oracle(latest=True), 20, **settings)
    assert right["accuracy"] == 1.0
    assert right["stale"] == 0.0
    assert right["asked"] == 8 * 32
    first = recall_accuracy(Oracle(latest=False), 20, **settings)
    assert 0.0 < first["accuracy"] < 0.8
    assert first["stale"] == pytest.approx(1 - first["accuracy"])


def test_early_stop_rows():
    config = TransformerConfig(
        vocab_size=64, width=32, layers=2, heads=2, positions="none",
        attention=StickBreakingConfig(),
    )  # fmt: skip
    model = Transformer(config).eval()
    ids = torch.randint(64, (1, 2100), generator=torch.Generator().manual_seed(0))
    rows = early_stop_rows(model, ids, dtype=torch.float32, backends=("cpu",))
    assert [row.get("early_stop") for row in rows[:3]] == list(STOPS)
    assert rows[0]["visited_fraction"] == 1.0
    assert rows[2]["visited_fraction"] <= rows[1]["visited_fraction"] < 1.0
    assert rows[3]["backend"] == "cpu"
    assert all(row["attention_ms"] > 0 for row in rows)


def test_with_settings_shares_weights():
    model = Transformer(TransformerConfig(vocab_size=16, width=16, layers=1, heads=2)).eval()
    other = with_settings(model, attention=StickBreakingConfig())
    assert other.embedding.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert other.head.weight is other.embedding.weight
    assert isinstance(other.config.attention, StickBreakingConfig)


def test_the_full_models_have_the_promised_sizes():
    model = FULL.train_config("rope", 8192, steps=10, dtype="bfloat16", compile=True).model
    assert 20e6 < Transformer(model).num_parameters < 30e6
    small = FULL.sibling_config("rope", 8192, steps=10, dtype="bfloat16", compile=True).model
    assert 2 * Transformer(small).num_parameters < 8e6  # bytes in bfloat16
    assert FULL.length == 2**11
    assert FULL.lengths[-1] == 2**15


def test_texts_must_be_held_out(books, tmp_path):
    prepare_data(books / "train", books / "train", tmp_path, vocab_size=300)
    with pytest.raises(ConfigError, match="in both"):
        open_data(tmp_path)
