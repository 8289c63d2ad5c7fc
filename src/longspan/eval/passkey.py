"""Passkey retrieval by length and depth: prompts, answers, judgement.

The prompt is that of Landmark Attention (its `llama/run_test.py`), five parts joined by newlines:
task line, filler, needle, filler, question. The haystack is either its repeated sentences, the
easiest there is, or natural text that does not repeat.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError, nearest_name
from .scoring import SplitModel, as_input_ids
from .statistics import wilson_interval

__all__ = [
    "HAYSTACKS",
    "Cell",
    "Prompt",
    "Trial",
    "check_haystack",
    "make_prompt",
    "run_cell",
    "run_trial",
]

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the pass key? The pass key is"
HAYSTACKS = ("landmark", "book")
_MAX_KEY = 50_000
_NEW_TOKENS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt and its answer.

    text: what the model reads. pass_key: the number it should continue with.
    num_tokens: length of `text` in tokens. depth: share of the filler before the needle.
    """

    text: str
    pass_key: int
    num_tokens: int
    depth: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One answer. `found`: the first number generated is the key. `likely`: each token of the key
    is the model's first choice given the ones before. `loss`: nats per token of the key."""

    found: bool
    likely: bool
    loss: float
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """All trials at one length and depth, with 95 % Wilson intervals of both success rates."""

    trials: int
    found: int
    likely: int
    found_low: float
    found_high: float
    likely_low: float
    likely_high: float
    loss: float
    mean_tokens: float


def make_prompt(
    count_tokens: Callable[[str], int],
    *,
    length: int,
    depth: float,
    seed: int,
    haystack: str = "landmark",
    book: str | None = None,
) -> Prompt:
    """The longest prompt of at most `length` tokens with the needle at `depth`.

    Args:
        count_tokens: number of tokens of a text.
        length: most tokens the prompt may have.
        depth: share of the filler's characters before the needle, 0 (start) .. 1 (end).
        seed: picks the key and, for a book, the place in it. Key and place depend on the seed
            only, so that the same trials are made at every length and depth.
        haystack: "landmark" (its sentences, repeated) or "book" (`book`, read from a random place).
        book: text of at least `length` tokens, for haystack="book".

    Raises:
        ConfigError: unknown haystack, depth outside 0 .. 1, `length` too short for the question
            alone, or a book that is too short.

    Differs from the paper:
        Landmark draws the needle's place at random; here it is a parameter, because results by
        depth are the point. Both stretches of filler start at the beginning of the sentences, as
        there; a book goes on after the needle where it stopped.
    """
    check_haystack(haystack)
    if not 0.0 <= depth <= 1.0:
        raise ConfigError(
            f"depth: {depth} came. Allowed: 0 (needle first) to 1 (needle last). Pass a share."
        )
    generator = random.Random(f"longspan-passkey-{seed}")
    key = generator.randint(1, _MAX_KEY)
    place = generator.random()

    def build(characters: int) -> str:
        return _assemble(key, characters, depth, book if haystack == "book" else None, place)

    shortest = count_tokens(build(0))
    if shortest > length:
        raise ConfigError(
            f"length: {length} came. Allowed: {shortest} or more (task, needle and question "
            "alone). Pass a longer length."
        )
    if haystack == "book" and not book:
        raise ConfigError("book: nothing came. Allowed: a text. Pass one for haystack='book'.")
    low, high = 0, 64
    most = len(book) if haystack == "book" and book else None
    while (most is None or high <= most) and count_tokens(build(high)) <= length:
        low, high = high, 2 * high
    if most is not None and high > most:
        high = most + 1
        if count_tokens(build(most)) <= length:
            raise ConfigError(
                f"book: {most:,} characters came, too few for {length} tokens. Allowed: a longer "
                "text. Pass another text or a shorter length."
            )
    while high - low > 1:
        middle = (low + high) // 2
        if count_tokens(build(middle)) <= length:
            low = middle
        else:
            high = middle
    text = build(low)
    return Prompt(text=text, pass_key=key, num_tokens=count_tokens(text), depth=depth)


def check_haystack(haystack: str) -> None:
    """Refuse the name of a haystack that is not known."""
    if haystack not in HAYSTACKS:
        raise ConfigError(f"haystack: {haystack!r} came. {nearest_name(haystack, HAYSTACKS)}")


def _assemble(key: int, characters: int, depth: float, book: str | None, place: float) -> str:
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    before = round(characters * depth)
    after = characters - before
    if book is None:
        copies = max(before, after) // (len(FILLER) + 1) + 1
        filler = " ".join([FILLER] * copies)
        prefix, suffix = filler[:before], filler[:after]
    else:
        start = int(place * max(0, len(book) - characters))
        hay = book[start : start + characters]
        prefix, suffix = hay[:before], hay[before:]
    return "\n".join([TASK, prefix, needle, suffix, QUESTION])


def first_number(text: str) -> int | None:
    """The first whole number in a generated answer, or None."""
    match = re.search(r"\d+", text)
    return int(match.group()) if match else None


def run_trial(model: Any, tokenizer: Any, prompt: Prompt, *, split: SplitModel) -> Trial:
    """Let the model answer one prompt: greedily by generation, and by the likelihood of the key.

    The key is scored as it continues the prompt (" 12345"): tokens of prompt and key together,
    minus those of the prompt.
    """
    device = split.device
    question = as_input_ids(tokenizer(prompt.text)["input_ids"], device)
    with torch.no_grad():
        generated = model.generate(
            question,
            attention_mask=torch.ones_like(question),
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )[0, question.shape[1] :]
    answer = tokenizer.decode(generated, skip_special_tokens=True)
    key_ids = tokenizer(f" {prompt.pass_key}", add_special_tokens=False)["input_ids"]
    whole = torch.cat([question, as_input_ids(key_ids, device)], dim=1)
    hidden = split.hidden(whole)[-len(key_ids) - 1 : -1]
    log_probs = torch.log_softmax(split.logits(hidden), dim=-1)
    target = whole[0, -len(key_ids) :]
    return Trial(
        found=first_number(answer) == prompt.pass_key,
        likely=bool((log_probs.argmax(-1) == target).all()),
        loss=-float(log_probs.gather(1, target[:, None]).mean()),
        answer=answer,
    )


def run_cell(
    model: Any,
    tokenizer: Any,
    *,
    length: int,
    depth: float,
    seeds: Sequence[int],
    haystack: str = "landmark",
    book: str | None = None,
    split: SplitModel | None = None,
    progress: Callable[[float], None] | None = None,
) -> Cell:
    """All trials at one length and depth, one per seed.

    Args:
        model: causal language model of transformers, patched or not. tokenizer: its tokenizer.
        length, depth, haystack, book: see `make_prompt`. The prompt leaves room for the answer, so
            that prompt and answer together have at most `length` tokens.
        seeds: one trial each.
        split: the model as a `SplitModel`, if there is one already.
        progress: called with shares of the work, which add up to 1.
    """
    split = split or SplitModel(model)

    def count_tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    trials, tokens = [], []
    for seed in seeds:
        prompt = make_prompt(
            count_tokens,
            length=length - _NEW_TOKENS,
            depth=depth,
            seed=seed,
            haystack=haystack,
            book=book,
        )
        trials.append(run_trial(model, tokenizer, prompt, split=split))
        tokens.append(prompt.num_tokens)
        if progress:
            progress(1 / len(seeds))
    found, likely = sum(t.found for t in trials), sum(t.likely for t in trials)
    found_low, found_high = wilson_interval(found, len(trials))
    likely_low, likely_high = wilson_interval(likely, len(trials))
    return Cell(
        trials=len(trials),
        found=found,
        likely=likely,
        found_low=found_low,
        found_high=found_high,
        likely_low=likely_low,
        likely_high=likely_high,
        loss=sum(t.loss for t in trials) / len(trials),
        mean_tokens=sum(tokens) / len(tokens),
    )
