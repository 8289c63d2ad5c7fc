"""Benchmark rows as a terminal table, a picture, a web page and the table of the README.

No measuring here: every number is a view of stored rows. Rows that were not verified are
marked, drawn hollow, and left out of the README.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ConfigError, MissingExtraError
from ..eval.report.numbers import MISSING, count_text, ratio_text, seconds_text, value_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["Crossover", "bench_tables", "crossovers", "draw", "readme_table", "write_bench_page"]

Row = Mapping[str, Any]
_COLOURS = ("#1a1f27", "#2563eb", "#d97706", "#0f9a6c", "#b832cf", "#0e8fb3", "#d83a3a", "#7a7a14")
_INK = "#010203"  # replaced by the page's text colour where a picture is inlined


class Crossover(NamedTuple):
    """Where a mechanism begins to be faster than the best exact attention.

    length: shortest length, interpolated between measurements, from which on it is faster at every
    longer length that was measured; None if it is not faster at the longest.
    """

    label: str
    pass_name: str
    head_dim: int
    length: float | None


def _timed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("ms_p50") is not None]


def _groups(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows by (pass, head_dim)."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["pass"], row["head_dim"]), []).append(row)
    return groups


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by label, each by growing length, the baseline first."""
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (not row["is_baseline"], row["length"])):
        lines.setdefault(row["label"], []).append(row)
    return lines


def crossovers(rows: Sequence[Row]) -> list[Crossover]:
    """One crossover length for each mechanism, pass and head size."""
    result = []
    for (pass_name, head_dim), group in _groups(_timed(rows)).items():
        for label, line in _lines(group).items():
            if not line[0]["is_baseline"]:
                result.append(Crossover(label, pass_name, head_dim, _crossover(line)))
    return result


def _crossover(line: Sequence[Row]) -> float | None:
    ahead = None  # the shortest measured length from which on it is faster
    for row in reversed(line):
        if row["speedup"] <= 1.0:
            if ahead is None:
                return None
            # Straight line between the two measurements, in logarithms of length and speed-up.
            low, high = math.log(row["speedup"]), math.log(ahead["speedup"])
            share = -low / (high - low)
            return float(row["length"] * (ahead["length"] / row["length"]) ** share)
        ahead = row
    return float(line[0]["length"])


def _milliseconds(row: Row) -> str:
    if row.get("ms_p50") is None:
        return str(row.get("refusal") or MISSING)
    return seconds_text(row["ms_p50"] / 1000)


def bench_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """For each pass and head size: time, ratio to exact attention, error, whether verified."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape as escape_markup
    from rich.table import Table

    for (pass_name, head_dim), group in _groups(rows).items():
        title = f"{pass_name}, head dim {head_dim}"
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
        table.title_style = table.header_style = "bold"
        table.add_column("attention", style="cyan", overflow="fold")
        for heading in ("length", "median", "speed-up", "max error", "verified"):
            table.add_column(heading, justify="right")
        for row in group:
            table.add_row(
                escape_markup(row["label"]),
                count_text(row["length"]),
                escape_markup(_milliseconds(row)),
                ratio_text(row.get("speedup")),
                value_text(row.get("max_abs_error"), 2),
                "yes" if row["verified"] else "[red]no[/]",
            )
        yield table


def crossover_lines(rows: Sequence[Row]) -> list[str]:
    """One sentence for each crossover."""
    sentences = []
    for label, pass_name, head_dim, length in crossovers(rows):
        where = f"{label}, {pass_name}, head dim {head_dim}"
        shortest = min(row["length"] for row in _timed(rows))
        if length is None:
            sentences.append(f"{where}: exact attention is faster at all measured lengths.")
        elif length <= shortest:
            sentences.append(f"{where}: faster than exact attention at all measured lengths.")
        else:
            sentences.append(
                f"{where}: faster than exact attention from about {value_text(length, 2)} tokens."
            )
    return sentences


def readme_table(rows: Sequence[Row]) -> str:
    """Verified rows as a Markdown table: lengths across, median time and ratio in the cells."""
    good = [row for row in _timed(rows) if row["verified"]]
    if not good:
        return "No verified rows.\n"
    lengths = sorted({row["length"] for row in good})
    head = ["attention", "pass", "head dim", *(count_text(n) for n in lengths)]
    out = ["| " + " | ".join(head) + " |", "|---|---|---:|" + "---:|" * len(lengths)]
    for (pass_name, head_dim), group in _groups(good).items():
        for label, line in _lines(group).items():
            cells = {row["length"]: row for row in line}
            texts = [_readme_cell(cells[n]) if n in cells else MISSING for n in lengths]
            out.append(f"| `{label}` | {pass_name} | {head_dim} | " + " | ".join(texts) + " |")
    first = good[0]
    out.append("")
    out.append(
        f"Median times on {first.get('device')}, {first['dtype']}, batch {first['batch']}, "
        f"{first['heads']} heads, causal, torch {first.get('torch')}; in brackets: how many times "
        "faster than the best exact attention in the same run."
    )
    return "\n".join(out) + "\n"


def _readme_cell(row: Row) -> str:
    text = seconds_text(row["ms_p50"] / 1000).replace("\u00a0", " ")
    return text if row["is_baseline"] else f"{text} ({ratio_text(row['speedup'])})"


def draw(rows: Sequence[Row], path: str | os.PathLike[str]) -> Path:
    """A picture (.png or .svg, by the name's ending) of time against length.

    The same rows give the same bytes with the same matplotlib.
    """
    target = Path(path)
    if target.suffix not in (".png", ".svg"):
        raise ConfigError(
            f"path: {target.name} came. Allowed: a name ending in .png or .svg. Change the ending."
        )
    _save(rows, target, target.suffix[1:], ink=_COLOURS[0], facecolor="white")
    return target


def _save(rows: Sequence[Row], target: Any, kind: str, *, ink: str, **settings: Any) -> None:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingExtraError.for_module("drawing", str(error.name), "report") from error
    style = {
        "svg.hashsalt": "longspan",
        "svg.fonttype": "none",
        "font.size": 9.5,
        **dict.fromkeys(
            ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], ink
        ),
    }
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with mpl.rc_context(style):
        figure = _figure(_timed(rows), ink)
        figure.savefig(target, format=kind, dpi=160, metadata=metadata, **settings)


def _figure(rows: Sequence[Row], ink: str) -> Figure:
    """One plot per pass and head size, side by side."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    groups = _groups(rows)
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(_lines(rows))}
    colours = {label: ink if i == 0 else c for i, (label, c) in enumerate(colours.items())}
    figure = Figure(figsize=(5.2 * max(1, len(groups)), 3.7), layout="constrained")
    for index, ((pass_name, head_dim), group) in enumerate(groups.items(), start=1):
        axes = figure.add_subplot(1, len(groups), index)
        for label, line in _lines(group).items():
            x, y = [r["length"] for r in line], [r["ms_p50"] for r in line]
            axes.plot(x, y, color=colours[label], linewidth=1.8, label=label)
            for row in line:
                axes.plot(
                    row["length"],
                    row["ms_p50"],
                    "o",
                    color=colours[label],
                    markersize=4.5,
                    markerfacecolor=colours[label] if row["verified"] else "none",
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        lengths = sorted({row["length"] for row in group})
        axes.set_xticks(lengths, [count_text(n) for n in lengths], rotation=30, ha="right")
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("length, tokens")
        axes.set_ylabel("median time, ms")
        axes.set_title(f"{pass_name}, head dim {head_dim}", fontsize=10)
        axes.grid(True, color="#8899aa", alpha=0.25, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8.5)
    return figure


def write_bench_page(rows: Sequence[Row], path: str | os.PathLike[str]) -> Path:
    """One self-contained HTML file: picture, crossover lengths, all rows, environment."""
    buffer = io.StringIO()
    _save(rows, buffer, "svg", ink=_INK, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    cells = "".join(
        "<tr><th>{}</th><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>".format(
            *map(
                escape,
                [
                    row["label"],
                    row["pass"],
                    str(row["head_dim"]),
                    count_text(row["length"]),
                    _milliseconds(row),
                    ratio_text(row.get("speedup")),
                    "yes" if row["verified"] else "no",
                ],
            )
        )
        for row in rows
    )
    notes = "".join(f"<li>{escape(line)}</li>" for line in crossover_lines(rows))
    shared = {
        name: value
        for name, value in rows[0].items()
        if all(row.get(name) == value for row in rows) and value not in (None, "", {}, [])
    }
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in shared.items()
    )
    page = _PAGE.format(svg=svg, cells=cells, notes=notes, facts=facts)
    target = Path(path).absolute()
    target.write_text(page, encoding="utf-8")
    return target


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>longspan bench</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ max-width: 1100px; margin: 0 auto; padding: 32px 22px 60px;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }}
h1 {{ font-size: 24px; }} h2 {{ font-size: 17px; margin-top: 30px; }}
svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 5px 12px; text-align: right; border-bottom: 1px solid #8894a540; }}
th:first-child {{ text-align: left; padding-left: 0; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; }} dd {{ margin: 0; }}
</style></head><body>
<h1>Time against length</h1>
<p>Causal attention alone, against the fastest exact kernel of torch in the same run. Both axes are
logarithmic; hollow points failed their check against the reference and should not be used.</p>
{svg}
<h2>From where it is faster</h2><ul>{notes}</ul>
<h2>All rows</h2>
<table><thead><tr><th>attention</th><th>pass</th><th>head dim</th><th>length</th><th>median</th>
<th>speed-up</th><th>verified</th></tr></thead><tbody>{cells}</tbody></table>
<h2>Settings and environment</h2><dl>{facts}</dl>
</body></html>
"""
