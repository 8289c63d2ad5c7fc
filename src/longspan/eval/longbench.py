"""LongBench's files (arXiv:2308.14508): long contexts with questions, one JSON object per line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .data import Text

__all__ = ["LongBenchItem", "is_longbench", "longbench_texts", "read_longbench"]

_FIELDS = ("input", "context", "answers", "length", "dataset", "language", "_id")
_FORMAT = "files of LongBench: JSON lines with the fields " + ", ".join(_FIELDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class LongBenchItem:
    """One question.

    context: what is read. input: the question, may be "". answers: any of which is right.
    length: of the context, in words (characters for Chinese), as the file says. dataset, language,
    item_id: as the file says. all_classes: of classification, else ().
    """

    context: str
    input: str
    answers: tuple[str, ...]
    length: int
    dataset: str
    language: str
    item_id: str
    all_classes: tuple[str, ...] = ()


def read_longbench(
    source: str | os.PathLike[str], *, datasets: Iterable[str] | None = None
) -> Iterator[LongBenchItem]:
    """The items of LongBench or LongBench-E, in order of file name and line.

    Args:
        source: one NAME.jsonl, a folder with such files, or the archive data.zip as it is.
        datasets: file names without .jsonl, e.g. "qasper" or "qasper_e". Default: all there.

    Raises:
        ConfigError: nothing there, a line that is no item, or a name that is not there.

    Example:
        >>> import json, tempfile, pathlib
        >>> line = {"input": "Who?", "context": "A man came.", "answers": ["a man"], "length": 3,
        ...         "dataset": "tale", "language": "en", "all_classes": None, "_id": "1"}
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "tale.jsonl"
        >>> _ = file.write_text(json.dumps(line))
        >>> [item.answers for item in read_longbench(file)]
        [('a man',)]
    """
    path = Path(source)
    wanted = None if datasets is None else set(datasets)
    found = set()
    for name, lines in _files(path):
        found.add(name)
        if wanted is not None and name not in wanted:
            continue
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _item(line, f"{name}.jsonl:{number}")
    if not found:
        raise ConfigError(
            f"longbench: {path} has no .jsonl file. Allowed: {_FORMAT}, a folder of them, or the "
            "archive data.zip. Give one of these."
        )
    missing = sorted((wanted or set()) - found)
    if missing:
        raise ConfigError(
            f"longbench: {path} has no data set {missing[0]!r}. Allowed: "
            f"{', '.join(sorted(found))}. Give one of these."
        )


def longbench_texts(items: Iterable[LongBenchItem]) -> Iterator[Text]:
    """Contexts as texts, for perplexity and whatever else reads texts; each context once."""
    seen = set()
    for item in items:
        digest = hashlib.sha256(item.context.encode()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            yield Text(f"{item.dataset}:{item.item_id}", item.context, digest)


def is_longbench(source: str | os.PathLike[str] | None) -> bool:
    """Whether a path looks like LongBench's files: the first line has a context."""
    if source is None or not Path(source).exists():
        return False
    try:
        return next(read_longbench(source), None) is not None
    except ConfigError:
        return False


def _files(path: Path) -> Iterator[tuple[str, Iterable[str]]]:
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:  # read in place, never unpacked
                for member in sorted(archive.namelist()):
                    if member.endswith(".jsonl"):
                        with archive.open(member) as handle:
                            yield Path(member).stem, io.TextIOWrapper(handle, encoding="utf-8")
        else:
            names = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
            for name in names:
                if name.suffix == ".jsonl":
                    with open(name, encoding="utf-8") as handle:
                        yield name.stem, handle
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise ConfigError(
            f"longbench: {path} cannot be read ({error}). Allowed: {_FORMAT}, a folder of them, "
            "or the archive data.zip. Give a path that exists and is whole."
        ) from error


def _item(line: str, place: str) -> LongBenchItem:
    try:
        row: dict[str, Any] = json.loads(line)
        answers = row["answers"]
        if not isinstance(row["context"], str) or not isinstance(answers, list):
            raise TypeError("context must be a text and answers a list")
        return LongBenchItem(
            context=row["context"],
            input=str(row["input"]),
            answers=tuple(str(answer) for answer in answers),
            length=int(row["length"]),
            dataset=str(row["dataset"]),
            language=str(row["language"]),
            item_id=str(row["_id"]),
            all_classes=tuple(row.get("all_classes") or ()),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"longbench: {place} is no item ({type(error).__name__}: {error}). Allowed: {_FORMAT}. "
            "Copy the file again, or correct the line."
        ) from error
