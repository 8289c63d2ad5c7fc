"""A text of any length, read a piece at a time from any place in it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..errors import ConfigError

__all__ = ["TextSource"]

_PIECE = 1 << 16  # bytes


class TextSource:
    """Pieces of a UTF-8 text, by the byte they begin at; holds one piece at a time.

    A piece ends before white space, so that a tokenizer cuts no word in two; two pieces meet
    where byte-level tokenizers cut anyway. Line ends become "\\n".

    Args:
        source: path of a plain text file, or the text itself as bytes.
        piece: bytes of a piece, at most.

    Raises:
        ConfigError: no such file.

    Example:
        >>> source = TextSource("One two three.".encode(), piece=8)
        >>> source.piece(0), source.piece(7), source.piece(14)
        (('One two', 7), (' three.', 14), None)
    """

    def __init__(self, source: str | os.PathLike[str] | bytes, *, piece: int = _PIECE) -> None:
        self._bytes = source if isinstance(source, bytes) else None
        self._path = Path() if isinstance(source, bytes) else Path(source)
        self._piece = piece
        if self._bytes is None and not self._path.is_file():
            raise ConfigError(f"text: {self._path} is no file. Give a plain text file in UTF-8.")

    def piece(self, start: int) -> tuple[str, int] | None:
        """The text from byte `start` on and the byte where the next piece begins; None at the end.

        Raises:
            ConfigError: not UTF-8.
        """
        block = self._read(start)
        if not block:
            return None
        if len(block) == self._piece:
            block = block[: _cut(block)]
        try:
            text = block.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"text: byte {start + error.start} of {self._path} is not UTF-8. Convert the file."
            ) from error
        if start == 0:
            text = text.removeprefix("\ufeff")
        return text.replace("\r\n", "\n").replace("\r", "\n"), start + len(block)

    def fingerprint(self) -> str:
        """sha256 of all bytes; reads the file once, a piece at a time."""
        digest, start = hashlib.sha256(), 0
        while block := self._read(start):
            digest.update(block)
            start += len(block)
        return digest.hexdigest()

    def _read(self, start: int) -> bytes:
        if self._bytes is not None:
            return self._bytes[start : start + self._piece]
        with self._path.open("rb") as handle:
            handle.seek(start)
            return handle.read(self._piece)


def _cut(block: bytes) -> int:
    """Where a piece ends that is not the last: before white space, or between two characters."""
    cut = max(block.rfind(b" "), block.rfind(b"\n"))
    if cut <= 0:
        cut = len(block) - 1
        while cut > 1 and block[cut] & 0xC0 == 0x80:  # not the first byte of a character
            cut -= 1
    if block[cut - 1 : cut + 1] == b"\r\n":  # one line end
        cut += -1 if cut > 1 else 1
    return cut
