"""A study's report: one structure, shown as a self-contained HTML page and as Markdown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..eval.report.svg import NUM_COLOURS

__all__ = ["Report", "Section", "Table", "Verdict", "render_html", "render_markdown", "write_html"]

VERDICTS = ("reproduced", "partly", "not reproduced", "not measured")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A claim, what became of it (one of VERDICTS), and the numbers."""

    claim: str
    outcome: str
    numbers: str

    def __post_init__(self) -> None:
        assert self.outcome in VERDICTS, self.outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Texts: the first column names its line."""

    head: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A heading, a caption, and a picture or a table or both. legend: (label, colour)."""

    heading: str
    caption: str
    svg: str | None = None
    legend: Sequence[tuple[str, int]] = ()
    table: Table | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a study found."""

    name: str
    question: str
    headline: str
    verdicts: Sequence[Verdict]
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    differences: Sequence[str]
    command: str
    environment: Sequence[tuple[str, str]] = field(default=())


def render_html(report: Report) -> str:
    """One page without scripts and without anything beside it."""
    from jinja2 import Environment
    from markupsafe import Markup

    here = files(__package__)
    style = files("longspan.eval.report").joinpath("style.css").read_text(encoding="utf-8")
    source = here.joinpath("report.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True).from_string(source)
    return template.render(report=report, style=Markup(style), markup=Markup, colours=NUM_COLOURS)


def write_html(report: Report, path: str | os.PathLike[str]) -> Path:
    """Write the page; it appears whole or not at all. Returns the absolute path."""
    return _write(Path(path).absolute(), render_html(report))


def render_markdown(report: Report) -> str:
    """The same for the documentation: verdicts, tables and notes; pictures are in the page."""
    parts = [
        f"# {report.question}",
        f"{report.headline}\n\n[The report with its plots]({report.name}.html)",
        "## Verdicts",
        _markdown_table(
            Table(
                head=("claim", "verdict", "what we saw"),
                lines=[(v.claim, f"**{v.outcome}**", v.numbers) for v in report.verdicts],
            )
        ),
    ]
    for section in report.sections:
        if section.table is not None:
            parts += [f"## {section.heading}", section.caption, _markdown_table(section.table)]
    parts += ["## What differs from the paper", _bullets(report.differences)]
    parts += ["## Run it again", f"```\n{report.command}\n```"]
    parts += ["## Setting", _bullets([f"{name}: {value}" for name, value in report.facts])]
    if report.environment:
        parts.append(_bullets([f"{name}: {value}" for name, value in report.environment]))
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|---" + "|---:" * (len(table.head) - 1) + "|"
    return "\n".join([line(table.head), rule, *(line(cells) for cells in table.lines)])


def _bullets(texts: Sequence[Any]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _write(target: Path, text: str) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return target
