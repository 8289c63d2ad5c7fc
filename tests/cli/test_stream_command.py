"""`longspan generate --stream`: bounded, and the same tokens after a real SIGKILL."""

from __future__ import annotations

import json
import time

import pytest
from safetensors import safe_open

from longspan import InfiniConfig
from longspan.models import Transformer, TransformerConfig
from longspan.train import train_tokenizer

SEGMENT = 32


@pytest.fixture(scope="module")
def trained(tmp_path_factory, book):
    """A reference transformer with Infini-attention, as `longspan train` leaves it."""
    home = tmp_path_factory.mktemp("trained")
    tokenizer = train_tokenizer([book.read_text()], home / "tokenizer.json", vocab_size=320)
    config = TransformerConfig(
        vocab_size=tokenizer.get_vocab_size(), width=32, layers=2, heads=2,
        attention=InfiniConfig(segment_length=SEGMENT),
    )  # fmt: skip
    Transformer(config).save(home)
    return home


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, folder):
    """Gates for the tiny Llama."""
    from transformers import AutoModelForCausalLM

    from longspan.hf import convert_infini, save_adapter

    home = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with convert_infini(model, SEGMENT):
        save_adapter(model, home)
    return home


def visible(text):
    """Without white space and control characters, which a terminal may change."""
    return "".join(c for c in text if c.isprintable() and not c.isspace())


def counts(folder):
    """(read, written) of the state in a folder, (0, 0) without one."""
    try:
        with safe_open(folder / "state.safetensors", framework="pt") as handle:
            numbers = json.loads(handle.metadata()["numbers"])
        return numbers["read"], numbers["written"]
    except (FileNotFoundError, OSError):
        return 0, 0


@pytest.mark.parametrize("phase", ["reading", "writing"])
@pytest.mark.parametrize("kind", ["trained", "converted"])
def test_killed_and_resumed_gives_the_same_tokens(
    longspan, spawn, trained, folder, adapter, book, tmp_path, kind, phase
):
    own = ("--model", trained) if kind == "trained" else ("--model", folder, "--adapter", adapter)
    # so much that a kill lands in the middle, whatever the machine does
    tokens = 700 if phase == "writing" else 60
    context = 400 if phase == "writing" else 2000
    chunk = 64 if phase == "writing" else 8
    common = ("generate", *own, "--text", book, "--context", context, "--tokens", tokens,
              "--chunk", chunk, "--save-every", 16, "--device", "cpu", "--seed", 5)  # fmt: skip
    child = spawn(*common, "--stream", tmp_path / "cut")
    deadline = time.monotonic() + 120
    where = 1 if phase == "writing" else 0
    while counts(tmp_path / "cut")[where] == 0 and time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()
        time.sleep(0.005)
    child.kill()
    child.wait()
    read, written = counts(tmp_path / "cut")
    assert read > 0
    if phase == "writing":
        assert 0 < written < tokens
    else:
        assert written == 0
        assert read < context
    code, _, note = longspan(*common, "--stream", tmp_path / "cut")
    assert code == 0
    assert f"{read + written:,} of them in earlier runs" in note
    code, shown, _ = longspan(*common, "--stream", tmp_path / "whole")
    assert code == 0
    for name in ("tokens.txt", "text.txt"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "cut" / name).read_bytes() == whole
    assert visible(shown) == visible((tmp_path / "whole" / "text.txt").read_text())
    lines = (tmp_path / "whole" / "tokens.txt").read_text().split()
    assert len(lines) == tokens
    assert len(set(lines)) > 20


def test_the_state_does_not_grow_with_the_text(longspan, trained, book, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text(book.read_text() * 8)
    sizes = []
    for text, context in ((book, 1024), (long, 8192)):
        folder = tmp_path / text.stem
        code, _, note = longspan("generate", "--model", trained, "--text", text, "--context",
                                 context - 1, "--tokens", SEGMENT, "--stream", folder,
                                 "--device", "cpu")  # fmt: skip
        assert code == 0, note
        assert counts(folder) == (context, SEGMENT)
        sizes.append((folder / "state.safetensors").stat().st_size)
    assert abs(sizes[0] - sizes[1]) <= 64  # digits of the counts


def test_prompts_and_the_whole_of_a_text(longspan, trained, tmp_path):
    ask = ("generate", "--model", trained, "--stream", tmp_path / "a", "--device", "cpu",
           "--prompt", "Sentence 3 of", "--temperature", 0)  # fmt: skip
    code, first, _ = longspan(*ask, "--tokens", 10)
    assert code == 0
    code, second, note = longspan(*ask, "--tokens", 20)
    assert code == 0
    assert "20 written" in note
    text = (tmp_path / "a" / "text.txt").read_text()
    assert visible(first) + visible(second) == visible(text) != ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--adapter"),
        (("--adapter", "x", "--attention", "infini"), "--adapter"),
        (("--attention", "exact"), "keeps the keys"),
        (("--early-stop", 0.1, "--attention", "window"), "--early-stop"),
    ],
    ids=str,
)
def test_refusals_for_pretrained_models(longspan, folder, tmp_path, options, message):
    code, _, error = longspan("generate", "--model", folder, "--prompt", "A", "--stream",
                              tmp_path / "s", "--device", "cpu", *options)  # fmt: skip
    assert code == 2
    assert message in error


def test_refusals_for_trained_models(longspan, trained, tmp_path):
    ask = ("generate", "--model", trained, "--prompt", "A", "--device", "cpu")
    for options, message in (
        (("--stream", tmp_path / "s", "--attention", "infini"), "part of its config"),
        (("--attention", "infini"), "without --stream"),
        (("--stream", tmp_path / "t", "--save-every", 0), "save_every is 0"),
    ):
        code, _, error = longspan(*ask, *options)
        assert code == 2
        assert message in error.replace("\n", " ")
    assert longspan(*ask, "--stream", tmp_path / "u", "--tokens", 3, "--seed", 1)[0] == 0
    code, _, error = longspan(*ask, "--stream", tmp_path / "u", "--tokens", 3, "--seed", 2)
    assert code == 2
    assert "seed is 1, not 2" in error.replace("\n", " ")
