"""The study of pretrained models on a tiny random Llama: rows, resuming, tasks, the report."""

import math

import pytest
import torch

pytest.importorskip("transformers")

from longspan.errors import ConfigError
from longspan.eval.data import Text
from longspan.eval.rows import read_rows
from longspan.models.loader import LoadedModel
from longspan.studies.hyper_pretrained.measure import document_rows, token_losses
from longspan.studies.hyper_pretrained.page import build_report, true_perplexity
from longspan.studies.hyper_pretrained.run import run_pretrained
from longspan.studies.hyper_pretrained.settings import SETTINGS, SHOWN, setting_text
from longspan.studies.hyper_pretrained.tasks import TASKS, make_task, score_tasks
from longspan.studies.report import render_html, render_markdown

PROSE = "It was a plain tale of a road, and of a man who went along it without any haste. "


@pytest.fixture(scope="module")
def loaded():
    from longspan.testing.models import tiny_model

    model, tokenizer = tiny_model("llama")
    return LoadedModel(model, tokenizer, "tiny", "folder", None, "0" * 64, 4096)


@pytest.fixture(scope="module")
def texts():
    return [Text(name, name + PROSE * 400, name) for name in ("a", "b")]


def run(loaded, texts, folder, **settings):
    return run_pretrained(
        loaded, texts, folder, **{
            "tokens": [1200], "documents": 2, "prompts": 2, "batch": 2,
            "settings": ["exact", "default", "window:window=256"], **settings,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(loaded, texts, tmp_path_factory):
    """Cut into calls: a clock that is up after the first rows."""
    folder = tmp_path_factory.mktemp("hyper")
    first = run(loaded, texts, folder, stop_after=0.0)
    assert not first.is_finished
    assert not first.rows
    first = run(loaded, texts, folder, parts=["perplexity"])
    assert first.is_finished
    outcome = run(loaded, texts, folder)
    assert outcome.rows[: len(first.rows)] == first.rows
    return folder, outcome.rows


def test_every_row_is_there_once(finished):
    folder, rows = finished
    assert len({row["key"] for row in rows}) == len(rows)
    count = {kind: sum(row["kind"] == kind for row in rows) for kind in ("perplexity", "task")}
    assert count == {"perplexity": 3, "task": 3 * len(TASKS)}
    layers = [(r["setting"], r["layers"]) for r in rows if r["kind"] == "layers"]
    assert layers == [("exact", 0), ("default", 0), ("default", 2), ("window:window=256", 0),
                      ("window:window=256", 2)]  # fmt: skip
    assert [row["layer"] for row in rows if row["kind"] == "mass"] == [0, 1]
    assert read_rows(folder / "rows.jsonl") == rows


def test_rows_say_what_the_model_does(finished, loaded, texts):
    _, rows = finished
    found = {(r["kind"], r["setting"], r.get("layers")): r for r in rows if "setting" in r}
    exact = found["perplexity", "exact", None]
    ids = document_rows(loaded.tokenizer, [t.text for t in texts], 1200)
    with torch.no_grad():
        logits = loaded.model(ids).logits[:, :-1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert exact["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert exact["visited"] == 1.0
    for name in ("default", "window:window=256"):
        assert found["layers", name, 0]["loss"] == pytest.approx(exact["loss"], rel=1e-6)
        whole = found["perplexity", name, None]
        assert found["layers", name, 2]["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert whole["loss"] != exact["loss"]
        assert 0 < whole["visited"] < 1


def test_losses_do_not_depend_on_the_batch(loaded, texts):
    ids = document_rows(loaded.tokenizer, [t.text for t in texts], 700)
    torch.testing.assert_close(
        token_losses(loaded.model, ids, batch=1), token_losses(loaded.model, ids, batch=2)
    )
    with pytest.raises(ConfigError, match="longer texts"):
        document_rows(loaded.tokenizer, ["short"], 700)


@pytest.mark.parametrize("task", TASKS)
def test_prompts(loaded, texts, task):
    tokenizer, book = loaded.tokenizer, texts[0].text
    prompt = make_task(task, tokenizer, length=2400, seed=3, book=book)
    count = len(tokenizer(prompt.text)["input_ids"])
    assert 2400 - 400 < count <= 2400
    assert prompt == make_task(task, tokenizer, length=2400, seed=3, book=book)
    assert prompt != make_task(task, tokenizer, length=2400, seed=4, book=book)
    if prompt.answer:
        assert prompt.text.count(f"{prompt.answer.strip()}.") == 1
        assert prompt.text.count("magic numbers for") == (8 if "8" in task else 1)
    elif task == "variables":
        assert not set(prompt.right) & set(prompt.wrong)
        goal = prompt.text.rpartition("assigned the value ")[2].split()[0]
        assert f"VAR {prompt.right[0]} = {goal}." in prompt.text
        for a, b in zip(prompt.right, prompt.right[1:], strict=False):
            assert f"VAR {b} = VAR {a}." in prompt.text
            assert prompt.text.index(f"VAR {a} =") < prompt.text.index(f"VAR {b} =")
    else:
        listed = prompt.text.split()
        often = min(listed.count(word) for word in prompt.right)
        assert often > 2 * max(listed.count(word) for word in prompt.wrong)
    with pytest.raises(ConfigError, match="too short for the task|too few"):
        make_task(task, tokenizer, length=20, seed=0, book=book)


class Knows(torch.nn.Module):
    """Puts all its belief on given tokens, whatever it reads; says what it was asked."""

    device = torch.device("cpu")

    def __init__(self, beliefs):
        super().__init__()
        self.beliefs = beliefs
        self.model = self
        self.lm_head = torch.nn.Identity()

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, 259)
        for row, belief in enumerate(self.beliefs):
            for offset, tokens in enumerate(belief):
                length = int((input_ids[row] != 0).sum())
                at = length - len(belief) - 1 + offset if len(belief) > 1 else length - 1
                for token in tokens:
                    logits[row, at, token] += 5.0
        return type("Output", (), {"last_hidden_state": logits})


def test_scores(loaded, texts):
    tokenizer, book = loaded.tokenizer, texts[0].text
    needle = make_task("needle", tokenizer, length=600, seed=0, book=book)
    right = [[token] for token in needle.answer.encode()]
    wrong = [*right[:-1], [ord("x")]]
    assert score_tasks(Knows([right, wrong]), tokenizer, [needle, needle]) == [1.0, 0.0]
    variables = make_task("variables", tokenizer, length=1600, seed=0, book=book)
    first = [word.encode()[0] for word in variables.right]
    other = [word.encode()[0] for word in variables.wrong[:2]]
    beliefs = [[first], [first[:2] + other]]
    assert score_tasks(Knows(beliefs), tokenizer, [variables, variables]) == [1.0, 0.5]


def test_report(finished):
    _, rows = finished
    report = build_report(rows)
    text, page = render_markdown(report), render_html(report)
    exact = next(r for r in rows if r["kind"] == "perplexity" and r["setting"] == "exact")
    assert f"{math.exp(exact['loss']):.2f}" in text
    assert "| needle |" in text.replace("setting | needle", "| needle")
    assert "5.6 to 6.3 | 12.0 to 14.2" in text
    assert "<script" not in page
    assert report.verdicts[0].outcome == "not measured"
    with pytest.raises(ConfigError, match="none of this study"):
        build_report([])


@pytest.mark.parametrize(
    ("curve", "outcome"),
    [((0.0, 0.05, 0.1), "reproduced"), ((0.0, 0.9, 1.0), "not reproduced")],
)
def test_verdict_on_the_paper(curve, outcome):
    rows = [
        {"study": "hyper-pretrained", "kind": "layers", "key": str(n), "setting": "paper, LSH",
         "layers": n, "loss": 3.0 + rise, "visited": 0.3, "model": "m", "tokens": 8192}
        for n, rise in zip((0, 10, 20), curve, strict=True)
    ]  # fmt: skip
    assert build_report(rows).verdicts[0].outcome == outcome


def test_names():
    assert set(SHOWN) <= set(SETTINGS)
    assert setting_text("window:window=8") == "window:window=8"
    assert true_perplexity(5.634) == pytest.approx(2 ** (math.log2(5.634) / math.log(2)), rel=1e-12)


def test_unknown_part(loaded, texts, tmp_path):
    with pytest.raises(ConfigError, match="parts"):
        run(loaded, texts, tmp_path, parts=["perplexitty"])


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
def test_captured_keys_are_of_full_layers_before_and_after_rotation(arch):
    """Rotation keeps the length of each pair, and does nothing at position 0."""
    from longspan.eval.layers import count_full_layers
    from longspan.studies.hyper_pretrained.measure import _capture
    from longspan.testing.models import tiny_model

    model, _ = tiny_model(arch, layers=4)
    ids = torch.randint(0, 200, (1, 90), generator=torch.Generator().manual_seed(0))
    calls = _capture(model, ids)
    assert len(calls) == count_full_layers(model) == (2 if arch == "gemma3" else 4)
    for query, key, value, plain in calls:
        assert query.shape[1] == 2 * key.shape[1]
        assert key.shape == plain.shape == value.shape
        half = key.shape[-1] // 2
        lengths = [t[..., :half].square() + t[..., half:].square() for t in (key, plain)]
        torch.testing.assert_close(*lengths, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(key[:, :, 0], plain[:, :, 0])
        assert not torch.allclose(key, plain, atol=0.1)


def test_a_model_with_sliding_layers(texts, tmp_path):
    """Gemma 3: its own windows stay, rows are of the other layers."""
    from longspan.testing.models import tiny_model

    model, tokenizer = tiny_model("gemma3", layers=4)
    gemma = LoadedModel(model, tokenizer, "tiny", "folder", None, "1" * 64, 4096)
    outcome = run(gemma, texts, tmp_path, parts=["layers", "mass"], settings=["default"])
    assert outcome.is_finished
    assert [r["layers"] for r in outcome.rows if r["kind"] == "layers"] == [0, 2]
    assert [r["layer"] for r in outcome.rows if r["kind"] == "mass"] == [0, 1]


def test_models_are_not_mixed_in_a_report(finished):
    """Rows of a second model, with other losses, change nothing that is said of the first."""
    _, rows = finished
    alone = build_report(rows)
    other = [
        {**row, "model": "other", "key": f"{row['key']}-other", "loss": row.get("loss", 0.0) + 1.0}
        for row in rows
    ]
    both = build_report([*rows, *other])
    headings = [section.heading for section in both.sections]
    for section in alone.sections[:-1]:
        assert f"other: {section.heading}" in headings
        twin = both.sections[headings.index(f"tiny: {section.heading}")]
        assert twin.table == section.table
    assert [v.claim for v in both.verdicts[3:]] == [f"{v.claim}: other" for v in alone.verdicts]
    assert "--model other" in both.command
