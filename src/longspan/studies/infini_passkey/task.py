"""The passkey as token ids, drawn on the device: filler, a needle with five digits, a question.

The texts are those of `longspan.eval.passkey` (Landmark Attention's). The digits of the key are
tokens of their own, so that each is right by chance one time in ten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError
from ...eval.passkey import FILLER, QUESTION, TASK

__all__ = ["DIGITS", "Prompts", "Words", "draw_prompts", "read_words"]

DIGITS = 5
_HASH = 1_000_003


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """Ids of the parts of a prompt.

    task, filler (one period), before, between, after (around the two mentions of the key in the
    needle), question: int64. digits: (10,), the tokens "0" .. "9".
    """

    task: Tensor
    filler: Tensor
    before: Tensor
    between: Tensor
    after: Tensor
    question: Tensor
    digits: Tensor

    @property
    def needle_length(self) -> int:
        """Tokens of a needle."""
        return len(self.before) + len(self.between) + len(self.after) + 2 * DIGITS

    @property
    def tail_length(self) -> int:
        """Tokens of question and answer, without the last digit, which nothing follows."""
        return len(self.question) + DIGITS - 1

    @property
    def shortest(self) -> int:
        """Tokens of a prompt without filler."""
        return len(self.task) + self.needle_length + self.tail_length


class Prompts(NamedTuple):
    """ids: (B, N), int64, up to the last digit but one. keys: (B, DIGITS), ids of the digits.
    needle: (B,), where the needle begins. natural: (B,), bool, whether the filler is a book's.
    """

    ids: Tensor
    keys: Tensor
    needle: Tensor
    natural: Tensor


def read_words(tokenizer: Any) -> Words:
    """The parts of the prompt under a `tokenizers.Tokenizer`.

    Raises:
        ConfigError: a digit is no token of its own.
    """

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer.encode(text).ids, dtype=torch.int64)

    digits = [tokenizer.token_to_id(str(digit)) for digit in range(10)]
    if None in digits:
        raise ConfigError(
            "tokenizer: it has no tokens for single digits. Allowed: one that encodes every byte, "
            "as longspan.train.train_tokenizer makes it. Use the tokenizer.json of the data."
        )
    return Words(
        task=ids(TASK + "\n"),
        filler=ids(" " + FILLER),
        before=ids("\nThe pass key is "),
        between=ids(". Remember it. "),
        after=ids(" is the pass key.\n"),
        question=ids("\n" + QUESTION + " "),
        digits=torch.tensor(digits, dtype=torch.int64),
    )


def draw_prompts(
    words: Words,
    *,
    length: int,
    count: int,
    seed: int,
    depth: float | None = None,
    book: Tensor | None = None,
    book_share: float = 0.0,
    device: torch.device | str = "cpu",
) -> Prompts:
    """Prompts of `length` tokens with one key each.

    Args:
        words: of `read_words`.
        length: tokens of a prompt with its answer, the last digit left out.
        count: how many.
        seed: of everything; the same on every device. Keys do not depend on length or depth.
        depth: share of the filler before the needle; None draws it for each prompt.
        book: ids of natural text, of at least `length` tokens.
        book_share: share of the prompts whose filler is a stretch of `book`.
        device: of the result.

    Raises:
        ConfigError: `length` is too short, or `book` is.
    """
    room = length - words.shortest
    if room < 0:
        raise ConfigError(
            f"length: {length} came. Allowed: {words.shortest} or more (task, needle, question and "
            "answer). Pass a longer length."
        )
    draw = torch.Generator().manual_seed(seed * _HASH + 17)
    keys = torch.randint(10, (count, DIGITS), generator=draw)
    shift = torch.rand(count, generator=draw, dtype=torch.float64)
    places = torch.rand(count, generator=draw, dtype=torch.float64)
    natural = torch.rand(count, generator=draw) < book_share
    if depth is not None:
        places = torch.full_like(places, depth)
    start = len(words.task) + (places * room).round().long()
    keys = words.digits[keys]
    position = torch.arange(length, device=device)
    offset = (shift * len(words.filler)).long().to(device)
    ids = words.filler.to(device)[(position + offset[:, None]) % len(words.filler)]
    if book_share:
        if book is None or len(book) <= length:
            raise ConfigError(
                f"book: {0 if book is None else len(book):,} tokens came. Allowed: more than "
                f"{length:,}, the length of a prompt. Pass a longer text."
            )
        from_book = (shift * (len(book) - length)).long().to(book.device)
        hay = book[from_book[:, None] + torch.arange(length, device=book.device)].to(ids)
        ids = torch.where(natural.to(device)[:, None], hay, ids)

    def spread(part: Tensor) -> Tensor:
        return part.expand(count, -1)

    needle = torch.cat(
        (spread(words.before), keys, spread(words.between), keys, spread(words.after)), 1
    )
    tail = torch.cat((spread(words.question), keys[:, :-1]), 1)
    columns = start[:, None] + torch.arange(needle.shape[1])
    ids[:, : len(words.task)] = words.task.to(device)
    ids.scatter_(1, columns.to(device), needle.to(device))
    ids[:, length - tail.shape[1] :] = tail.to(device)
    return Prompts(ids, keys.to(device), start.to(device), natural.to(device))
