"""The texts of the study: a tokenizer and two token files, made once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ...errors import ConfigError
from ...eval.data import iter_texts
from ...train.tokenizer import load_tokenizer, train_tokenizer
from ...train.tokens import TokenFile, write_tokens

__all__ = ["StudyData", "open_data", "prepare_data"]


class StudyData(NamedTuple):
    """train: what models see in training. heldout: what every reported number is of."""

    train: TokenFile
    heldout: TokenFile


def prepare_data(
    train: str | os.PathLike[str],
    heldout: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    vocab_size: int = 8192,
    pack: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Train a tokenizer on `train` and encode both; parts that are there already are kept.

    Args:
        train, heldout: texts, as `longspan.eval.data.iter_texts` takes them.
        folder: gets tokenizer.json, train.npy, heldout.npy and their JSON.
        vocab_size: of the tokenizer.
        pack: keep .npy.xz instead of .npy, for travelling (25 MB for 80 million characters).
        progress: called with what was done.

    Returns:
        The folder.
    """
    home = Path(folder)
    say = progress or (lambda text: None)
    if not (home / "tokenizer.json").exists():
        train_tokenizer(
            (text.text for text in iter_texts(train)),
            home / "tokenizer.json",
            vocab_size=vocab_size,
        )
        say("tokenizer")
    tokenizer = load_tokenizer(home / "tokenizer.json")
    for name, source in (("train", train), ("heldout", heldout)):
        if (home / f"{name}.npy").exists() or (home / f"{name}.npy.xz").exists():
            continue
        made = write_tokens(iter_texts(source), tokenizer, home / f"{name}.npy", progress=say)
        if pack:
            made.pack(home / f"{name}.npy")
    return home


def open_data(folder: str | os.PathLike[str]) -> StudyData:
    """Open what `prepare_data` made.

    Raises:
        ConfigError: something is missing, or the two files are of different tokenizers.
    """
    home = Path(folder)
    data = StudyData(TokenFile.open(home / "train.npy"), TokenFile.open(home / "heldout.npy"))
    if data.train.tokenizer_sha256 != data.heldout.tokenizer_sha256:
        raise ConfigError(
            f"data: train.npy and heldout.npy in {home} were made with different tokenizers. "
            "Allowed: files of one tokenizer. Make both again in an empty folder."
        )
    common = set(data.train.names) & set(data.heldout.names)
    if common:
        raise ConfigError(
            f"data: {sorted(common)[0]!r} is in both train.npy and heldout.npy. Allowed: texts "
            "that are held out from training. Take it out of one of them."
        )
    return data
