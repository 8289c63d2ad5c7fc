import math

import pytest
import torch

from longspan.errors import ConfigError, LongspanError
from longspan.eval.compare import compare
from longspan.eval.compare_plan import (
    COMPARE_DEFAULTS,
    default_attentions,
    plan_candidates,
)
from longspan.eval.jobs import (
    Subject,
    passkey_jobs,
    patched_model,
    perplexity_jobs,
    run_jobs,
    tail_jobs,
)
from longspan.eval.layers import sliding_share
from longspan.eval.perplexity import perplexity
from longspan.eval.rows import RowFile
from longspan.mechanisms import MECHANISMS
from longspan.testing.models import tiny_model

LENGTH = 300


@pytest.fixture
def subject(tiny, tokens):
    facts = {"model": "tiny", "text": "a text", "text_sha256": "0" * 64}
    return Subject(model=tiny.model, tokens=tokens[:LENGTH], facts=facts, notes={"command": "c"})


class Recorder:
    """A listener that remembers, and can interrupt when a line begins."""

    def __init__(self, interrupt_at=None):
        self.begun, self.finished, self.share = [], [], 0.0
        self.interrupt_at = interrupt_at

    def begin(self, label):
        self.begun.append(label)

    def advance(self, share):
        self.share += share
        if self.begun[-1] == self.interrupt_at:
            raise KeyboardInterrupt

    def finish(self, label, row, note):
        self.finished.append((label, note))


def test_rows_hold_what_the_report_needs(subject, tmp_path):
    plan = plan_candidates(["window:window=20", "window:window=600"])
    listener = Recorder()
    with RowFile(tmp_path / "rows.jsonl") as rows:
        exact, narrow, wide = compare(subject, plan, rows, listener=listener)
        assert rows.rows == [exact, narrow, wide]
    assert [row["label"] for row in (exact, narrow, wide)] == [c.label for c in plan]
    assert listener.share == pytest.approx(3.0)

    reference = perplexity(subject.model, subject.tokens, window=LENGTH)
    assert exact["loss"] == pytest.approx(reference.loss)
    assert exact["loss_by_position"] == pytest.approx(list(reference.loss_by_position))
    assert (exact["kl"], exact["top1"], exact["prefill_ratio"]) == (0.0, 1.0, 1.0)

    # A window that holds everything is exact attention; a narrow one is not.
    assert wide["loss"] == pytest.approx(exact["loss"], rel=1e-4)
    assert wide["kl"] < 1e-6
    assert wide["visited_fraction"] == 1.0
    with patched_model(subject.model, plan[1], "all"):
        patched = perplexity(subject.model, subject.tokens, window=LENGTH)
    assert narrow["loss"] == pytest.approx(patched.loss)
    assert narrow["loss"] != pytest.approx(exact["loss"], rel=1e-4)
    assert narrow["kl"] > 1e-3
    assert narrow["top1"] < 1.0
    assert narrow["visited_fraction"] < 0.2
    assert narrow["num_patched_layers"] == narrow["num_layers"] == 2
    assert narrow["config"]["window"] == 20
    assert narrow["perplexity_ratio"] == pytest.approx(math.exp(narrow["loss"] - exact["loss"]))
    for row in (exact, narrow, wide):
        assert row["prefill_seconds"] > 0
        assert row["prefill_runs"] >= 1
        assert row["command"] == "c"
        assert row["torch"] == torch.__version__
        assert {"commit", "time", "text_sha256", "tokens_sha256", "key"} <= row.keys()


def test_patching_leaves_the_model_as_it_was(subject, tmp_path):
    before = perplexity(subject.model, subject.tokens, window=LENGTH).loss
    with RowFile(tmp_path / "rows.jsonl") as rows:
        compare(subject, plan_candidates(["window:window=20"]), rows)
    assert perplexity(subject.model, subject.tokens, window=LENGTH).loss == before


def test_unpatched_layers_count_in_full(subject, tmp_path):
    plan = plan_candidates(["window:window=20,num_sinks=0"])
    with RowFile(tmp_path / "rows.jsonl") as rows:
        _, whole = compare(subject, plan, rows)
        _, half = compare(subject, plan, rows, layers="last:1")
    assert whole["visited_fraction"] == pytest.approx(sliding_share(LENGTH, 20))
    assert half["visited_fraction"] == pytest.approx((1 + sliding_share(LENGTH, 20)) / 2)
    assert half["num_patched_layers"] == 1
    assert half["kl"] != whole["kl"]


def test_layers_that_slide_by_themselves_count_their_window(tokens, tmp_path):
    model = tiny_model("gemma3", window=16, layers=4).model
    subject = Subject(model=model, tokens=tokens[:100], facts={"model": "g", "text": "t"})
    with RowFile(tmp_path / "rows.jsonl") as rows:
        (exact,) = compare(subject, plan_candidates([]), rows)
    assert exact["visited_fraction"] == pytest.approx((1 + sliding_share(100, 16)) / 2)


def test_sliding_share_counts():
    for length, window in [(5, 1), (5, 3), (7, 20), (50, 8)]:
        seen = sum(1 for p in range(length) for j in range(p + 1) if j > p - window)
        assert sliding_share(length, window) == pytest.approx(seen / (length * (length + 1) / 2))


def test_interrupted_rows_are_kept_and_not_run_again(subject, tmp_path):
    specs = ["window:window=20", "window:window=30", "window:window=40"]
    plan, path = plan_candidates(specs), tmp_path / "rows.jsonl"
    first = Recorder(interrupt_at=specs[1])
    with RowFile(path) as rows, pytest.raises(KeyboardInterrupt):
        compare(subject, plan, rows, listener=first)
    assert first.finished == [("exact", ""), (specs[0], "")]

    second = Recorder()
    with RowFile(path) as rows:
        result = compare(subject, plan, rows, listener=second)
    kept = [("exact", "kept"), (specs[0], "kept")]
    assert second.finished == [*kept, (specs[1], ""), (specs[2], "")]
    assert [row["label"] for row in result] == ["exact", *specs]

    third = Recorder()
    with RowFile(path) as rows:
        assert compare(subject, plan, rows, listener=third) == result
        assert len(rows.rows) == 4
    assert third.begun == []


def test_rows_of_other_settings_are_not_taken(subject, tokens, tmp_path):
    other = Subject(model=subject.model, tokens=tokens[1 : LENGTH + 1], facts=subject.facts)
    plan = plan_candidates(["window:window=20"])
    with RowFile(tmp_path / "rows.jsonl") as rows:
        compare(subject, plan, rows)
        compare(other, plan, rows)
        assert len(rows.rows) == 4
        compare(subject, plan_candidates(["window:window=20,num_sinks=1"]), rows)
        assert len(rows.rows) == 5


def test_refused_candidates(subject, tmp_path, monkeypatch):
    from longspan.eval import compare as module

    def refusing(model, candidate, layers):
        if candidate.label == "window:window=20":
            raise LongspanError("not on this machine")
        return patched_model(model, candidate, layers)

    monkeypatch.setattr(module, "patched_model", refusing)
    plan = plan_candidates(["window:window=20", "window:window=30"])
    with RowFile(tmp_path / "rows.jsonl") as rows:
        with pytest.raises(LongspanError, match="not on this machine"):
            compare(subject, plan, rows)
        assert rows.rows == []  # refused before anything was measured
        listener = Recorder()
        result = compare(subject, plan, rows, skip_refused=True, listener=listener)
    assert [row["label"] for row in result] == ["exact", "window:window=30"]
    assert ("window:window=20", "not on this machine") in listener.finished


def test_one_token_is_refused(tiny, tmp_path):
    subject = Subject(model=tiny.model, tokens=[5], facts={})
    with (
        RowFile(tmp_path / "rows.jsonl") as rows,
        pytest.raises(ConfigError, match=r"tokens: 1 came\. Allowed: 2 or more"),
    ):
        compare(subject, plan_candidates([]), rows)


def test_plan_drops_repeats_and_puts_exact_first():
    plan = plan_candidates(["window:window=20", " window: window=20", "exact"])
    assert [c.label for c in plan] == ["exact", "window:window=20"]
    assert plan[0].config is None


def test_every_mechanism_for_pretrained_models_is_in_the_default_set():
    specs = default_attentions(4096)
    names = {spec.partition(":")[0] for spec in specs}
    assert names == {name for name, m in MECHANISMS.items() if m.on_pretrained}
    assert "window:window=512" in specs
    assert set(COMPARE_DEFAULTS) <= set(MECHANISMS)
    for length in (2, 4096):
        for spec in default_attentions(length):
            plan_candidates([spec])


def test_a_mechanism_that_needs_training_is_refused():
    untrained = [name for name, m in MECHANISMS.items() if not m.on_pretrained]
    for name in untrained:
        with pytest.raises(ConfigError, match=r"means nothing on a pretrained model"):
            plan_candidates([name])


def test_perplexity_by_number_of_patched_layers(subject, tmp_path):
    plan = plan_candidates(["window:window=20"])
    jobs = perplexity_jobs(subject, plan, [0, 1, 2], window=100, stride=50)
    with RowFile(tmp_path / "rows.jsonl") as rows:
        none, one, both = run_jobs(jobs, rows, notes=subject.notes)
    assert [row["num_patched_layers"] for row in (none, one, both)] == [0, 1, 2]
    expected = perplexity(subject.model, subject.tokens, window=100, stride=50)
    assert none["loss"] == pytest.approx(expected.loss)
    assert len({round(row["loss"], 6) for row in (none, one, both)}) == 3
    with pytest.raises(ConfigError, match=r"patched: 3 came\. Allowed: 0 \.\. 2"):
        perplexity_jobs(subject, plan, [3], window=100, stride=50)


def test_tail_and_passkey_jobs_resume(subject, tiny, tmp_path):
    plan = plan_candidates(["window:window=20"])
    jobs = tail_jobs(subject, plan, [10, 100], tail=20)
    jobs += passkey_jobs(
        subject,
        tiny.tokenizer,
        plan,
        lengths=[420],
        depths=[0.5],
        seeds=range(2),
        haystack="landmark",
        book=None,
    )
    with RowFile(tmp_path / "rows.jsonl") as rows:
        made = run_jobs(jobs, rows)
        assert len(made) == 6
        assert {row["kind"] for row in made} == {"tail", "passkey"}
        listener = Recorder()
        assert run_jobs(jobs, rows, listener=listener) == made
    assert {note for _, note in listener.finished} == {"kept"}
    # With 10 tokens of context a window of 20 still sees nearly all: less change than with 100.
    by = {(row["mechanism"], row["context"]): row["loss"] for row in made if "context" in row}
    assert by["exact", 10] != by["exact", 100]
