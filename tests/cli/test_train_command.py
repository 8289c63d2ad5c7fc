"""`longspan train`, `study` and `generate`: repeatable, and refusing what they must."""

import json

import pytest

TEXT = "The cat sat on the mat and the dog ran under the hill. She saw it and went home again. "
SIZES = (
    *("--steps", 8, "--length", 16, "--batch", 2, "--width", 16, "--layers", 1, "--heads", 2),
    *("--vocabulary", 300, "--log-every", 2, "--checkpoint-every", 2, "--device", "cpu"),
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    home = tmp_path_factory.mktemp("texts")
    for name, count in (("train", 3), ("heldout", 2)):
        (home / name).mkdir()
        for i in range(count):
            (home / name / f"{name}{i}.txt").write_text(f"{name} {i}. " + (i + 2) * 40 * TEXT)
    return home


def test_train_then_generate(longspan, texts, tmp_path):
    out = tmp_path / "run"
    command = ("train", "--text", texts / "train", "--out", out, *SIZES)
    code, shown, _ = longspan(*command, "--stop-after", 0)
    assert code == 0
    assert "To go on" in shown
    assert not (out / "model").exists()
    code, shown, _ = longspan(*command)
    assert code == 0
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert f"{rows[-1]['loss']:.4f}" in shown
    assert '"stick_breaking"' in (out / "model" / "config.json").read_text()

    ask = ("generate", "--model", out / "model", "--tokens", 12, "--prompt", "The cat")
    code, first, _ = longspan(*ask, "--seed", 3)
    assert code == 0
    assert first.startswith("The cat")
    assert longspan(*ask, "--seed", 3)[1] == first
    assert longspan(*ask, "--seed", 4)[1] != first
    code, stopped, _ = longspan(*ask, "--seed", 3, "--early-stop", 1e-6)
    assert code == 0
    assert stopped == first
    compare = ("compare", "--model", out / "model", "--text", texts / "heldout", "--length", 100)
    code, shown, note = longspan(*compare, "--out", tmp_path / "compared")
    assert code == 0
    assert "stick_breaking:early_stop" in shown
    assert "this model's own attention" in note
    compared = [json.loads(x) for x in (tmp_path / "compared" / "rows.jsonl").open()]
    assert {row["mechanism"] for row in compared} == {"exact", "stick_breaking"}
    code, _, error = longspan(*ask, "--text", texts / "train")
    assert code == 2
    assert "--prompt" in error


def test_train_goes_on_under_another_attention(longspan, texts, tmp_path):
    """Sizes, tokenizer and weights are those of the first model; gates are new."""
    from longspan.models import Transformer

    first, second = tmp_path / "first", tmp_path / "second"
    small = ("--text", texts / "train", "--length", 16, "--batch", 2, "--log-every", 1,
             "--checkpoint-every", 1, "--device", "cpu")  # fmt: skip
    sizes = ("--width", 16, "--layers", 1, "--heads", 2, "--vocabulary", 300)
    code, _, _ = longspan("train", "--attention", "exact", "--out", first, "--steps", 2, *sizes,
                          *small)  # fmt: skip
    assert code == 0
    code, _, _ = longspan(
        "train", "--start", first / "model", "--attention", "infini:segment_length=4",
        "--learning-rate", 1e-9, "--out", second, "--steps", 1, *small,
    )  # fmt: skip
    assert code == 0
    before, after = (Transformer.load(home / "model") for home in (first, second))
    assert after.config.attention.segment_length == 4
    assert after.config.width == 16
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    for name, tensor in before.state_dict().items():
        assert (after.state_dict()[name] - tensor).abs().max() < 1e-6
    assert len(after.blocks[0].attention.longspan_gate) == 2
    check_shipping(second, texts, tmp_path)
    code, _, error = longspan("train", "--start", "longspan-rop", "--out", tmp_path / "x", *small)
    assert code == 2
    assert "longspan-rope" in error


def check_shipping(run, texts, tmp_path):
    """The card's numbers are those of the model that is kept."""
    import importlib.util
    import math
    from pathlib import Path

    import torch

    from longspan.eval.data import iter_texts
    from longspan.eval.extrapolation import book_windows, window_losses
    from longspan.models import Transformer
    from longspan.train import load_tokenizer, write_tokens

    path = Path(__file__).resolve().parents[2] / "tools" / "ship_run.py"
    spec = importlib.util.spec_from_file_location("ship_run", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    home = tmp_path / "shipped"
    home.mkdir()
    kept = load_tokenizer(run / "tokenizer.json")
    (home / "tokenizer.json").write_bytes((run / "tokenizer.json").read_bytes())
    heldout = write_tokens(iter_texts(texts / "heldout"), kept, tmp_path / "heldout.npy")
    settings = {"start": "longspan-rope", "windows": 1, "lengths": (8, 32), "shipped": home}
    folder = tool.ship(run, "infini", heldout, **settings)
    assert sorted(path.name for path in home.iterdir()) == ["infini", "tokenizer.json"]
    model = Transformer.load(folder)
    assert model.embedding.weight.dtype is torch.bfloat16
    windows, _ = book_windows(heldout, length=32, per_book=1)
    loss = window_losses(model.float(), windows, length=32).double().mean().item()
    text = (folder / "README.md").read_text()
    assert f"| 32 | {loss:.4f} | {math.exp(loss):.2f} |" in text
    assert "--start longspan-rope --attention infini:segment_length=4 --length 16" in text
    (home / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit, match="another tokenizer"):
        tool.ship(run, "infini", heldout, **settings)


def test_train_keeps_to_its_texts(longspan, texts, tmp_path):
    command = ("train", "--out", tmp_path, *SIZES, "--positions", "forget", "--attention", "exact")
    assert longspan(*command, "--text", texts / "train")[0] == 0
    code, _, error = longspan(*command, "--text", texts / "heldout")
    assert code == 2
    assert "other texts" in error
    code, _, error = longspan(*command, "--text", texts / "train", "--seed", 1)
    assert code == 2
    assert "other settings" in error


def test_generate_needs_a_model(longspan, tmp_path):
    code, _, error = longspan("generate", "--model", tmp_path)
    assert code == 2
    assert "model.safetensors" in error


def test_study(longspan, texts, tmp_path, monkeypatch):
    """The command line around a study whose sizes are tiny."""
    import dataclasses

    from longspan.studies.stick_breaking_length import sizes

    small = {"width": 16, "layers": 1, "heads": 2}
    tiny = dataclasses.replace(
        sizes.SMALL,
        model=small, sibling=small, recall_model=small, length=16, batch_size=2, lengths=(16, 32),
        recall_pairs=(2,), recall_tests=(2, 4), recall_batch=2, recall_sequences=2,
        speed_lengths=(16,), span_length=32,
    )  # fmt: skip
    monkeypatch.setattr(sizes, "SMALL", tiny)
    out = tmp_path / "study"
    command = ("study", "--train", texts / "train", "--heldout", texts / "heldout", "--out", out,
               "--budget", 0.02, "--small", "--device", "cpu")  # fmt: skip
    code, shown, _ = longspan(*command)
    assert code == 0, shown
    page = (out / "report.html").read_text()
    assert "stick-breaking" in page
    rows = (out / "rows.jsonl").read_text()
    (out / "report.html").unlink()
    code, _, _ = longspan("study", "--out", out, "--report")
    assert code == 0
    assert (out / "report.html").read_text() == page
    assert (out / "rows.jsonl").read_text() == rows


def test_study_of_a_pretrained_model(longspan, folder, book, tmp_path):
    """Only its first table; the report says what is missing."""
    command = ("study", "hyper-pretrained", "--model", folder, "--heldout", book, "--tokens", 700,
               "--only", "perplexity", "--out", tmp_path / "run")  # fmt: skip
    code, out, err = longspan(*command)
    assert code == 0, err
    assert "default at 700: loss" in out
    page = (tmp_path / "run" / "report.md").read_text()
    assert "| window 1024 + 4 sinks |" in page
    rows = (tmp_path / "run" / "rows.jsonl").read_text()
    code, out, _ = longspan(*command)
    assert code == 0
    assert "loss 5" not in out
    assert (tmp_path / "run" / "rows.jsonl").read_text() == rows
    code, _, err = longspan(*command[:-3], "perplexitty", "--out", tmp_path / "run")
    assert code == 2
    assert "perplexity" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("study",), "--heldout"),
        (("study", "stick-breaking-lenght"), "stick-breaking-length"),
        (("study", "--report", "--out", "nowhere"), "nowhere"),
    ],
)
def test_refusals(longspan, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, error = longspan(*arguments)
    assert code == 2
    assert message in error
