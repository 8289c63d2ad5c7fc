"""Pictures and one self-contained page from the rows of `span_profile`."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, MissingExtraError
from .report.numbers import count_text, percent_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_spans", "span_headlines", "write_span_page"]

Row = Mapping[str, Any]

_MAX_LABELLED_CELLS = 160  # numbers inside more cells than this cannot be read


def span_headlines(rows: Sequence[Row]) -> list[str]:
    """One sentence per profile and threshold: the span of the middle head, and of the farthest."""
    lines = []
    for (label, threshold), group in _panels(rows).items():
        spans = [row["p50"] for row in group]
        what = "stick" if group[0]["mechanism"] == "stick_breaking" else "softmax mass"
        lines.append(
            f"{label}: less than {_share(threshold)} of the {what} is left after "
            f"{_keys(median(spans))} in the middle head and {count_text(max(spans))} in the "
            f"farthest, of {count_text(group[0]['visible'])} that a query sees."
        )
    return lines


def draw_spans(rows: Sequence[Row], path: str | os.PathLike[str]) -> Path:
    """A picture (.png or .svg, by the name's ending): median span by layer and head.

    Raises:
        ConfigError: no rows, or another ending.
    """
    target = Path(path)
    if target.suffix not in (".png", ".svg"):
        raise ConfigError(
            f"path: {target.name} came. Allowed: a name ending in .png or .svg. Change the ending."
        )
    _figure(rows).savefig(target, format=target.suffix[1:], dpi=150, facecolor="white")
    return target


def write_span_page(rows: Sequence[Row], path: str | os.PathLike[str]) -> Path:
    """One HTML file without scripts and without anything beside it: picture and all numbers."""
    buffer = io.StringIO()
    _figure(rows).savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    svg = buffer.getvalue()
    headlines = "".join(f"<li>{escape(line)}</li>" for line in span_headlines(rows))
    cells = "".join(
        f"<tr><td>{escape(_label(row))}</td><td>{row['layer']}</td><td>{row['head']}</td>"
        f"<td>{_share(row['threshold'])}</td><td>{count_text(row['p10'])}</td>"
        f"<td>{count_text(row['p50'])}</td><td>{count_text(row['p90'])}</td>"
        f"<td>{percent_text(row['unspent'])}</td></tr>"
        for row in rows
    )
    target = Path(path)
    target.write_text(
        _PAGE.format(headlines=headlines, svg=svg[svg.index("<svg") :], cells=cells),
        encoding="utf-8",
    )
    return target


def _label(row: Row) -> str:
    return str(row.get("label", row["mechanism"]))


def _share(threshold: float) -> str:
    percent = 100.0 * threshold
    return f"{percent:.0f} %" if percent >= 1 else f"{percent:.2g} %"


def _keys(count: float) -> str:
    return f"{count_text(count)} key{'' if count == 1 else 's'}"


def _panels(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    """Rows by profile and threshold, in the order they come."""
    if not rows:
        raise ConfigError("rows: none came. Allowed: rows of longspan.eval.spans.span_profile.")
    panels: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        panels.setdefault((_label(row), row["threshold"]), []).append(row)
    return panels


def _figure(rows: Sequence[Row]) -> Figure:
    """A map per profile (down) and threshold (across): colour is the median span, log scale."""
    panels = _panels(rows)
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError.for_module("drawing", str(error.name), "report") from error
    labels = list(dict.fromkeys(label for label, _ in panels))
    thresholds = list(dict.fromkeys(threshold for _, threshold in panels))
    farthest = max(max(row["visible"] for row in rows), 2.0)
    figure = Figure(figsize=(3.9 * len(thresholds) + 1.0, 3.5 * len(labels)), layout="constrained")
    grid = figure.subplots(len(labels), len(thresholds), squeeze=False)
    mesh = None
    for (label, threshold), group in panels.items():
        axes = grid[labels.index(label)][thresholds.index(threshold)]
        table = _table(group)
        mesh = axes.pcolormesh(
            [[max(cell, 1.0) for cell in line] for line in table],
            norm=LogNorm(1.0, farthest),
            cmap="viridis",
            edgecolors="white",
            linewidth=0.4,
        )
        if len(table) * len(table[0]) <= _MAX_LABELLED_CELLS:
            for y, line in enumerate(table):
                for x, cell in enumerate(line):
                    ink = "black" if cell > farthest**0.6 else "white"
                    place = (x + 0.5, y + 0.5)
                    axes.annotate(
                        count_text(cell), place, color=ink, ha="center", va="center", fontsize=7
                    )
        axes.set_title(f"{label}: rest below {_share(threshold)}", fontsize=9.5)
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.set_xticks([x + 0.5 for x in _ticks(len(table[0]))], _ticks(len(table[0])))
        axes.set_yticks([y + 0.5 for y in _ticks(len(table))], _ticks(len(table)))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.invert_yaxis()
    assert mesh is not None, "there is at least one panel"
    figure.colorbar(mesh, ax=grid.ravel().tolist(), label="median span, keys", shrink=0.8)
    return figure


def _ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, -(-count // 12))))


def _table(group: Sequence[Row]) -> list[list[float]]:
    """Median spans, layers down and heads across; layers with fewer heads end in NaN."""
    layers = max(row["layer"] for row in group) + 1
    heads = max(row["head"] for row in group) + 1
    table = [[float("nan")] * heads for _ in range(layers)]
    for row in group:
        table[row["layer"]][row["head"]] = row["p50"]
    return table


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>longspan profile: how far back each head reads</title>
<style>
:root {{
  color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --ink: #1a1f27; --muted: #667080; --grid: #e6e9ee;
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --page: #11151b; --card: #1a2029; --ink: #e9edf3; --muted: #98a3b3; --grid: #2b333f;
  }}
}}
body {{
  margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif;
}}
main {{ max-width: 1180px; margin: 0 auto; padding: 40px 24px 64px; }}
h1 {{ margin: 0 0 14px; font-size: 25px; font-weight: 620; }}
p {{ color: var(--muted); max-width: 80ch; }}
.card {{
  background: var(--card); border: 1px solid var(--grid); border-radius: 12px;
  padding: 20px 22px; margin: 20px 0; overflow-x: auto;
}}
.picture {{ background: #fff; }}
svg {{ display: block; width: 100%; height: auto; }}
table {{
  border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums;
}}
th {{ color: var(--muted); font-weight: 500; }}
th, td {{ padding: 5px 9px; text-align: right; border-bottom: 1px solid var(--grid); }}
th:first-child, td:first-child {{ text-align: left; }}
</style>
</head>
<body>
<main>
<h1>How far back each head reads</h1>
<ul>{headlines}</ul>
<p>Span: the number of nearest keys after which less than the given share of the stick (of the
softmax mass) is left for all farther ones. A head whose span is short costs little with
early_stop, whatever the length of the text.</p>
<div class="card picture">{svg}</div>
<details class="card"><summary>All numbers (10 %, 50 % and 90 % quantiles over queries)</summary>
<table><thead><tr><th>profile</th><th>layer</th><th>head</th><th>rest below</th><th>10 %</th>
<th>50 %</th><th>90 %</th><th>queries never below</th></tr></thead><tbody>{cells}</tbody></table>
</details>
</main>
</body>
</html>
"""
