"""Rows as tables for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .columns import COLUMNS
from .numbers import count_text, percent_text, value_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["comparison_table", "passkey_tables", "perplexity_table", "plain_table", "tail_table"]

Row = Mapping[str, Any]


def _table(title: str | None, *headings: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
        title=title,
        title_justify="left",
        title_style="bold",
    )
    table.add_column(headings[0], style="cyan", overflow="fold", min_width=12)
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def comparison_table(rows: Sequence[Row], *, width: int = 120) -> Table:
    """One line per row of `longspan.eval.compare`, in their order; fits 80 columns or more."""
    table = _table(None, "attention", *(column.short for column in COLUMNS))
    for row in rows:
        label = _folded(row["label"], max(12, width - 64))
        table.add_row(label, *(column.cell(row) for column in COLUMNS))
    return table


def _folded(label: str, width: int) -> str:
    """A spec in lines of at most `width` characters, broken after its colon and commas."""
    lines = [""]
    for part in re.findall(r"[^:,]*[:,]?", label):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _spec(row: Row) -> str:
    """The mechanism as a spec with all of its settings."""
    settings = ",".join(f"{name}={value}" for name, value in row["config"].items())
    return f"{row['mechanism']}:{settings}" if settings else str(row["mechanism"])


def perplexity_table(rows: Sequence[Row]) -> Table:
    """Perplexity by mechanism and number of patched layers."""
    first = rows[0]
    title = f"{count_text(first['num_tokens'])} scored tokens, window {first['window']}, "
    table = _table(
        title + f"stride {first['stride']}",
        "attention",
        "patched layers",
        "perplexity",
        "bits/byte",
    )
    for row in rows:
        table.add_row(
            _spec(row),
            count_text(row["num_patched_layers"]),
            value_text(row["perplexity"], 4),
            value_text(row["bits_per_byte"], 4),
        )
    return table


def tail_table(rows: Sequence[Row]) -> Table:
    """Loss on the tail by mechanism and length of context."""
    table = _table(
        f"loss on the last {rows[0]['tail']} tokens, nats per token",
        "attention",
        "context",
        "loss",
        "standard error",
    )
    for row in rows:
        table.add_row(
            _spec(row),
            count_text(row["context"]),
            value_text(row["loss"], 4),
            value_text(row["standard_error"], 2),
        )
    return table


def passkey_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One table per mechanism: lengths down, depths across, rates with 95 % intervals."""
    for spec in dict.fromkeys(_spec(row) for row in rows):
        own = [row for row in rows if _spec(row) == spec]
        depths = sorted({row["depth"] for row in own})
        table = _table(
            f"{spec}: keys found by generation (95 % Wilson interval), {own[0]['haystack']}",
            "tokens",
            *(f"depth {depth:g}" for depth in depths),
        )
        for length in sorted({row["length"] for row in own}):
            cells = {row["depth"]: row for row in own if row["length"] == length}
            texts = [_cell(cells[depth]) if depth in cells else "" for depth in depths]
            table.add_row(count_text(length), *texts)
        yield table


def _cell(row: Row) -> str:
    low, high = percent_text(row["found_low"]), percent_text(row["found_high"])
    return f"{row['found']}/{row['trials']} ({low} to {high})"


def plain_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """A table of texts."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        is_name = index == 0
        table.add_column(heading, style="cyan" if is_name else "", overflow="fold", no_wrap=is_name)
    for line in lines:
        table.add_row(*(escape(cell) for cell in line))
    return table
