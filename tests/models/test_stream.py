"""Streams: a text in pieces, a state of one size, the same tokens after a restart."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from longspan import ExactConfig, InfiniConfig, WindowConfig
from longspan.errors import ConfigError
from longspan.models import (
    TextSource,
    TextStream,
    Transformer,
    TransformerConfig,
    TransformerStream,
)

WORDS = "".join(f"Sentence {i} of a tale with {i * i % 97} ends.\n" for i in range(60))
ATTENTIONS = {
    "infini": InfiniConfig(segment_length=16),
    "delta": InfiniConfig(segment_length=16, update="delta", local="sliding"),
    "gated": InfiniConfig(segment_length=16, update="gated_delta"),
    "window": WindowConfig(window=12, num_sinks=2),
    "mixed": (InfiniConfig(segment_length=16), WindowConfig(window=12)),
}


def net(attention=ATTENTIONS["infini"], seed=0, **settings):
    config = TransformerConfig(
        vocab_size=256, width=32, layers=2, heads=2, attention=attention, **settings
    )
    model = Transformer(config, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model.eval()


def make(folder, *, text=WORDS, model=None, **settings):
    settings = {"chunk_size": 50, "save_every": 64, "temperature": 1.0, "start": [0], **settings}
    return TextStream(
        TransformerStream(net() if model is None else model), lambda t: list(t.encode()),
        lambda ids: bytes(ids).decode(errors="replace"), TextSource(text.encode(), piece=100),
        folder, **settings,
    )  # fmt: skip


def written(folder):
    ids = [int(line) for line in (folder / "tokens.txt").read_text().split()]
    return ids, (folder / "text.txt").read_bytes()


class Killed(Exception):
    """Stands for a kill: nothing behind it runs, and nothing is saved."""


def killed_after(stream, reads):
    """Let the model's n-th call end the run."""
    inner, count = stream._model.read, [0]

    def read(ids):
        count[0] += 1
        if count[0] > reads:
            raise Killed
        return inner(ids)

    stream._model.read = read
    return stream


@pytest.mark.parametrize("kind", list(ATTENTIONS))
def test_a_run_cut_anywhere_gives_the_same_tokens(tmp_path, kind):
    model = net(ATTENTIONS[kind])
    short = {"model": model, "text": WORDS[:700], "save_every": 32}
    report = make(tmp_path / "whole", **short).run(40)
    assert (report.read, report.written, report.resumed) == (701, 40, 0)
    ids, text = written(tmp_path / "whole")
    assert len(set(ids)) > 10  # random weights, drawn tokens
    num_reads = -(-report.read // 50)
    for reads in (1, num_reads - 3, num_reads + 1, num_reads + 36):
        folder = tmp_path / f"{reads}"
        with pytest.raises(Killed):
            killed_after(make(folder, **short), reads).run(40)
        report = make(folder, **short).run(40)
        assert report.resumed > 0
        assert written(folder) == (ids, text), reads


def test_killed_twice_and_then_longer(tmp_path):
    make(tmp_path / "whole").run(120)
    folder = tmp_path / "cut"
    for reads in (40, 30):
        with pytest.raises(Killed):
            killed_after(make(folder), reads).run(60)
    assert make(folder).run(60).written == 60
    assert make(folder).run(60).resumed == len(WORDS) + 61  # nothing left to do
    make(folder).run(120)
    assert written(folder) == written(tmp_path / "whole")


def test_what_a_killed_run_wrote_behind_its_last_save_is_cut_off(tmp_path):
    make(tmp_path / "whole").run(20)
    folder = tmp_path / "cut"
    make(folder).run(10)
    with pytest.raises(Killed):
        killed_after(make(folder), 45).run(60)
    assert len(written(folder)[0]) > 20  # none of it was saved
    make(folder).run(20)
    assert written(folder) == written(tmp_path / "whole")


def test_reading_in_a_stream_is_reading_at_once(tmp_path):
    """Greedy tokens against the model run over everything, which knows no stream."""
    model = net()
    make(tmp_path, model=model, temperature=0.0).run(12)
    ids = torch.tensor([[0, *WORDS.encode()]])
    with torch.no_grad():
        for token in written(tmp_path)[0]:
            assert int(model(ids)[0, -1].argmax()) == token
            ids = torch.cat((ids, torch.tensor([[token]])), 1)


def test_the_state_does_not_grow(tmp_path):
    sizes, shapes = [], []
    for times in (1, 8):
        folder = tmp_path / str(times)
        make(folder, text=WORDS * times, context=1600 * times - 1).run(16)
        sizes.append((folder / "state.safetensors").stat().st_size)
        with safe_open(folder / "state.safetensors", framework="pt") as handle:
            shapes.append({n: tuple(handle.get_tensor(n).shape) for n in handle.keys()})  # noqa: SIM118
    assert abs(sizes[1] - sizes[0]) <= 64  # digits of the counts
    assert shapes[0] == shapes[1]
    assert sizes[0] < 120_000


def test_text_is_written_at_the_ends_of_characters(tmp_path):
    stream = make(tmp_path, text="Ein Käse", start=[])
    pieces = []
    shown = list("ä€😀x".encode())
    for token in shown:
        stream._files = (open(tmp_path / "a", "wb"), open(tmp_path / "b", "wb"))  # noqa: SIM115
        stream._show(token, pieces.append)
    assert pieces == ["ä", "€", "😀", "x"]


def test_other_settings_and_files_are_refused(tmp_path):
    make(tmp_path).run(5)
    for changes, message in (
        ({"text": WORDS + "."}, "source"),
        ({"model": net(seed=1)}, "model"),
        ({"model": net(InfiniConfig(segment_length=8))}, "model"),
        ({"temperature": 0.5}, "temperature is 1.0, not 0.5"),
        ({"seed": 3}, "seed is 0, not 3"),
        ({"chunk_size": 51}, "chunk_size is 50, not 51"),
        ({"context": 9}, "context"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(tmp_path, **changes)
    path = tmp_path / "tokens.txt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"tokens\.txt has \d+ bytes, but the state"):
        make(tmp_path).run(9)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-5])
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        make(tmp_path)
    with pytest.raises(ConfigError, match="save_every is 0"):
        make(tmp_path / "new", save_every=0)
    with pytest.raises(ConfigError, match="no tokens"):
        make(tmp_path / "new", text="", start=[]).run(1)


def test_states_that_grow_are_refused():
    for attention in (ExactConfig(), (InfiniConfig(), ExactConfig())):
        with pytest.raises(ConfigError, match="exact attention, whose state grows"):
            TransformerStream(net(attention))


def test_context_reads_so_many_tokens(tmp_path):
    report = make(tmp_path, context=77).run(1)
    assert report.read == 78  # and the token that begins
    assert make(tmp_path / "all").run(0).read == len(WORDS) + 1
    assert make(tmp_path / "short", chunk_size=1, context=3).run(0).read == 4


@pytest.mark.parametrize("piece", [5, 7, 64, 1000])
def test_pieces_join_to_the_text(tmp_path, piece):
    text = "\ufeffA naïve café\r\nof 😀 longcatislooooong   and\r\n\r\nmore.\n"
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    want = text.removeprefix("\ufeff").replace("\r\n", "\n")
    for source in (TextSource(path, piece=piece), TextSource(text.encode(), piece=piece)):
        parts, start = [], 0
        while (found := source.piece(start)) is not None:
            assert source.piece(start) == found
            parts.append(found[0])
            assert found[1] > start
            start = found[1]
        assert "".join(parts) == want
        assert start == len(text.encode())
    assert TextSource(path).fingerprint() == TextSource(text.encode(), piece=9).fingerprint()


def test_what_is_no_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no file"):
        TextSource(tmp_path / "none")
    with pytest.raises(ConfigError, match="byte 3 .* is not UTF-8"):
        TextSource(b"abc\xff").piece(0)
