"""The comparison as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .columns import COLUMNS

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["comparison_table"]


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A rich table, one line per row, in the order of the rows."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("attention", no_wrap=True, overflow="fold", style="cyan")
    for column in COLUMNS:
        table.add_column(column.heading, justify="right")
    for row in rows:
        table.add_row(row["label"], *(column.cell(row) for column in COLUMNS))
    return table
