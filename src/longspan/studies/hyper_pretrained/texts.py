"""Texts of the study: books, or the contexts of LongBench."""

from __future__ import annotations

import os

from ...eval.data import Text, iter_texts
from ...eval.longbench import is_longbench, longbench_texts, read_longbench

__all__ = ["heldout_texts"]


def heldout_texts(source: str | os.PathLike[str] | None) -> list[Text]:
    """All texts of `source`.

    Args:
        source: what `iter_texts` reads, or LongBench's files (one, a folder, data.zip), of which
            the contexts are taken, the longest first, as the paper takes long ones.

    Raises:
        ConfigError: nothing there, or not of a known format.
    """
    if source is not None and is_longbench(source):
        texts = longbench_texts(read_longbench(source))
        return sorted(texts, key=lambda text: len(text.text), reverse=True)
    return list(iter_texts(source))
