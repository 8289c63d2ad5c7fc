"""A byte-pair tokenizer of a few thousand entries, trained on the texts at hand."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, MissingExtraError

__all__ = ["END_OF_TEXT", "load_tokenizer", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"  # token 0: stands before each document
_PIECE = 1 << 16  # characters given to the trainer at a time


def train_tokenizer(
    texts: Iterable[str], path: str | os.PathLike[str], *, vocab_size: int = 8192
) -> Any:
    """Learn byte-level byte pairs and write tokenizer.json, which appears whole or not at all.

    Args:
        texts: documents.
        path: of the file to write.
        vocab_size: entries, with the 256 bytes and `<|endoftext|>` (id 0) among them.

    Returns:
        A `tokenizers.Tokenizer`; every text can be encoded and is decoded to itself.

    Raises:
        ConfigError: vocab_size is below 300 or above 65,536 (tokens are kept in 16 bits).
        MissingExtraError: tokenizers is not installed.

    Cost:
        About a minute for 80 million characters on two cores.
    """
    if not 300 <= vocab_size <= 65_536:
        raise ConfigError(
            f"train_tokenizer: vocab_size is {vocab_size}; it must lie between 300 (256 bytes and "
            "some pairs) and 65,536 (16 bits). Use for example 8192."
        )
    tokenizers = _tokenizers()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(texts), trainer)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    tokenizer.save(str(aside))
    os.replace(aside, target)
    return tokenizer


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Read a tokenizer.json.

    Raises:
        ConfigError: no such file, or not a tokenizer.
        MissingExtraError: tokenizers is not installed.
    """
    tokenizers = _tokenizers()
    try:
        return tokenizers.Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(
            f"tokenizer: {path} cannot be read as a tokenizer ({error}). Allowed: a "
            "tokenizer.json. Give another file, or train one with longspan.train.train_tokenizer."
        ) from error


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), _PIECE):
            yield text[start : start + _PIECE]


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise MissingExtraError.for_module("tokenizers", str(error.name), "train") from error
    return tokenizers
