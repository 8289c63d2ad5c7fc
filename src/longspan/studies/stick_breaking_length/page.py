"""From the rows of the study to its report; nothing is measured and no number is typed here."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from ...eval.report.numbers import (
    MISSING,
    bytes_text,
    count_text,
    percent_text,
    seconds_text,
    value_text,
)
from ...eval.report.svg import Series, line_plot
from ...eval.statistics import standard_error, wilson_interval
from ..registry import STUDIES
from ..report import Report, Section, Table, Verdict
from .sizes import FULL
from .variants import READINGS, VARIANTS

__all__ = ["build_report"]

Row = Mapping[str, Any]

_SOLVED = 0.9  # share of right answers from which a recall size counts as solved
_Z = 1.959964
_MINUS = "\u2212"


def build_report(rows: Sequence[Row]) -> Report:
    """The report.

    Args:
        rows: of `run_study`; a study that is not finished gives the sections it has rows for.

    Raises:
        ConfigError: not a row of this study.
    """
    plans = _of(rows, "plan")
    if not plans:
        raise ConfigError(
            f"rows: {len(rows)} came, none with the plan of the study. Allowed: the rows.jsonl of "
            "`longspan study stick-breaking-length`. Pass that file."
        )
    plan = plans[-1]
    lengths = _Lengths(rows)
    verdicts = [*_length_verdicts(lengths, plan), _recall_verdict(rows)]
    sections = [
        *_length_sections(lengths, plan),
        *_position_sections(rows, plan),
        *_recall_sections(rows),
        *_early_stop_sections(rows),
        *_span_sections(rows),
        *_training_sections(rows),
        *_sibling_sections(rows),
    ]
    info = STUDIES["stick-breaking-length"]
    return Report(
        name=info.name,
        question=info.question,
        headline=_headline(lengths, plan),
        verdicts=verdicts,
        facts=_facts(rows, plan),
        sections=sections,
        differences=_differences(plan),
        command=_command(info.name, plan),
        environment=_environment(rows),
    )


def _command(name: str, plan: Row) -> str:
    size = "" if _trained_length(plan) == FULL.length else " --small"
    return (
        f"longspan study {name} --train books-train.tar.xz --heldout books-heldout.tar.xz "
        f"--budget {plan['budget_minutes']:g}{size}"
    )


def _of(rows: Sequence[Row], kind: str) -> list[Row]:
    """Rows of a kind; of rows with the same key the last."""
    return list({row["key"]: row for row in rows if row["kind"] == kind}.values())


class _Lengths:
    """Losses by reading and length, with differences paired by book."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {(row["reading"], row["length"]): row for row in _of(rows, "length")}
        self.lengths = sorted({length for _, length in self.rows})
        self.readings = [r for r in READINGS if any((r.name, n) in self.rows for n in self.lengths)]

    def loss(self, reading: str, length: int) -> float | None:
        row = self.rows.get((reading, length))
        return None if row is None else float(row["loss"])

    def difference(self, one: tuple[str, int], other: tuple[str, int]) -> tuple[float, float]:
        """Mean of loss(one) - loss(other) over books and its standard error (NaN for one book)."""
        first, second = self.rows[one], self.rows[other]
        assert first["books"] == second["books"], "both read the same windows"
        by_book: dict[str, list[float]] = {}
        for book, a, b in zip(
            first["books"], first["window_losses"], second["window_losses"], strict=True
        ):
            by_book.setdefault(book, []).append(a - b)
        means = [statistics.fmean(values) for values in by_book.values()]
        return statistics.fmean(means), standard_error(means)


def _interval(mean: float, error: float) -> str:
    if math.isnan(error):
        return _signed(mean)
    return f"{_signed(mean)} ± {_Z * error:.4f}"


def _signed(value: float) -> str:
    return f"{'+' if value >= 0 else _MINUS}{abs(value):.4f}"


def _trained_length(plan: Row) -> int:
    return int(plan["sizes"]["length"])


def _headline(lengths: _Lengths, plan: Row) -> str:
    trained, longest = _trained_length(plan), lengths.lengths[-1] if lengths.lengths else 0
    losses = {r.label: loss for r in lengths.readings if (loss := lengths.loss(r.name, longest))}
    if not losses:
        return "The study has not measured any length yet."
    ranked = sorted(losses, key=losses.__getitem__)
    listed = ", ".join(f"{label} {math.exp(losses[label]):.2f}" for label in ranked)
    return (
        f"Trained at {count_text(trained)} tokens and read at {count_text(longest)}: "
        f"perplexity {listed}."
    )


def _length_verdicts(lengths: _Lengths, plan: Row) -> list[Verdict]:
    trained = _trained_length(plan)
    claim = (
        "Stick-breaking, trained at 2^11 tokens, keeps improving to 2^14 (abstract of "
        "arXiv:2410.17980)"
    )
    top = 8 * trained
    steps = [n for n in lengths.lengths if trained <= n <= top]
    name = "stick-breaking"
    if len(steps) < 2 or any(lengths.loss(name, n) is None for n in steps):
        return [Verdict(claim=claim, outcome="not measured", numbers="no rows")]
    if trained != FULL.length:
        small = f"trained at {count_text(trained)}: too small to say anything about the claim"
        return [Verdict(claim=claim, outcome="not measured", numbers=small)]
    losses = [float(lengths.loss(name, n) or 0.0) for n in steps]
    mean, error = lengths.difference((name, steps[-1]), (name, steps[0]))
    falls = all(b < a for a, b in itertools.pairwise(losses))
    sure = mean + _Z * (0.0 if math.isnan(error) else error) < 0
    outcome = "reproduced" if falls and sure else "partly" if mean < 0 else "not reproduced"
    texts = ", ".join(
        f"{math.exp(loss):.2f} at {count_text(n)}" for n, loss in zip(steps, losses, strict=True)
    )
    verdicts = [
        Verdict(
            claim=claim,
            outcome=outcome,
            numbers=f"perplexity {texts}; change of the loss {_interval(mean, error)} nats",
        )
    ]
    longest = lengths.lengths[-1]
    if lengths.loss("rope", longest) is not None and lengths.loss(name, longest) is not None:
        verdicts.append(_against_rope(lengths, longest, trained))
        verdicts.extend(_against_controls(lengths, longest))
    return verdicts


def _against_controls(lengths: _Lengths, longest: int) -> list[Verdict]:
    """Models without rotation: a claim of ours to test, so that no control is left unsaid."""
    own = ("stick-breaking", longest)
    others = {
        r.label: lengths.difference(own, (r.name, longest))
        for r in lengths.readings
        if r.variant not in ("stick-breaking", "rope") and (r.name, longest) in lengths.rows
    }
    if not others:
        return []
    wins = [mean + _Z * (0.0 if math.isnan(e) else e) < 0 for mean, e in others.values()]
    outcome = "reproduced" if all(wins) else "partly" if any(wins) else "not reproduced"
    texts = ", ".join(f"{label}'s {_interval(*pair)}" for label, pair in others.items())
    return [
        Verdict(
            claim=f"It also beats {', '.join(others)} (controls of ours)",
            outcome=outcome,
            numbers=f"at {count_text(longest)}: loss less {texts}",
        )
    ]


def _against_rope(lengths: _Lengths, longest: int, trained: int) -> Verdict:
    mean, error = lengths.difference(("stick-breaking", longest), ("rope", longest))
    others = {
        r.label: loss
        for r in lengths.readings
        if r.variant == "rope" and (loss := lengths.loss(r.name, longest)) is not None
    }
    best = min(others, key=others.__getitem__)
    own = float(lengths.loss("stick-breaking", longest) or 0.0)
    beats = mean + _Z * (0.0 if math.isnan(error) else error) < 0
    outcome = "reproduced" if beats and own < others[best] else "partly" if beats else (
        "not reproduced"
    )  # fmt: skip
    at_home, home_error = lengths.difference(("stick-breaking", trained), ("rope", trained))
    return Verdict(
        claim="Beyond its training length stick-breaking beats RoPE and its scalings",
        outcome=outcome,
        numbers=(
            f"at {count_text(longest)}: loss less RoPE's {_interval(mean, error)}; best RoPE "
            f"reading is {best}, {math.exp(others[best]):.2f} against {math.exp(own):.2f}; at the "
            f"trained length {_interval(at_home, home_error)}"
        ),
    )


def _length_sections(lengths: _Lengths, plan: Row) -> list[Section]:
    if not lengths.rows:
        return []
    trained, longest = _trained_length(plan), lengths.lengths[-1]
    lines, series = [], []
    for colour, reading in enumerate(lengths.readings):
        losses = [lengths.loss(reading.name, n) for n in lengths.lengths]
        change = MISSING
        if losses[0] is not None and losses[-1] is not None:
            change = _interval(
                *lengths.difference((reading.name, longest), (reading.name, lengths.lengths[0]))
            )
        cells = [MISSING if loss is None else f"{math.exp(loss):.2f}" for loss in losses]
        lines.append([reading.label, *cells, change])
        series.append(
            Series(
                label=reading.label,
                colour=colour,
                x=[math.log2(n) for n in lengths.lengths],
                y=[math.nan if loss is None else loss for loss in losses],
            )
        )
    return [
        Section(
            heading="Perplexity by length",
            caption=f"Held-out books. The same tokens at every length: windows of "
            f"{count_text(longest)} tokens, cut into parts that are read by themselves. Trained "
            f"at {count_text(trained)}. Last column: change of the loss in nats from the first "
            "length to the last, 95 % over books. The plot shows the loss.",
            svg=_plot(series, "length in tokens", "loss, nats per token", lengths.lengths),
            legend=[(one.label, one.colour) for one in series],
            table=Table(
                head=["reading", *(count_text(n) for n in lengths.lengths), "change, nats"],
                lines=lines,
            ),
        )
    ]


def _position_sections(rows: Sequence[Row], plan: Row) -> list[Section]:
    found = {row["reading"]: row["buckets"] for row in _of(rows, "positions")}
    readings = [reading for reading in READINGS if reading.name in found]
    if not readings:
        return []
    series = []
    for colour, reading in enumerate(READINGS):
        if reading.name in found:
            buckets = found[reading.name][1:]  # the first positions dwarf the rest
            centres = [math.log2((b["from"] + b["to"]) / 2) for b in buckets]
            losses = [b["loss"] for b in buckets]
            series.append(Series(label=reading.label, colour=colour, x=centres, y=losses))
    ends = [b["to"] for b in found[readings[0].name]]
    trained = _trained_length(plan)
    marks = [n for n in ends if n >= trained // 2 and (n & (n - 1)) == 0]
    lines = [
        [reading.label, *(_bucket_text(found[reading.name], n) for n in marks)]
        for reading in readings
    ]
    ticks = [n for n in ends if (n & (n - 1)) == 0]
    return [
        Section(
            heading="Loss by position",
            caption=f"Positions in windows of {count_text(ends[-1])} tokens; trained to "
            f"{count_text(trained)}. The table has the mean loss (and its standard error over "
            "windows) of the positions that end at each column and begin at 0.7 of it.",
            svg=_plot(series, "position", "loss, nats per token", ticks),
            legend=[(one.label, one.colour) for one in series],
            table=Table(head=["reading", *(count_text(n) for n in marks)], lines=lines),
        )
    ]


def _bucket_text(buckets: Sequence[Mapping[str, Any]], end: int) -> str:
    bucket = next(b for b in buckets if b["to"] == end)
    error = bucket["error"]
    return f"{bucket['loss']:.3f}" + ("" if error is None else f" ({error:.3f})")


def _recall_rows(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """By variant, of the task that was run last: its vocabulary is part of it."""
    found: dict[str, list[Row]] = {}
    recalls = _of(rows, "recall")
    for row in recalls:
        if row.get("vocab_size") == recalls[-1].get("vocab_size"):
            found.setdefault(row["variant"], []).append(row)
    return {name: sorted(found[name], key=lambda row: row["pairs"]) for name in found}


def _solved(rows: Sequence[Row]) -> int:
    return max((row["pairs"] for row in rows if row["accuracy"] >= _SOLVED), default=0)


def _recall_verdict(rows: Sequence[Row]) -> Verdict:
    claim = (
        "Multi-query recall with re-assigned keys: stick-breaking solves more pairs than softmax "
        "with RoPE (paper: 192 against 128)"
    )
    found = _recall_rows(rows)
    if "stick-breaking" not in found or "rope" not in found:
        return Verdict(claim=claim, outcome="not measured", numbers="no rows")
    stick, rope = _solved(found["stick-breaking"]), _solved(found["rope"])
    if not rope:  # a model that never learned the task is no comparison of sizes
        outcome, remark = ("partly", "; RoPE did not learn the task in its steps") if stick else (
            "not measured", "; neither learned the task in its steps"
        )  # fmt: skip
    else:
        outcome, remark = "reproduced" if stick > rope else "not reproduced", ""
    best = {n: max(row["accuracy"] for row in found[n]) for n in ("stick-breaking", "rope")}
    return Verdict(
        claim=claim,
        outcome=outcome,
        numbers=f"at least {percent_text(_SOLVED)} right up to {stick} pairs (stick-breaking) and "
        f"{rope} (RoPE); best {percent_text(best['stick-breaking'])} and "
        f"{percent_text(best['rope'])}{remark}",
    )


def _recall_sections(rows: Sequence[Row]) -> list[Section]:
    found = _recall_rows(rows)
    if not found:
        return []
    names = [name for name in VARIANTS if name in found]
    sizes = sorted({row["pairs"] for name in names for row in found[name]})
    lines, series = [], []
    for colour, name in enumerate(names):
        by_size = {row["pairs"]: row for row in found[name]}
        cells = []
        for size in sizes:
            row = by_size.get(size)
            if row is None:
                cells.append(MISSING)
                continue
            low, high = wilson_interval(row["right"], row["asked"])
            cells.append(f"{percent_text(row['accuracy'])} ({100 * low:.0f}\u2013{100 * high:.0f})")
        lines.append([VARIANTS[name].label, *cells])
        series.append(
            Series(
                label=VARIANTS[name].label,
                colour=colour,
                x=[math.log2(row["pairs"]) for row in found[name]],
                y=[row["accuracy"] for row in found[name]],
            )
        )
    trained = found[names[0]][0]["trained_pairs"]
    return [
        Section(
            heading="Multi-query recall, keys assigned again",
            caption=f"Trained on {min(trained)} to {max(trained)} assignments, "
            f"{count_text(found[names[0]][0]['steps'])} steps each; larger numbers are "
            "extrapolation. Right answers in percent (95 % interval).",
            svg=_plot(series, "assignments", "share right", sizes, percent=True),
            legend=[(one.label, one.colour) for one in series],
            table=Table(head=["model", *(count_text(n) for n in sizes)], lines=lines),
        )
    ]


def _early_stop_sections(rows: Sequence[Row]) -> list[Section]:
    lines = []
    for row in sorted(_of(rows, "early_stop"), key=lambda row: row["length"]):
        full = row["lines"][0]
        for line in row["lines"]:
            if line["mechanism"] == "stick_breaking":
                stop = line["early_stop"]
                label = "full walk" if stop is None else f"stop at 2^{math.log2(stop):.0f}"
            else:
                label = f"exact attention, {line['backend']}"
            loss, base = line.get("loss"), full.get("loss")
            change = MISSING if loss is None or base is None else _signed(loss - base)
            visited = line.get("visited_fraction")
            lines.append(
                [
                    f"{count_text(row['length'])}, {label}",
                    MISSING if visited is None else percent_text(visited),
                    value_text(line["attention_ms"]),
                    f"{value_text(full['attention_ms'] / line['attention_ms'], 2)}\u00d7",
                    value_text(line.get("prefill_ms")),
                    change,
                ]
            )
    if not lines:
        return []
    return [
        Section(
            heading="Early stop in the trained model",
            caption="One held-out book. Visited: key tiles walked, of a full causal walk. Times "
            "are medians in ms of one forward pass, batch 1: attention of all layers on the "
            "model's own queries, keys and values, and the whole body of the model. Exact "
            "attention gets the same tensors, for its time only.",
            table=Table(
                head=[
                    "length", "visited", "attention, ms", "full walk / this", "model, ms",
                    "change of loss",
                ],
                lines=lines,
            ),
        )
    ]  # fmt: skip


def _span_sections(rows: Sequence[Row]) -> list[Section]:
    sections = []
    for row in _of(rows, "spans"):
        thresholds = sorted({head["threshold"] for head in row["heads"]}, reverse=True)
        layers = sorted({head["layer"] for head in row["heads"]})
        lines = []
        for layer in layers:
            cells = [str(layer)]
            for threshold in thresholds:
                spans = [
                    head["p50"]
                    for head in row["heads"]
                    if head["layer"] == layer and head["threshold"] == threshold
                ]
                cells.append(
                    f"{count_text(min(spans))} / {count_text(statistics.median(spans))} / "
                    f"{count_text(max(spans))}"
                )
            unspent = [
                head["unspent"]
                for head in row["heads"]
                if head["layer"] == layer and head["threshold"] == thresholds[-1]
            ]
            cells.append(percent_text(statistics.fmean(unspent)))
            lines.append(cells)
        what = "stick" if row["mechanism"] == "stick_breaking" else "softmax mass"
        label = VARIANTS[row["variant"]].label
        sections.append(
            Section(
                heading=f"How far heads read: {label}",
                caption=f"Keys after which less than a share of the {what} is left: median over "
                f"queries in the second half of {count_text(row['length'])} tokens; shortest, "
                "middle and farthest head of each layer. Last column: queries whose rest never "
                "falls below the smallest share.",
                table=Table(
                    head=["layer", *(f"{value_text(t)}" for t in thresholds), "never"],
                    lines=lines,
                ),
            )
        )
    return sections


def _training_sections(rows: Sequence[Row]) -> list[Section]:
    found = {row["variant"]: row for row in _of(rows, "trained")}
    if not found:
        return []
    names = [name for name in VARIANTS if name in found]
    lines, series = [], []
    for colour, name in enumerate(names):
        row = found[name]
        lines.append(
            [
                VARIANTS[name].label,
                count_text(row["num_parameters"]),
                f"{row['tokens'] / 1e6:.1f} M",
                f"{row['final_loss']:.4f}",
                count_text(row["tokens_per_second"]),
                percent_text(row["mfu"]),
                seconds_text(row["seconds"]),
                str(row["compiled"]).split(":")[0],
            ]
        )
        points = [point for point in row["curve"] if point[0] > row["steps"] // 10]
        series.append(
            Series(
                label=VARIANTS[name].label,
                colour=colour,
                x=[float(step) for step, _ in points],
                y=[loss for _, loss in points],
            )
        )
    steps = found[names[0]]["steps"]
    ticks = [round(steps * share / 4) for share in range(5)]
    return [
        Section(
            heading="Training",
            caption="Same data, order, steps and settings for all. Model FLOP utilisation counts "
            "6 per parameter and token and 6 N D per layer for causal attention, whatever a "
            "kernel computes beyond it, against the device's dense bfloat16 peak.",
            svg=line_plot(
                series, x_title="step", y_title="training loss, nats", x_ticks=ticks,
                x_text=lambda x: count_text(x), y_text=lambda y: f"{y:g}",
            ),
            legend=[(one.label, one.colour) for one in series],
            table=Table(
                head=["model", "parameters", "tokens", "training loss", "tokens/s", "MFU", "time",
                      "compiled"],
                lines=lines,
            ),
        )
    ]  # fmt: skip


def _sibling_sections(rows: Sequence[Row]) -> list[Section]:
    lines = []
    lengths: list[str] = []
    for row in _of(rows, "sibling"):
        lengths = list(row["losses"])
        lines.append(
            [
                VARIANTS[row["variant"]].label,
                count_text(row["num_parameters"]),
                bytes_text(row["bytes"]),
                *(f"{math.exp(loss):.2f}" for loss in row["losses"].values()),
                seconds_text(row["seconds"]),
            ]
        )
    if not lines:
        return []
    heads = [f"perplexity at {count_text(int(n))}" for n in lengths]
    return [
        Section(
            heading="Small models",
            caption="Siblings with the same recipe, kept in bfloat16; measured as they are kept.",
            table=Table(head=["model", "parameters", "file", *heads, "trained in"], lines=lines),
        )
    ]


def _plot(
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    ticks: Sequence[int],
    *,
    percent: bool = False,
) -> str | None:
    shown = [n for n in ticks if n > 0]
    if len(shown) < 2:  # a study that has just begun: the table says it
        return None
    return line_plot(
        series,
        x_title=x_title,
        y_title=y_title,
        x_ticks=[math.log2(n) for n in shown],
        x_text=lambda x: count_text(round(2**x)) if 2**x < 8192 else f"{2**x / 1024:.0f}k",
        y_text=lambda y: f"{100 * y:.0f} %" if percent else f"{y:g}",
        from_zero=percent,
    )


def _facts(rows: Sequence[Row], plan: Row) -> list[tuple[str, str]]:
    seconds = sum(row["seconds"] for kind in ("trained", "sibling") for row in _of(rows, kind))
    tokens = plan["tokens"]
    return [
        ("trained on", f"{tokens / 1e6:.1f} M tokens each ({plan['epochs']:.1f} epochs)"),
        ("steps", count_text(plan["steps"])),
        ("training length", count_text(_trained_length(plan))),
        ("vocabulary", count_text(plan["vocab_size"])),
        ("training time", seconds_text(seconds)),
        ("budget", f"{plan['budget_minutes']:g} min"),
    ]


def _differences(plan: Row) -> list[str]:
    sizes = plan["sizes"]
    model = sizes["model"]
    return [
        f"Models of width {model['width']} and {model['layers']} layers on "
        f"{plan['tokens'] / 1e6:.0f} M tokens of books before 1929; the paper trains 350 M "
        "parameters on 15 B tokens of web text and evaluates on Wikitext.",
        "Stick-breaking drops the rest of the stick; the authors' later models give it to a "
        "learned vector. No variant has norms on queries and keys.",
        "One seed; learning rate and schedule are the same for all and were not tuned, neither "
        "per variant nor on held-out texts.",
        "YaRN and NTK scaling are applied at test time only, with the factor length / training "
        "length at each length. FoX is the plain forget gate, without the paper's Pro block; "
        "its gates start at one half, so that heads begin by reading a few tokens, and so few "
        "steps say little about how good it becomes.",
        "The recall task is ours, after the description of the paper's: keys from a set half as "
        "large as the number of assignments, 32 questions at the end; sizes mixed in training.",
    ]


def _environment(rows: Sequence[Row]) -> list[tuple[str, str]]:
    shown = []
    for name in ("device", "driver", "torch", "triton", "python", "longspan", "commit"):
        values = list(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None))
        if values:
            shown.append((name, ", ".join(values)))
    return shown
