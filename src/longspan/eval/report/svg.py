"""Line, scatter and bar plots as inline SVG that takes its colours from the page's style sheet.

Colours are CSS variables (`--c0` ... `--c7`, `--ink`, `--muted`, `--grid`), so that one file reads
well on light and dark pages. Labels are placed so that they do not overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["NUM_COLOURS", "Series", "bar_plot", "line_plot", "nice_ticks", "scatter_plot"]

NUM_COLOURS = 8
_WIDTH, _HEIGHT = 520.0, 280.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 16.0, 28.0, 44.0
_CHARACTER = 7.0  # mean width of a character at 12 px, for placing labels


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Named points in one colour (an index into the palette)."""

    label: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from at or below `low` to at or above `high`."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return [0.0, 1.0]
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


class _Frame:
    """Maps data to the drawing area and draws grid, tick labels and axis titles."""

    def __init__(
        self,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        x_title: str,
        y_title: str,
        x_text: Callable[[float], str],
        y_text: Callable[[float], str],
    ) -> None:
        """The drawing area spans the ticks: give ticks that cover the data."""
        self.x_low, self.x_high = x_ticks[0], x_ticks[-1]
        self.y_low, self.y_high = y_ticks[0], y_ticks[-1]
        self.parts: list[str] = []
        bottom = _HEIGHT - _BOTTOM
        for tick in y_ticks:
            y = self.y(tick)
            kind = "zero" if tick == 0 else "grid"
            self.add(
                f'<line class="{kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" {_at(y1=y, y2=y)}/>'
            )
            self.text(_LEFT - 8, y + 4, y_text(tick), anchor="end")
        for tick in x_ticks:
            x = self.x(tick)
            self.add(f'<line class="tick" {_at(x1=x, x2=x, y1=bottom, y2=bottom + 4)}/>')
            self.text(x, bottom + 18, x_text(tick), anchor="middle")
        self.text(_LEFT - 8, _TOP - 12, y_title, anchor="start", kind="title")
        self.text(_WIDTH - _RIGHT, _HEIGHT - 6, x_title, anchor="end", kind="title")

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def add(self, part: str) -> None:
        self.parts.append(part)

    def text(self, x: float, y: float, text: str, *, anchor: str, kind: str = "label") -> None:
        self.add(
            f'<text class="{kind}" {_at(x=x, y=y)} text-anchor="{anchor}">{escape(text)}</text>'
        )

    def svg(self, description: str) -> str:
        return _svg(self.parts, _HEIGHT, description)


def _svg(parts: Iterable[str], height: float, description: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH:g} {height:g}" role="img" '
        f'aria-label="{escape(description, quote=True)}">{"".join(parts)}</svg>'
    )


def _at(**places: float) -> str:
    return " ".join(f'{name}="{value:.1f}"' for name, value in places.items())


def _colour(index: int) -> str:
    return f'style="--c:var(--c{index % NUM_COLOURS})"'


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def line_plot(
    series: Sequence[Series],
    *,
    x_title: str,
    y_title: str,
    x_ticks: Sequence[float],
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    from_zero: bool = False,
) -> str:
    """Lines; values that are not finite break a line. `from_zero` keeps 0 on the y axis."""
    ys = _finite(y for one in series for y in one.y) or [0.0, 1.0]
    if from_zero:
        ys.append(0.0)
    frame = _Frame(
        x_ticks,
        nice_ticks(min(ys), max(ys), 5),
        x_title,
        y_title,
        x_text,
        y_text,
    )
    for one in series:
        for run in _runs(one):
            points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in run)
            shape = f'<polyline points="{points}"/>'
            if len(run) == 1:
                shape = f'<circle {_at(cx=frame.x(run[0][0]), cy=frame.y(run[0][1]))} r="3"/>'
            frame.add(f'<g class="series" {_colour(one.colour)}>{_title(one.label)}{shape}</g>')
    return frame.svg(f"{y_title} against {x_title}")


def _runs(one: Series) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(one.x, one.y, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def scatter_plot(
    series: Sequence[Series],
    *,
    x_title: str,
    y_title: str,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
) -> str:
    """One labelled point per series, zero on both axes."""
    shown = [one for one in series if _finite([*one.x[:1], *one.y[:1]]) and math.isfinite(one.y[0])]
    xs, ys = [one.x[0] for one in shown] or [1.0], [one.y[0] for one in shown] or [1.0]
    frame = _Frame(
        nice_ticks(0.0, max(*xs, 1e-9), 6),
        nice_ticks(min(0.0, *ys), max(*ys, 1e-9), 5),
        x_title,
        y_title,
        x_text,
        y_text,
    )
    centres = [(frame.x(one.x[0]), frame.y(one.y[0])) for one in shown]
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in centres]
    for one, (x, y) in zip(shown, centres, strict=True):
        text = f"{one.label}: {x_text(one.x[0])}, {y_text(one.y[0])}"
        frame.add(
            f'<g class="series" {_colour(one.colour)}>{_title(text)}'
            f'<circle {_at(cx=x, cy=y)} r="5.5"/></g>'
        )
        _place_label(frame, one.label, x, y, taken)
    return frame.svg(f"{y_title} against {x_title}")


def _place_label(
    frame: _Frame, label: str, x: float, y: float, taken: list[tuple[float, float, float, float]]
) -> None:
    """Write a point's label beside, above or below it, where that is free and inside the plot."""
    width = _CHARACTER * len(label)
    places = [(x + 10, y + 4), (x - 10 - width, y + 4)]
    for rise in (16, -16, 30, -30):
        places += [
            (x - width / 2, y + 4 - rise),
            (x + 8, y + 4 - rise),
            (x - 8 - width, y + 4 - rise),
        ]
    for left, base in places:
        box = (left, base - 11, left + width, base + 3)
        inside = box[0] >= _LEFT and box[2] <= _WIDTH and box[1] >= _TOP - 4
        if inside and box[3] <= _HEIGHT - _BOTTOM and not any(_overlap(box, b) for b in taken):
            frame.text(left, base, label, anchor="start", kind="name")
            taken.append(box)
            return
    # No room: the legend says which point it is.


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def bar_plot(bars: Sequence[tuple[str, int, float | None, str]]) -> str:
    """Horizontal bars from zero, the name above each: (label, colour, value, text)."""
    step, top = 37.0, 2.0
    largest = max([value for _, _, value, _ in bars if value is not None] or [1.0]) or 1.0
    room = _WIDTH - _CHARACTER * max((len(text) for *_, text in bars), default=0) - 14
    height = top + step * len(bars)
    parts = []
    for index, (label, colour, value, text) in enumerate(bars):
        y = top + step * index
        width = max(1.5, room * value / largest) if value is not None else 0.0
        parts.append(
            f'<text class="name" {_at(x=0, y=y + 12)}>{escape(label)}</text>'
            f'<g class="series" {_colour(colour)}>{_title(f"{label}: {text}")}'
            f'<rect {_at(x=0, y=y + 17, width=width)} height="13" rx="2.5"/></g>'
            f'<text class="label" {_at(x=width + 7, y=y + 28)}>{escape(text)}</text>'
        )
    return _svg(parts, height, ", ".join(f"{label}: {text}" for label, _, _, text in bars))
