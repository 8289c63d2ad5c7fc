"""One self-contained HTML page from the rows of a comparison."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import ConfigError
from .columns import COLUMNS, headline, is_busy, lowest_cpu_share
from .numbers import (
    bytes_text,
    count_text,
    percent_text,
    ratio_text,
    seconds_text,
    signed_text,
    value_text,
)
from .svg import NUM_COLOURS, Series, bar_plot, line_plot, scatter_plot

__all__ = ["render_page", "write_page"]

Row = Mapping[str, Any]

# Values that rows carry as results; everything else that all rows share is setting or environment.
_RESULTS = {
    "key", "label", "mechanism", "config", "layers", "loss", "perplexity", "loss_change",
    "loss_change_error", "perplexity_ratio", "kl", "top1", "edges", "loss_by_position",
    "kl_by_position", "prefill_seconds", "prefill_runs", "prefill_ratio", "cpu_share", "peak_bytes",
    "peak_method", "visited_fraction", "num_patched_layers", "approximate_calls",
    "exact_calls", "kind", "command", "time",
}  # fmt: skip


class _Line(NamedTuple):
    label: str
    colour: int
    cells: list[str]


class _Plot(NamedTuple):
    heading: str
    caption: str
    svg: Any
    legend: list[_Line]


def render_page(rows: Sequence[Row], *, notes: Sequence[str] = ()) -> str:
    """The page as a string: no scripts, no files or addresses beside it.

    Args:
        rows: rows of `longspan.eval.compare`, exact attention first.
        notes: sentences added to "How it was measured", e.g. what was left out and why.

    Raises:
        ConfigError: no rows, or the first is not exact attention.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    if not rows or rows[0]["mechanism"] != "exact":
        raise ConfigError(
            f"rows: {len(rows)} came, the first not of exact attention. Allowed: rows of one "
            "comparison, exact first. Pass what longspan.eval.compare returned."
        )
    lines = [
        _Line(row["label"], _colour(index), [column.cell(row) for column in COLUMNS])
        for index, row in enumerate(rows)
    ]
    plots = [plot._replace(svg=Markup(plot.svg)) for plot in _plots(rows, lines)]
    source = files(__package__).joinpath("compare.html.j2").read_text(encoding="utf-8")
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True).from_string(source)
    return template.render(
        style=Markup(style),
        model=rows[0]["model"],
        length=count_text(rows[0]["length"]),
        headline=headline(rows),
        facts=_facts(rows),
        columns=COLUMNS,
        lines=lines,
        plots=plots,
        notes=[*_notes(rows), *notes],
        command=rows[-1].get("command", "longspan compare"),
        environment=_environment(rows),
    )


def write_page(
    rows: Sequence[Row], path: str | os.PathLike[str], *, notes: Sequence[str] = ()
) -> Path:
    """Write the page to `path`; it appears whole or not at all. Returns the absolute path."""
    target = Path(path).absolute()
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    text = render_page(rows, notes=notes)
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, target)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise ConfigError(
            f"out: the report could not be written to {target} ({error.strerror}). Allowed: a "
            "folder with free space. The rows are kept: run the same command again."
        ) from error
    return target


def _colour(index: int) -> int:
    return index % NUM_COLOURS


def _facts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    first = rows[0]
    patched = {str(row["layers"]) for row in rows[1:]}
    facts = [
        ("model", str(first["model"])),
        ("text", str(first.get("text", "?"))),
        ("tokens", count_text(first["length"])),
        ("device", str(first.get("device") or first["device_type"])),
        ("dtype", str(first["dtype"])),
        ("layers", ", ".join(sorted(patched)) or "none patched"),
        ("finished", _when(max(str(row.get("time", "")) for row in rows))),
    ]
    return facts


def _when(stamp: str) -> str:
    """An ISO time stamp in UTC as people write it, to the minute."""
    return f"{stamp[:10]} {stamp[11:16]} UTC" if len(stamp) >= 16 else "?"


def _centres(row: Row) -> list[float]:
    edges = row["edges"]
    return [(low + high) / 2 for low, high in itertools.pairwise(edges)]


def _tokens(value: float) -> str:
    return count_text(value)


def _plots(rows: Sequence[Row], lines: Sequence[_Line]) -> list[_Plot]:
    legend = list(lines)
    exact, others = rows[0], rows[1:]
    by_position = [
        Series(label=row["label"], colour=line.colour, x=_centres(row), y=row["loss_by_position"])
        for row, line in zip(rows, lines, strict=True)
    ]
    plots = []
    if others:
        plots.append(
            _Plot(
                "Quality against work",
                "Change of perplexity and share of the scores that were computed. Lower left is "
                "better: less work, less harm.",
                scatter_plot(
                    [
                        Series(
                            label=row["label"],
                            colour=line.colour,
                            x=[100 * row["visited_fraction"]],
                            y=[100 * (row["perplexity_ratio"] - 1)],
                        )
                        for row, line in zip(rows, lines, strict=True)
                    ],
                    x_title="scores visited, %",
                    y_title="change of perplexity, %",
                    x_text=lambda v: f"{v:g}",
                    y_text=lambda v: f"{v:g}" if abs(v) < 1e4 else f"{v:.0e}",
                ),
                legend,
            )
        )
        plots.append(_change_plot(exact, others, lines[1:]))
    plots.append(
        _Plot(
            "Loss by position",
            f"Mean loss over stretches of about {_stretch(exact)} tokens; most of its ups and "
            "downs are the text, and shared by all.",
            line_plot(
                by_position,
                x_title="position in the text, tokens",
                x_ticks=_position_ticks(exact["length"]),
                y_title="loss, nats per token",
                x_text=_tokens,
                y_text=lambda v: f"{v:g}",
            ),
            legend if others else [],
        )
    )
    plots.append(_cost_plot(rows, lines))
    return plots


def _position_ticks(length: int) -> list[float]:
    """Quarters of the length where they are whole, which powers of two are; else its two ends."""
    parts = next((count for count in (4, 5, 3, 2) if length % count == 0), 1)
    return [length * i / parts for i in range(parts + 1)]


def _stretch(row: Row) -> str:
    return count_text(round((row["edges"][-1] - row["edges"][0]) / len(row["loss_by_position"])))


def _change_plot(exact: Row, others: Sequence[Row], lines: Sequence[_Line]) -> _Plot:
    series = [
        Series(
            label=row["label"],
            colour=line.colour,
            x=_centres(row),
            y=[
                a - b
                for a, b in zip(row["loss_by_position"], exact["loss_by_position"], strict=True)
            ],
        )
        for row, line in zip(others, lines, strict=True)
    ]
    svg = line_plot(
        series,
        x_title="position in the text, tokens",
        x_ticks=_position_ticks(exact["length"]),
        y_title="loss minus exact, nats per token",
        x_text=_tokens,
        y_text=lambda v: f"{v:g}",
        from_zero=True,
    )
    caption = (
        "Loss by position minus that of exact attention: above zero, the mechanism predicts the "
        "text worse there."
    )
    return _Plot("What it costs, by position", caption, svg, list(lines))


def _cost_plot(rows: Sequence[Row], lines: Sequence[_Line]) -> _Plot:
    bars = [
        (
            row["label"],
            line.colour,
            row["prefill_seconds"],
            f"{seconds_text(row['prefill_seconds'])} ({ratio_text(row['prefill_ratio'])})",
        )
        for row, line in zip(rows, lines, strict=True)
    ]
    svg = bar_plot(bars)
    caption = "Time to read all tokens at once, and its ratio to exact attention."
    if is_busy(rows):
        caption += " The machine was busy with other work: take times with care."
    if any(row["peak_bytes"] is not None for row in rows):
        memory = [
            (row["label"], line.colour, row["peak_bytes"], bytes_text(row["peak_bytes"]))
            for row, line in zip(rows, lines, strict=True)
        ]
        svg += "<h2>Peak memory</h2><p>Memory added while reading.</p>"
        svg += bar_plot(memory)
    return _Plot("Prefill time", caption, svg, [])


def _notes(rows: Sequence[Row]) -> list[str]:
    exact, others = rows[0], rows[1:]
    runs = sorted({row["prefill_runs"] for row in rows})
    timing = (
        "Each prefill was timed once, after a short warm-up: expect a few per cent of noise, more "
        "on a busy machine."
        if runs == [1]
        else f"Prefill times are medians of {runs[0]} to {runs[-1]} runs after a short warm-up."
        if runs[0] != runs[-1]
        else f"Prefill times are medians of {runs[0]} runs after a short warm-up."
    )
    notes = [
        "All lines read the same tokens in one forward pass; the first token is not scored.",
        timing,
        f"Peak memory: {exact['peak_method']}.",
    ]
    if is_busy(rows):
        notes.append(
            f"The machine was busy with other work: at its worst the process got "
            f"{percent_text(lowest_cpu_share(rows))} of its threads' time. Take times and ratios "
            "with care, or run again on an idle machine."
        )
    for row in others:
        error = row["loss_change_error"]
        spread = f" ± {value_text(error, 2)}" if error is not None and math.isfinite(error) else ""
        layers = f"{row['num_patched_layers']} of {row['num_layers']} layers"
        notes.append(
            f"{row['label']}: {layers} replaced; loss {value_text(row['loss'], 4)}, "
            f"{signed_text(row['loss_change'])}{spread} nats per token against exact."
        )
    if others:
        notes.append("The number after ± is the standard error of that change over stretches.")
    if any(row["prefill_ratio"] > 1 for row in others):
        notes.append(
            "A mechanism that computes fewer scores can still take longer than exact attention at "
            "short lengths: attention is then a small part of the work, and the exact kernel is "
            "highly tuned."
        )
    return notes


def _environment(rows: Sequence[Row]) -> list[tuple[str, str]]:
    pairs = []
    for name in rows[0]:
        values = {json.dumps(row.get(name)) for row in rows}
        if name not in _RESULTS and len(values) == 1 and rows[0][name] not in (None, "", {}, []):
            value = rows[0][name]
            pairs.append((name.replace("_", " "), value if isinstance(value, str) else str(value)))
    configs = [
        (row["label"], ", ".join(f"{k}={v}" for k, v in row["config"].items()))
        for row in rows
        if row["config"]
    ]
    return [*configs, *pairs]
