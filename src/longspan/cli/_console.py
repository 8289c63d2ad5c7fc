"""What all commands share on the terminal: two consoles, errors, progress with time left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["LineProgress", "console", "errors", "progress_bar", "show_error", "step"]

console = Console(highlight=False)  # results
errors = Console(stderr=True, highlight=False)  # progress and messages


def show_error(message: str) -> None:
    """A message for people, without a traceback."""
    errors.print("[bold red]longspan:[/] ", end="")
    errors.print(message, markup=False, soft_wrap=True)


@contextmanager
def step(text: str) -> Iterator[None]:
    """A spinner with elapsed time while something of unknown length runs."""
    with Progress(
        TextColumn("{task.description}"), TimeElapsedColumn(), console=errors, transient=True
    ) as progress:
        progress.add_task(text, total=None)
        yield


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Bars with share done, elapsed time and time left; on stderr, gone when done."""
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
    ) as progress:
        yield progress


class LineProgress:
    """Listener of a comparison: one bar over all lines, one note per finished line."""

    def __init__(self, progress: Progress, num_lines: int) -> None:
        self.progress = progress
        self.num_lines = num_lines
        self.num_done = 0
        self.task: TaskID = progress.add_task("starting", total=float(num_lines))
        self.refused: list[str] = []
        self.rows: list[Mapping[str, Any]] = []  # of the lines that are done, in their order

    def begin(self, label: str) -> None:
        """A line of the comparison begins."""
        self.progress.update(self.task, description=label, completed=float(self.num_done))

    def advance(self, share: float) -> None:
        """This share of the line's work was done."""
        self.progress.advance(self.task, share)

    def finish(self, label: str, row: Mapping[str, Any] | None, note: str) -> None:
        """The line is done."""
        self.num_done += 1
        self.progress.update(self.task, completed=float(self.num_done))
        if row is not None:
            self.rows.append(row)
        if row is None:
            self.refused.append(f"{label} was left out: {note}")
            self.progress.console.print(f"  {label}: left out, {note}", markup=False)
        elif note:
            self.progress.console.print(f"  {label}: {note} from an earlier run", markup=False)
        else:
            seconds = row.get("prefill_seconds")
            done = f"  {label}: done" + (f", prefill {seconds:.3g} s" if seconds else "")
            self.progress.console.print(done, markup=False)
