"""The columns of the comparison table, what each means, and the sentence above it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .numbers import (
    MISSING,
    bytes_text,
    change_text,
    count_text,
    percent_text,
    ratio_text,
    seconds_text,
    value_text,
)

__all__ = ["COLUMNS", "Column", "headline"]

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column: heading, a shorter one for terminals, a row's cell, and what it means."""

    heading: str
    short: str
    cell: Callable[[Row], str]
    meaning: str


def _loss_change(row: Row) -> str:
    if row["mechanism"] == "exact" and not row["config"]:
        return MISSING
    return change_text(row["perplexity_ratio"] - 1)


def _ratio(row: Row) -> str:
    return ratio_text(row["prefill_ratio"])


def _prefill(row: Row) -> str:
    return seconds_text(row["prefill_seconds"])


COLUMNS = (
    Column(
        heading="perplexity",
        short="ppl",
        cell=lambda row: value_text(row["perplexity"], 4),
        meaning="exp of the mean loss per token (natural logarithm). Lower is better: 20 means the "
        "model is as unsure as if it chose among 20 equally likely tokens.",
    ),
    Column(
        heading="change",
        short="change",
        cell=_loss_change,
        meaning="perplexity against exact attention on the same tokens.",
    ),
    Column(
        heading="KL",
        short="KL",
        cell=lambda row: value_text(row["kl"], 2),
        meaning="mean KL divergence, in nats, from the next-token distribution under exact "
        "attention to that under this mechanism. 0 means the same predictions.",
    ),
    Column(
        heading="same top token",
        short="top-1",
        cell=lambda row: percent_text(row["top1"]),
        meaning="share of positions where both rank the same next token first.",
    ),
    Column(
        heading="scores visited",
        short="visited",
        cell=lambda row: percent_text(row["visited_fraction"]),
        meaning="share of the query-key pairs (at or before the query) that are computed, averaged "
        "over all layers, patched or not.",
    ),
    Column(
        heading="prefill",
        short="prefill",
        cell=_prefill,
        meaning="time to read all tokens at once through all layers, without the output "
        "projection.",
    ),
    Column(
        heading="\u00d7 exact",
        short="ratio",
        cell=_ratio,
        meaning="prefill time over that of exact attention in the same run; below 1 is faster.",
    ),
    Column(
        heading="peak memory",
        short="memory",
        cell=lambda row: bytes_text(row["peak_bytes"]),
        meaning="memory added during prefill, above model and inputs.",
    ),
)


def headline(rows: Sequence[Row]) -> str:
    """One sentence: which mechanism stays closest to exact attention, and what it saves."""
    exact, others = rows[0], rows[1:]
    where = f"On {count_text(exact['length'])} tokens of {exact.get('text', 'the text')}"
    if not others:
        return (
            f"{where}, {exact['model']} with exact attention has perplexity "
            f"{value_text(exact['perplexity'], 4)}."
        )
    best = min(others, key=lambda row: (math.isnan(row["kl"]), row["kl"], row["visited_fraction"]))
    return (
        f"{where}, {best['label']} stays closest to exact attention: perplexity "
        f"{value_text(best['perplexity'], 4)} against {value_text(exact['perplexity'], 4)} "
        f"({change_text(best['perplexity_ratio'] - 1)}), {percent_text(best['visited_fraction'])} "
        f"of the scores, {ratio_text(best['prefill_ratio'])} the prefill time"
        f"{' (on a busy machine)' if is_busy(rows) else ''}."
    )


def is_busy(rows: Sequence[Row]) -> bool:
    """Whether other work took much of the processor while some line was timed."""
    return lowest_cpu_share(rows) < 0.8


def lowest_cpu_share(rows: Sequence[Row]) -> float:
    """Smallest share of its threads' time that the process got; 1 where it is not recorded."""
    shares = [row.get("cpu_share") for row in rows]
    return min((share for share in shares if share is not None), default=1.0)
