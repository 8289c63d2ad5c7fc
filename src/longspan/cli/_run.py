"""Run lines into a folder with a progress bar; Ctrl-C keeps what is finished."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..eval.jobs import Listener
from ..eval.rows import RowFile, read_rows
from ._console import LineProgress, errors, progress_bar

__all__ = ["INTERRUPTED", "Outcome", "run_lines"]

INTERRUPTED = 130  # exit code of a program that Ctrl-C ended


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a run: rows in order, sentences about what is missing, exit code."""

    rows: list[Mapping[str, Any]]
    notes: list[str]
    exit_code: int


def run_lines(folder: Path, num_lines: int, work: Callable[[RowFile, Listener], object]) -> Outcome:
    """Call `work(rows, listener)`; rows go to `folder`/rows.jsonl.

    On Ctrl-C the finished rows stay and the outcome says how to go on. A run that was refused
    before its first row leaves no folder.
    """
    exit_code = 0
    with _store(folder) as rows, progress_bar() as bar:
        listener = LineProgress(bar, num_lines)
        num_before = len(rows.rows)
        try:
            work(rows, listener)
        except KeyboardInterrupt:
            exit_code = INTERRUPTED
            # A row may be on the disk whose end the listener has not been told.
            known = {row["key"] for row in listener.rows}
            new = read_rows(rows.path)[num_before:]
            listener.rows += [row for row in new if row["key"] not in known]
    notes = list(listener.refused)
    if exit_code:
        state = f"Interrupted: {len(listener.rows)} of {num_lines} lines are finished and kept."
        notes.append(state)
        errors.print(f"{state} To go on: the same command with --out {folder}", soft_wrap=True)
    return Outcome(rows=listener.rows, notes=notes, exit_code=exit_code)


@contextlib.contextmanager
def _store(folder: Path) -> Iterator[RowFile]:
    is_new = not folder.exists()
    with RowFile(folder / "rows.jsonl") as rows:
        try:
            yield rows
        finally:
            if is_new and not rows.rows:
                _remove(folder)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):  # whatever is not empty stays
        (folder / "rows.jsonl").unlink()
        folder.rmdir()
        if folder.parent == Path("runs"):
            folder.parent.rmdir()
