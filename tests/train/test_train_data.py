"""Tokenizer, token files and batches: lossless, whole, and the same at any step."""

import numpy as np
import pytest
import torch

from longspan.errors import ConfigError
from longspan.eval.data import Text
from longspan.train import Batches, TokenFile, load_tokenizer, train_tokenizer, write_tokens

TEXTS = [
    Text("one", "The cat sat on the mat. " * 40 + "Ünïcödé \N{SNOWMAN} and\n\ttabs.", "a"),
    Text("two", "A dog ate the cat's hat. " * 60, "b"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tok") / "tokenizer.json"
    train_tokenizer((t.text for t in TEXTS), path, vocab_size=300)
    return load_tokenizer(path)


def test_tokenizer_is_lossless(tokenizer):
    strange = "\x00 zebra \N{GRINNING FACE}  \r\n"
    for text in [*(t.text for t in TEXTS), strange]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert len(tokenizer.encode(TEXTS[0].text).ids) < 0.5 * len(TEXTS[0].text)


def test_token_file_keeps_documents(tokenizer, tmp_path):
    made = write_tokens(TEXTS, tokenizer, tmp_path / "corpus.npy")
    again = TokenFile.open(tmp_path / "corpus.npy")
    assert again.names == ("one", "two")
    assert again.ids.dtype == np.uint16
    assert isinstance(again.ids, np.memmap)
    for index, text in enumerate(TEXTS):
        ids = again.document(index)
        assert ids[0] == 0
        assert tokenizer.decode([int(i) for i in ids[1:]]) == text.text
        assert again.num_bytes[index] == len(text.text.encode())
    assert made.sha256 == again.sha256


def test_packed_for_travelling(tokenizer, tmp_path):
    made = write_tokens(TEXTS, tokenizer, tmp_path / "corpus.npy")
    packed = made.pack(tmp_path / "bag" / "corpus.npy")
    assert packed.name == "corpus.npy.xz"
    assert not (tmp_path / "bag" / "corpus.npy").exists()
    there = TokenFile.open(tmp_path / "bag" / "corpus.npy")
    assert np.array_equal(there.ids, made.ids)
    assert there.starts == made.starts
    (tmp_path / "bag" / "corpus.npy").unlink()
    packed.write_bytes(packed.read_bytes()[:-40])
    with pytest.raises(ConfigError, match=r"corpus\.npy cannot be read"):
        TokenFile.open(tmp_path / "bag" / "corpus.npy")


def test_cut_off_file(tokenizer, tmp_path):
    write_tokens(TEXTS, tokenizer, tmp_path / "corpus.npy")
    path = tmp_path / "corpus.npy"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConfigError, match="cannot be read"):
        TokenFile.open(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        TokenFile.open(tmp_path / "nothing.npy")


def test_vocabulary_limits(tmp_path):
    with pytest.raises(ConfigError, match="65,536"):
        train_tokenizer(["x"], tmp_path / "t.json", vocab_size=100_000)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path / "bad.json")


def test_batches_depend_on_seed_and_step_alone(corpus):
    first = Batches(corpus, length=50, batch_size=3, seed=1)
    wanted = [first.batch(step) for step in range(200)]
    second = Batches(corpus, length=50, batch_size=3, seed=1)
    for step in (150, 3, 199, 0):
        assert torch.equal(second.batch(step).inputs, wanted[step].inputs)
    other = Batches(corpus, length=50, batch_size=3, seed=2)
    assert not torch.equal(other.batch(0).inputs, wanted[0].inputs)


def test_targets_are_the_next_tokens(corpus):
    batch = Batches(corpus, length=50, batch_size=3).batch(0)
    assert batch.inputs.shape == batch.targets.shape == (3, 50)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    text = corpus.ids.astype(np.int64)
    for row in torch.cat((batch.inputs, batch.targets[:, -1:]), 1).numpy():
        windows = np.lib.stride_tricks.sliding_window_view(text, 51)
        assert (windows == row).all(1).any()


def test_an_epoch_reads_each_window_once(corpus):
    batches = Batches(corpus, length=50, batch_size=1)
    ends = [tuple(batches.batch(i).inputs[0].tolist()) for i in range(batches.num_windows)]
    assert len(set(ends)) > 0.9 * len(ends)  # the drawn text hardly ever repeats 50 tokens
    starts = [int(batches._draw(0)[i]) for i in range(batches.num_windows)]
    assert len(set(starts)) == batches.num_windows
    assert all((a - starts[0]) % 50 == 0 for a in starts)
    assert max(starts) + 51 <= len(corpus.ids)
    assert list(batches._draw(1)) != starts


def test_too_little_text(corpus):
    with pytest.raises(ConfigError, match="two windows must fit"):
        Batches(corpus, length=len(corpus.ids) - 3, batch_size=1)
