"""Texts to measure on: the bundled book, files, folders, archives; and their first tokens."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import tarfile
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError, nearest_name

__all__ = ["BOOKS", "DEFAULT_BOOK", "Text", "iter_texts", "load_text", "take_tokens"]

# books/README.md says where they come from.
BOOKS = {"great-expectations": "Charles Dickens, Great Expectations (1861)"}
DEFAULT_BOOK = "great-expectations"
_KINDS = (
    "a .txt, .txt.xz or .jsonl file, a folder of .txt files, a .tar.xz archive of .txt members, "
    "or archive.tar.xz/member.txt"
)


class Text(NamedTuple):
    """A text: its name, the characters (line ends are "\\n"), sha256 of them in UTF-8."""

    name: str
    text: str
    sha256: str


def load_text(source: str | os.PathLike[str] | None = None) -> Text:
    """Read one text.

    Args:
        source: None for the bundled book, the name of a bundled book, or a path: a .txt file (any
            other suffix is read as such), .txt.xz, .jsonl (the field "text" of each line), a folder
            (its .txt files), a tar archive (its .txt members), or one member as
            `archive.tar.xz/member.txt`. Parts are joined by an empty line, in order of name
            (.jsonl: in order of lines). An existing file goes before a book of the same name.

    Returns:
        Text(name, text, sha256). Line ends become "\\n" and a byte order mark is dropped, so that
        a text has one sha256 on every system.

    Raises:
        ConfigError: nothing there, unreadable, not UTF-8, not of the format that its suffix says,
            or without any text.

    Example:
        >>> load_text().name
        'great-expectations'
    """
    parts = list(iter_texts(source))
    name = parts[0].name if len(parts) == 1 else Path(source or "").name
    return parts[0] if len(parts) == 1 else _text(name, "\n\n".join(part.text for part in parts))


def iter_texts(source: str | os.PathLike[str] | None = None) -> Iterator[Text]:
    """The parts of a text one after the other: each file, archive member or line by itself.

    Args:
        source: as for `load_text`.

    Yields:
        Text: parts without characters other than white space are left out.

    Raises:
        ConfigError: as for `load_text`; also if no part has any text.
    """
    num_parts = 0
    for name, text in _read(source):
        text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        if text and not text.isspace():
            num_parts += 1
            yield _text(name, text)
    if not num_parts:
        raise ConfigError(
            f"text: {os.fspath(source or DEFAULT_BOOK)} holds no text. Allowed: {_KINDS} with at "
            "least one character that is not white space. Check the file, or leave the text out "
            f"to read the bundled book {DEFAULT_BOOK!r}."
        )


def take_tokens(
    text: str | Text, tokenizer: Callable[..., Any], count: int, *, start: int = 0
) -> list[int]:
    """`count` token ids of a text, with the tokenizer's <bos> in front where it has one.

    Args:
        text: the text.
        tokenizer: of transformers.
        count: ids to return; a leading <bos> counts.
        start: tokens of the text to skip.

    Returns:
        `count` ids: <bos> if the tokenizer puts one in front of a text, then the tokens from
        `start` on. The whole text is tokenised, so a token never depends on `count`.

    Raises:
        ConfigError: the text is shorter; the message says how many tokens it has.
    """
    if count < 1 or start < 0:
        raise ConfigError(
            f"take_tokens: count={count} and start={start} came. Allowed: count of at least 1 and "
            "start of at least 0. Pass for example count=4096."
        )
    text, name = (text.text, text.name) if isinstance(text, Text) else (text, "the text")
    bos = getattr(tokenizer, "bos_token_id", None)
    front = list(tokenizer("")["input_ids"][:1])
    front = front if front and front[0] == bos else []
    # verbose=False: transformers would warn about texts longer than the model's context.
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    taken = front + ids[start : start + count - len(front)]
    if len(taken) < count:
        there = len(front) + max(len(ids) - start, 0)
        raise ConfigError(
            f"take_tokens: count is {count}, but {name} has {there} tokens from start={start} on "
            f"({len(text)} characters, {len(ids)} tokens in all). Allowed: count up to {there}. "
            "Ask for fewer tokens or give a longer text."
        )
    return taken


def _read(source: str | os.PathLike[str] | None) -> Iterator[tuple[str, str]]:
    path = Path(source or DEFAULT_BOOK)
    if source is None or (str(source) in BOOKS and not path.exists()):
        book = files(__package__).joinpath("books", f"{path}.txt.xz")
        yield str(path), lzma.decompress(book.read_bytes()).decode()
        return
    archive = next((p for p in path.parents if _is_archive(p) and p.is_file()), None)
    try:
        if archive:
            yield from _read_archive(archive, path.relative_to(archive).as_posix())
        elif path.is_dir():
            for file in sorted(path.rglob("*.txt")):
                yield file.name, _decode(file, file.read_bytes())
        elif not path.exists():
            raise ConfigError(
                f"text: {os.fspath(source)!r} is neither a file, a folder nor a bundled book. "
                f"Allowed: {_KINDS}, or the name of a bundled book. "
                f"{nearest_name(str(source), BOOKS)}"
            )
        elif _is_archive(path):
            yield from _read_archive(path)
        elif path.suffix == ".xz":
            yield path.name, _decode(path, lzma.decompress(path.read_bytes()))
        elif path.suffix == ".jsonl":
            yield from _read_lines(path)
        else:
            yield path.name, _decode(path, path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"text: {path} cannot be read ({error.strerror or error}). Allowed: files that this "
            "user may read. Check its permissions, or give another path."
        ) from error
    except (lzma.LZMAError, EOFError, tarfile.TarError) as error:
        raise ConfigError(
            f"text: {archive or path} is not a whole archive of its kind ({error}). Allowed: "
            f"{_KINDS}. It may be cut short: copy it again."
        ) from error


def _is_archive(path: Path) -> bool:
    return path.name.endswith((".tar", ".tar.xz", ".tar.gz", ".tar.bz2", ".tgz", ".txz"))


def _read_archive(path: Path, member: str | None = None) -> Iterator[tuple[str, str]]:
    with tarfile.open(path) as tar:  # members are read, never unpacked
        texts = {m.name: m for m in tar.getmembers() if m.isfile() and m.name.endswith(".txt")}
        if member is not None:
            wanted = member if member.endswith(".txt") else f"{member}.txt"
            if wanted not in texts:
                raise ConfigError(
                    f"text: {path.name} has no member {wanted!r}. {nearest_name(wanted, texts)} "
                    "Give one of them, or the archive alone for all of them."
                )
            texts = {wanted: texts[wanted]}
        for name, info in sorted(texts.items()):
            handle = tar.extractfile(info)
            assert handle is not None, "a regular file has contents"
            yield name, _decode(f"{path}/{name}", handle.read())


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_decode(path, path.read_bytes()).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise TypeError(f"its field text is a {type(text).__name__}")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"text: line {number} of {path} is not a JSON object with a text ({error}). "
                'Allowed: one object per line with a string field "text". Correct the line, or '
                "give a plain .txt file."
            ) from error
        yield f"{path.name}:{number}", text


def _decode(path: str | os.PathLike[str], data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"text: {os.fspath(path)} is not UTF-8 (byte {error.start} is {data[error.start]:#x}). "
            "Allowed: UTF-8 text. Convert it, for example with "
            "`iconv -f WINDOWS-1252 -t UTF-8 old.txt > new.txt`, or give another file."
        ) from error


def _text(name: str, text: str) -> Text:
    return Text(name, text, hashlib.sha256(text.encode()).hexdigest())
