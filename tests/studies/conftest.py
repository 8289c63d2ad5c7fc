"""A corpus of small books and sizes at which the whole study takes seconds."""

import dataclasses

import pytest

from longspan.studies.stick_breaking_length.sizes import SMALL

WORDS = (
    *("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "hill"),
    *("and", "then", "she", "he", "saw", "found", "lost", "home", "again", "ever"),
)


def book(seed, num_words):
    """Prose-like: a small vocabulary, an order that can be learned."""
    state, words = seed, []
    for i in range(num_words):
        state = (state * 1_103_515_245 + 12_345) % 2**31
        words.append(WORDS[(state >> 16) % 5 + (i % 4) * 4])
    return " ".join(words) + "."


@pytest.fixture(scope="session")
def books(tmp_path_factory):
    """Folders of training and held-out texts."""
    home = tmp_path_factory.mktemp("books")
    for name, count, seed in (("train", 6, 1), ("heldout", 3, 100)):
        (home / name).mkdir()
        for i in range(count):
            (home / name / f"{name}-{i}.txt").write_text(book(seed + i, 1500))
    return home


@pytest.fixture(scope="session")
def prepared(books, tmp_path_factory):
    from longspan.studies.stick_breaking_length.data import prepare_data

    folder = tmp_path_factory.mktemp("data") / "packed"
    prepare_data(books / "train", books / "heldout", folder, vocab_size=300, pack=True)
    return folder


@pytest.fixture(scope="session")
def tiny_sizes():
    return dataclasses.replace(
        SMALL,
        model={"width": 16, "layers": 2, "heads": 2},
        sibling={"width": 16, "layers": 1, "heads": 2},
        length=32,
        batch_size=2,
        lengths=(32, 64),
        recall_model={"width": 16, "layers": 2, "heads": 1},
        recall_pairs=(2, 4),
        recall_tests=(4,),
        recall_batch=4,
        recall_steps=20,
        recall_sequences=4,
        speed_lengths=(32, 64),
        span_length=64,
    )
