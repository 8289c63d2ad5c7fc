"""A picture and one self-contained page from the rows of `convolution_profile`."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, MissingExtraError
from .convolution import summary
from .report.numbers import percent_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["convolution_headlines", "draw_convolution", "write_convolution_page"]

Row = Mapping[str, Any]

_PANELS = (
    ("window", "window and sinks alone"),
    ("toeplitz", "one Toeplitz kernel"),
    ("toeplitz_window", "window, sinks, one kernel"),
    ("offsets_window", "window, sinks, kernel, offsets"),
)
_LEAST_SHARE = 0.1  # of heads that must be saved for a Toeplitz tail to be worth using


def convolution_headlines(rows: Sequence[Row]) -> list[str]:
    """How many heads each model reproduces, and the verdict."""
    if not rows:
        raise ConfigError("rows: none came. Allowed: rows of convolution_profile.")
    facts = summary([dict(row) for row in rows])
    limit = rows[0]["max_tv"]
    lines = [
        f"{int(facts['heads'])} heads; a head passes if the 95 % quantile of its total variation "
        f"distance is at most {limit:g}.",
        f"Window and sinks alone: {percent_text(facts['pass_window'])} pass, median distance "
        f"{facts['median_window']:.2f}.",
    ]
    labels = {
        "toeplitz": "One Toeplitz kernel, nothing exact",
        "toeplitz_window": "Window, sinks and one kernel",
        "offsets_window": "Window, sinks, kernel and offsets",
        "means_window": "Window, sinks and the closed form from means",
        "paper": "The paper's 16 bases, nothing exact",
    }
    for name, label in labels.items():
        if f"pass_{name}" in facts:
            lines.append(
                f"{label}: {percent_text(facts[f'pass_{name}'])} pass, median "
                f"{facts[f'median_{name}']:.2f}."
            )
    verdict = "worth using here" if facts["saved"] >= _LEAST_SHARE else "not worth using here"
    lines.append(
        f"Heads that pass with a Toeplitz tail and fail without: {percent_text(facts['saved'])}; "
        f"below {percent_text(_LEAST_SHARE)} the tail is dropped: {verdict}."
    )
    return lines


def draw_convolution(rows: Sequence[Row], path: str | os.PathLike[str]) -> Path:
    """A picture (.png or .svg, by the name's ending): distance by layer, head and model.

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


def write_convolution_page(rows: Sequence[Row], path: str | os.PathLike[str]) -> Path:
    """One HTML file without scripts and without anything beside it: picture and all numbers."""
    buffer = io.StringIO()
    _figure(rows).savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    svg = buffer.getvalue()
    names = [n for n in rows[0] if isinstance(rows[0][n], float) and n not in ("max_tv",)]
    head = "".join(f"<th>{escape(n)}</th>" for n in ("layer", "head", *names, "bases needed"))
    body = "".join(
        f"<tr><td>{row['layer']}</td><td>{row['head']}</td>"
        + "".join(f"<td>{row[n]:.3f}</td>" for n in names)
        + f"<td>{row['bases_needed'] or 'more'}</td></tr>"
        for row in rows
    )
    lines = "".join(f"<li>{escape(line)}</li>" for line in convolution_headlines(rows))
    target = Path(path)
    page = _PAGE.format(lines=lines, svg=svg[svg.index("<svg") :], head=head, body=body)
    target.write_text(page, encoding="utf-8")
    return target


def _figure(rows: Sequence[Row]) -> Figure:
    """A map for each model: layers down, heads across; 0 equals the exact weights."""
    if not rows:
        raise ConfigError("rows: none came. Allowed: rows of convolution_profile.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError.for_module("drawing", str(error.name), "report") from error
    layers = sorted({row["layer"] for row in rows})
    heads = max(row["head"] for row in rows) + 1
    figure = Figure(figsize=(3.6 * len(_PANELS) + 0.8, 3.8), layout="constrained")
    grid = figure.subplots(1, len(_PANELS), squeeze=False)[0]
    for axes, (name, title) in zip(grid, _PANELS, strict=True):
        table = [[float("nan")] * heads for _ in layers]
        for row in rows:
            table[layers.index(row["layer"])][row["head"]] = row[name]
        mesh = axes.pcolormesh(
            table, vmin=0.0, vmax=1.0, cmap="viridis_r", edgecolors="white", linewidth=0.3
        )
        axes.set_title(title, fontsize=9.5)
        axes.set_xlabel("head")
        axes.set_ylabel("attention call")
        axes.invert_yaxis()
    figure.colorbar(mesh, ax=list(grid), label="total variation, 95 % quantile", shrink=0.85)
    return figure


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>longspan profile: how convolution-like each head is</title>
<style>
:root {{ color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1a1f27; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --page: #11151b; --card: #1a2029; --ink: #e9edf3; }}
}}
body {{
  margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif;
}}
main {{ max-width: 1180px; margin: 0 auto; padding: 40px 24px 64px; }}
h1 {{ margin: 0 0 14px; font-size: 25px; font-weight: 620; }}
.card {{
  background: var(--card); border-radius: 12px; padding: 20px 22px; margin: 20px 0;
  overflow-x: auto;
}}
.picture {{ background: #fff; }}
svg {{ display: block; width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 4px 8px; text-align: right; }}
</style>
</head>
<body>
<main>
<h1>How convolution-like each head is</h1>
<ul>{lines}</ul>
<p>Total variation distance between exact and modelled weights of a row: 0 is equal, 1 is
disjoint. The output of a row is off by at most twice that times the radius of the values.</p>
<div class="card picture">{svg}</div>
<details class="card"><summary>All numbers</summary>
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
</details>
</main>
</body>
</html>
"""
