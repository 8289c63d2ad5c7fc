"""Tasks at length after RULER (arXiv:2404.06654): needles, variable tracking, common words.

No text is generated: a needle is found if every token of its number is the model's first choice
given those before; the other two rank words by the probability of their first token as the next.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import ConfigError

__all__ = ["TASKS", "TaskPrompt", "make_task", "score_tasks"]

_WORDS = (
    "apple river stone cloud window garden silver hammer bottle candle forest bridge castle "
    "engine feather flower guitar island jacket kitchen ladder market needle orange pencil "
    "rabbit school table umbrella village water yellow anchor basket camera desert eagle "
    "finger ghost honey iron jungle king lemon mountain night ocean paper queen rain sugar "
    "tiger uncle valley winter bread chair dragon earth fire glass horse ice judge knife lamp "
    "moon nose oil piano road snow train voice wheel arm bird coat door egg farm gold hat ink "
    "jar key leaf milk net owl pig ring ship tree vase wolf bell cake duck ear fish goat hill "
    "lake map nail pool rope sand tent wall yard"
)
_HOPS, _CHAINS = 4, 4
_COMMON, _RATIO = 10, 5  # common words, and how often they come for each time of another word


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskPrompt:
    """text: what the model reads. answer: how it should go on, for needles. right, wrong: words to
    rank, for the other tasks.
    """

    text: str
    answer: str = ""
    right: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()


class _Maker:
    """One prompt: `build` makes it with about so many characters (or items) of filler."""

    def __init__(self, tokenizer: Any, book: str, seed: int) -> None:
        self.draw = random.Random(f"longspan-tasks-{seed}")
        self.words = _distinct(tokenizer)
        self.draw.shuffle(self.words)
        self.book, self.place = book, self.draw.random()

    def fill(self, characters: int, inserts: Sequence[str], places: Sequence[float]) -> str:
        """Prose with sentences put in at shares of its length."""
        start = int(self.place * max(0, len(self.book) - characters))
        hay = self.book[start : start + characters]
        parts, before = [], 0
        for place, insert in sorted(zip(places, inserts, strict=True)):
            at = round(place * len(hay))
            parts += [hay[before:at], f" {insert} "]
            before = at
        return "".join([*parts, hay[before:]])

    def needles(self, count: int) -> tuple[Callable[[int], str], TaskPrompt]:
        words = self.words[:count]
        numbers = [self.draw.randint(10_000, 99_999) for _ in words]
        places = [self.draw.random() for _ in words]
        said = [
            f"One of the special magic numbers for {word} is: {number}."
            for word, number in zip(words, numbers, strict=True)
        ]
        head = "Some special magic numbers are hidden within the following text. Memorize them.\n"
        tail = (
            f"\nWhat is the special magic number for {words[0]} mentioned in the text? The special "
            f"magic number for {words[0]} mentioned in the text is:"
        )
        return (
            lambda size: head + self.fill(size, said, places) + tail,
            TaskPrompt(text="", answer=f" {numbers[0]}"),
        )

    def variables(self) -> tuple[Callable[[int], str], TaskPrompt]:
        names = self.words[: _HOPS * _CHAINS]
        said: list[str] = []
        places: list[float] = []
        values = self.draw.sample(range(10_000, 99_999), _CHAINS)
        for chain in range(_CHAINS):
            own = names[chain * _HOPS : (chain + 1) * _HOPS]
            said.append(f"VAR {own[0]} = {values[chain]}.")
            said += [f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(own)]
            places += sorted(self.draw.random() for _ in own)
        head = "Memorize and track the chains of variable assignments hidden in the text.\n"
        tail = (
            f"\nFind all variables that are assigned the value {values[0]} in the text above. "
            f"The variables that are assigned the value {values[0]} are:"
        )
        return (
            lambda size: head + self.fill(size, said, places) + tail,
            TaskPrompt(text="", right=tuple(names[:_HOPS]), wrong=tuple(names[_HOPS:])),
        )

    def common(self) -> tuple[Callable[[int], str], TaskPrompt]:
        common, rest = self.words[:_COMMON], self.words[_COMMON:]
        seed = self.draw.random()

        def build(size: int) -> str:
            draw = random.Random(seed)
            once = common * _RATIO + rest
            draw.shuffle(once)
            rounds, more = divmod(size // 8, len(once))
            items = once * rounds + once[:more]
            draw.shuffle(items)
            listed = " ".join(f"{i}. {word}" for i, word in enumerate(items, 1))
            return (
                "Below is a numbered list of words. Some words appear more often than others. "
                f"Memorize the ones that appear most often.\n{listed}\nQuestion: What are the "
                f"{_COMMON} most common words in the list? Answer: The words are:"
            )

        return build, TaskPrompt(text="", right=tuple(common), wrong=tuple(rest))


TASKS = ("needle", "needle of 8", "variables", "common words")


def make_task(task: str, tokenizer: Any, *, length: int, seed: int, book: str) -> TaskPrompt:
    """The longest prompt of a task with at most `length` tokens.

    Args:
        task: one of TASKS.
        length: in tokens; leave room for the answer.
        seed: picks words, numbers, places and the part of the book.
        book: prose to hide things in.

    Raises:
        ConfigError: `length` is too short for the task, or the book for `length`.
    """
    maker = _Maker(tokenizer, book, seed)
    if task == "needle":
        build, prompt = maker.needles(1)
    elif task == "needle of 8":
        build, prompt = maker.needles(8)
    elif task == "variables":
        build, prompt = maker.variables()
    else:
        build, prompt = maker.common()
    text = _longest(build, lambda t: len(tokenizer(t)["input_ids"]), length, len(book))
    return TaskPrompt(text=text, answer=prompt.answer, right=prompt.right, wrong=prompt.wrong)


def _longest(
    build: Callable[[int], str], count: Callable[[str], int], length: int, most: int
) -> str:
    if count(build(0)) > length:
        raise ConfigError(
            f"length: {length} tokens came, too few for the task without any filler "
            f"({count(build(0))}). Pass a longer length."
        )
    # Tokens grow about evenly with the filler: aim at the length, and halve where that stalls.
    low, few = 0, count(build(0))
    high, many = 12 * length, 0  # characters; a token has fewer than 12
    for turn in itertools.count():
        if high - low <= 16:
            return build(low)
        guess = (low + high) // 2
        if turn % 3 < 2:
            rate = (many - few) / (high - low) if many else 0.25
            guess = min(high - 8, max(low + 8, round(low + (length - few) / rate) - 8 * (turn % 3)))
        found = count(build(guess))
        if found <= length:
            low, few = guess, found
        else:
            high, many = guess, found
    raise AssertionError


def _distinct(tokenizer: Any) -> list[str]:
    """Words that differ in their first token after a space."""
    seen: dict[int, str] = {}
    for word in _WORDS.split():
        seen.setdefault(_first_token(tokenizer, word), word)
    return list(seen.values())


def _first_token(tokenizer: Any, word: str) -> int:
    ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    blank = tokenizer(" ", add_special_tokens=False)["input_ids"]
    return int(next((i for i in ids if [i] != blank), ids[0]))


@torch.no_grad()
def score_tasks(model: Any, tokenizer: Any, prompts: Sequence[TaskPrompt]) -> list[float]:
    """Share of each prompt that is right, in 0 .. 1; prompts go through the model in one batch.

    They are padded on the right, which causal attention cannot see.
    """
    texts = [tokenizer(prompt.text)["input_ids"] for prompt in prompts]
    goals = [
        tokenizer(prompt.answer, add_special_tokens=False)["input_ids"] if prompt.answer else []
        for prompt in prompts
    ]
    longest = max(len(text) + len(goal) for text, goal in zip(texts, goals, strict=True))
    ids = torch.zeros((len(prompts), longest), dtype=torch.int64, device=model.device)
    for row, text, goal in zip(ids, texts, goals, strict=True):
        row[: len(text) + len(goal)] = torch.tensor(text + goal)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    scores = []
    for row, prompt, text, goal in zip(hidden, prompts, texts, goals, strict=True):
        logits = model.lm_head(row[len(text) - 1 : len(text) + max(len(goal), 1) - 1]).float()
        if prompt.answer:
            scores.append(float((logits.argmax(-1).cpu() == torch.tensor(goal)).all()))
            continue
        words = [*prompt.right, *prompt.wrong]
        chances = F.log_softmax(logits[0], -1)[[_first_token(tokenizer, word) for word in words]]
        best = chances.topk(len(prompt.right)).indices
        scores.append(float((best < len(prompt.right)).double().mean()))
    return scores
