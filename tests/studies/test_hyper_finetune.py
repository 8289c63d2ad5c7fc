"""Training on under approximation: weights carried over, rows, resuming, gaps, the report."""

import dataclasses
import math

import pytest
import torch

from longspan import HyperConfig
from longspan.errors import ConfigError
from longspan.models import Transformer
from longspan.studies.hyper_finetune.page import build_report, gaps
from longspan.studies.hyper_finetune.run import FULL, SMALL, TUNED, run_finetune
from longspan.studies.report import render_html, render_markdown
from longspan.studies.stick_breaking_length.data import open_data
from longspan.train import Batches, TrainConfig, train

SIZES = dataclasses.replace(
    SMALL, model={"width": 16, "layers": 1, "heads": 2}, length=1100, base_steps=12, tune_steps=6,
    log_every=2, smallest=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    calls = 0
    while True:
        calls += 1
        assert calls < 40
        outcome = run_finetune(
            open_data(prepared), folder, sizes=SIZES, device="cpu", stop_after=1.5
        )
        if outcome.is_finished:
            return folder, outcome.rows, calls


def test_rows(finished):
    folder, rows, calls = finished
    assert calls > 1
    assert len({row["key"] for row in rows}) == len(rows)
    assert [row["model"] for row in rows if row["kind"] == "trained"] == ["base", *TUNED]
    pairs = {(row["model"], row["reading"]) for row in rows if row["kind"] == "loss"}
    wanted = {("base", name) for name in TUNED} | {(n, r) for n in TUNED for r in ("exact", n)}
    assert pairs == wanted
    kept = Transformer.load(folder / "runs" / "default" / "model")
    assert isinstance(kept.config.attention, HyperConfig)


def test_the_approximation_is_in_the_training(finished):
    """Continuations differ from the control, so their forward and backward were not exact."""
    folder, rows, _ = finished
    weights = {
        name: Transformer.load(folder / "runs" / name.replace(", ", "-") / "model").head.weight
        for name in ("base", *TUNED)
    }
    for name in TUNED:
        assert not torch.equal(weights[name], weights["base"])
        if name != "exact":
            assert not torch.equal(weights[name], weights["exact"])
    losses = {(r["model"], r["reading"]): r["loss"] for r in rows if r["kind"] == "loss"}
    assert losses["base", "paper, LSH"] != losses["base", "exact"]


def test_a_run_starts_with_given_weights(finished, prepared, tmp_path):
    folder, _, _ = finished
    base = Transformer.load(folder / "runs" / "base" / "model")
    tokens = open_data(prepared).train
    config = TrainConfig(model=base.config, steps=1, length=64, batch_size=2, learning_rate=1e-9,
                         log_every=1, checkpoint_every=1, weight_decay=0.0)  # fmt: skip
    source = Batches(tokens, length=64, batch_size=2)
    result = train(config, source, tmp_path, device="cpu", start=folder / "runs" / "base" / "model")
    torch.testing.assert_close(result.model.head.weight, base.head.weight, rtol=0, atol=1e-7)
    batch = source.batch(0)
    with torch.no_grad():
        logits = base(batch.inputs)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    assert result.rows[0]["loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_report(finished):
    _, rows, _ = finished
    report = build_report(rows)
    text = render_markdown(report)
    loss = next(
        r["loss"] for r in rows
        if r["kind"] == "loss" and (r["model"], r["reading"]) == ("base", "paper, LSH")
    )  # fmt: skip
    assert f"{math.exp(loss):.2f}" in text
    assert "<script" not in render_html(report)
    assert {verdict.outcome for verdict in report.verdicts} == {"not measured"}  # tiny sizes
    with pytest.raises(ConfigError, match="base model"):
        build_report([])


@pytest.mark.parametrize(
    ("after", "outcome"), [(0.02, "reproduced"), (0.08, "partly"), (0.2, "not reproduced")]
)
def test_verdicts_follow_the_gaps(after, outcome):
    sizes = dataclasses.asdict(FULL)
    rows = [
        {"study": "hyper-finetune", "kind": "trained", "model": name, "steps": 10, "tokens": 100,
         "seconds": 1.0, "num_parameters": 5, "tokens_per_second": 9.0, "curve": [[10, 3.0]],
         "sizes": sizes}
        for name in ("base", "exact", "default")
    ]  # fmt: skip
    found = {("base", "exact"): 3.0, ("base", "default"): 3.1, ("exact", "exact"): 2.9,
             ("default", "default"): 2.9 + after}  # fmt: skip
    rows += [
        {"study": "hyper-finetune", "kind": "loss", "model": model, "reading": reading,
         "loss": loss, "window_losses": [loss + 0.2, loss - 0.2 + 1e-4]}
        for (model, reading), loss in found.items()
    ]  # fmt: skip
    losses = {(r["model"], r["reading"]): r for r in rows if r["kind"] == "loss"}
    (before, _), (later, _) = gaps(losses, "default")
    assert before == pytest.approx(0.1)
    assert later == pytest.approx(after)
    verdicts = {v.claim: v.outcome for v in build_report(rows).verdicts}
    assert next(o for claim, o in verdicts.items() if "(default)" in claim) == outcome
