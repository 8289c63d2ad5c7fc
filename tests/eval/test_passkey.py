import re

import pytest
import torch

from longspan.errors import ConfigError
from longspan.eval.passkey import (
    FILLER,
    QUESTION,
    TASK,
    first_number,
    make_prompt,
    run_cell,
    run_trial,
)
from longspan.eval.scoring import SplitModel

BOOK = " ".join(f"Sentence number {chr(97 + i % 26)} of a long tale, {i % 7}." for i in range(400))


def prompt(**settings):
    return make_prompt(len, **{"length": 1500, "depth": 0.5, "seed": 0, **settings})


def test_the_landmark_format():
    text = prompt().text
    task, before, needle, after, question = text.split("\n")
    assert (task, question) == (TASK, QUESTION)
    key = prompt().pass_key
    assert needle == f"The pass key is {key}. Remember it. {key} is the pass key."
    endless = " ".join([FILLER] * 50)
    assert endless.startswith(before)
    assert endless.startswith(after)  # both stretches begin with the first sentence
    assert 1 <= key <= 50_000


@pytest.mark.parametrize("haystack", ["landmark", "book"])
@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_longest_prompt_that_fits_with_the_needle_at_its_depth(haystack, depth):
    made = prompt(haystack=haystack, depth=depth, book=BOOK)
    assert made.num_tokens == len(made.text) == 1500  # one token per character: it fits exactly
    _, before, _, after, _ = re.split("\n", made.text)
    assert len(before) == pytest.approx(depth * (len(before) + len(after)), abs=1)


def test_a_book_goes_on_where_it_stopped():
    _, before, _, after, _ = prompt(haystack="book", book=BOOK, seed=3).text.split("\n")
    assert before + after in BOOK
    other = prompt(haystack="book", book=BOOK, seed=4).text.split("\n")[1]
    assert other[:40] != before[:40]


def test_keys_depend_on_the_seed_only():
    keys = {
        prompt(seed=s, length=n, depth=d).pass_key for s in (1,) for n in (600, 900) for d in (0, 1)
    }
    assert len(keys) == 1
    assert len({prompt(seed=s).pass_key for s in range(20)}) > 15


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"haystack": "bok"}, r"haystack: 'bok' came\. Did you mean 'book'"),
        ({"depth": 1.5}, r"depth: 1\.5 came\. Allowed: 0"),
        ({"length": 100}, r"length: 100 came\. Allowed: \d+ or more"),
        ({"haystack": "book", "book": "short"}, r"book: 5 characters came, too few for 1500"),
        ({"haystack": "book"}, r"book: nothing came"),
    ],
)
def test_bad_prompts(settings, text):
    with pytest.raises(ConfigError, match=text):
        prompt(**settings)


def test_first_number():
    assert first_number(" 123. It is 45") == 123
    assert first_number("none") is None


class _Oracle(torch.nn.Module):
    """A 'model' that always continues with the key, or with zeros."""

    def __init__(self, knows):
        super().__init__()
        self.knows = knows

    def generate(self, ids, **settings):
        text = bytes(ids[0].tolist()).decode()
        key = re.search(r"pass key is (\d+)", text).group(1) if self.knows else "0"
        answer = torch.tensor([list(f" {key}. And".encode())])
        return torch.cat([ids, answer], dim=1)


class _Split:
    device = torch.device("cpu")

    def __init__(self, knows):
        self.knows = knows

    def hidden(self, ids):
        shift = 0 if self.knows else 1
        return torch.roll(ids[0], -1) + shift  # "hidden" row i names the token that comes next

    def logits(self, hidden):
        return 50.0 * torch.nn.functional.one_hot(hidden, 300).float()


@pytest.mark.parametrize("knows", [True, False])
def test_judgement(tiny, knows):
    made = prompt(length=700)
    trial = run_trial(_Oracle(knows), tiny.tokenizer, made, split=_Split(knows))
    assert trial.found is knows
    assert trial.likely is knows
    assert (trial.loss < 1e-6) is knows


def test_a_cell_of_a_random_model_finds_nothing(tiny):
    shares = []
    cell = run_cell(
        tiny.model, tiny.tokenizer, length=420, depth=0.5, seeds=[0, 1, 2], progress=shares.append
    )
    assert (cell.trials, cell.found, cell.likely) == (3, 0, 0)
    assert cell.found_low == 0.0
    assert 0.4 < cell.found_high < 0.7
    assert cell.loss > 2.0
    assert cell.mean_tokens == 410
    assert sum(shares) == pytest.approx(1.0)


def test_likelihood_of_the_key_is_that_of_the_whole_model(tiny):
    made = prompt(length=420)
    trial = run_trial(tiny.model, tiny.tokenizer, made, split=SplitModel(tiny.model))
    key = f" {made.pass_key}"
    ids = torch.tensor([list((made.text + key).encode())])
    with torch.no_grad():
        log_probs = tiny.model(input_ids=ids).logits[0].log_softmax(-1)
    expected = [-float(log_probs[i - 1, ids[0, i]]) for i in range(-len(key), 0)]
    assert trial.loss == pytest.approx(sum(expected) / len(key), rel=1e-4)
