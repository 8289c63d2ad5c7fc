"""From the rows of the study to its report; no number is typed here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from ...eval.report.numbers import MISSING, bytes_text, count_text, seconds_text
from ...eval.report.svg import Series, line_plot
from ...eval.statistics import standard_error
from ..registry import STUDIES
from ..report import Report, Section, Table, Verdict
from .run import FULL, LABELS

__all__ = ["build_report"]

Row = Mapping[str, Any]
_Z = 1.959964
_NEAR, _FAR = 0.05, 0.95  # shares of the memory at which a head is local or reads memory only


def build_report(rows: Sequence[Row]) -> Report:
    """The report; a study that is not finished gives the lines it has rows for.

    Raises:
        ConfigError: no row of this study.
    """
    own = list({row["key"]: row for row in rows if row.get("study") == "infini-books"}.values())
    trained = {row["model"]: row for row in own if row["kind"] == "trained"}
    if not trained:
        raise ConfigError(
            f"rows: {len(rows)} came, none of a trained model of this study. Allowed: the "
            "rows.jsonl of `longspan study infini-books`. Pass that file."
        )
    losses = {(row["model"], row["length"]): row for row in own if row["kind"] == "loss"}
    kept = {row["length"]: row for row in own if row["kind"] == "kept"}
    one = next(iter(trained.values()))
    sizes, info = one["sizes"], STUDIES["infini-books"]
    verdicts = _verdicts(losses, sizes)
    small = "" if sizes["length"] == FULL.length else " --small"
    if not small and sizes["steps"] != FULL.steps:
        small = f" --steps {sizes['steps']}"
    return Report(
        name=info.name,
        question=info.question,
        headline=". ".join(f"{v.claim}: {v.outcome} ({v.numbers})" for v in verdicts),
        verdicts=verdicts,
        facts=[
            ("parameters", count_text(one["num_parameters"])),
            ("length", f"{count_text(sizes['length'])} tokens, segments of "
                       f"{count_text(sizes['segment'])}"),
            ("training", f"{count_text(one['steps'])} steps, {one['tokens'] / 1e6:.1f} M tokens "
                         "each"),
            ("training time", seconds_text(sum(row["seconds"] for row in trained.values()))),
        ],
        sections=[
            _loss_section(losses, sizes),
            _segment_section(losses, sizes),
            *_gate_sections(trained),
            _training_section(trained),
            *_kept_sections(kept),
        ],
        differences=[
            "The paper trains on PG19 and arXiv-math with Transformer-XL, Memorizing Transformers "
            "and RMT beside it; here small models see public-domain books, with one seed.",
            "In place of a Transformer-XL cache: a sliding window of two segments, which sees at "
            "least as many keys as a segment and its cache do, with gradient through all of them.",
            "A sliding window of one segment sees that many keys at every position; a segment with "
            "memory sees half as many on average, and the memory.",
            "The memory's gradient goes through all segments of a sequence, not cut off.",
        ],
        command="longspan study infini-books --train books-train.tar.xz "
        f"--heldout books-heldout.tar.xz{small}",
        environment=_environment(own),
    )  # fmt: skip


def _verdicts(losses: Mapping[tuple[str, int], Row], sizes: Row) -> list[Verdict]:
    length, segment = sizes["length"], sizes["segment"]
    claim = (
        f"Infini-attention models books of {count_text(length)} tokens better than windows of one "
        "and of two segments (paper: better than Transformer-XL)"
    )
    memory = "What the memory holds lowers the loss beyond the first segment (ours)"
    if sizes["length"] != FULL.length:
        told = "sizes for a processor"
        return [Verdict(claim=c, outcome="not measured", numbers=told) for c in (claim, memory)]
    pairs = [_difference(losses.get(("infini", length)), losses.get((name, length)))
             for name in ("window", "cache")]  # fmt: skip
    if any(pair is None for pair in pairs):
        first = Verdict(claim=claim, outcome="not measured", numbers="no rows")
    else:
        better = [pair is not None and pair[0] < -_Z * pair[1] for pair in pairs]
        outcome = "reproduced" if all(better) else "partly" if any(better) else "not reproduced"
        numbers = (
            f"loss less that of the window {_pair_text(pairs[0])} nats, of two segments "
            f"{_pair_text(pairs[1])}"
        )
        most = _difference(losses.get(("full", length)), losses.get(("window", length)))
        if most is None or most[0] > -_Z * most[1]:  # the control sees all that windows see
            outcome = "not measured"
            numbers += (
                f"; but full attention less the window is {_pair_text(most)}: trained too little "
                "for context to decide"
            )
        first = Verdict(claim=claim, outcome=outcome, numbers=numbers)
    apart = _difference(losses.get(("infini", length)), losses.get(("infini", segment)))
    if apart is None:
        return [first, Verdict(claim=memory, outcome="not measured", numbers="no rows")]
    return [
        first,
        Verdict(
            claim=memory,
            outcome="reproduced" if apart[0] < -_Z * apart[1] else "not reproduced",
            numbers=f"loss with memory less loss of segments read alone {_pair_text(apart)} nats",
        ),
    ]


def _difference(one: Row | None, other: Row | None) -> tuple[float, float] | None:
    """Mean over windows of the same tokens, and its standard error."""
    if one is None or other is None:
        return None
    each = [a - b for a, b in zip(one["window_losses"], other["window_losses"], strict=True)]
    return statistics.fmean(each), standard_error(each)


def _pair_text(pair: tuple[float, float] | None) -> str:
    if pair is None:
        return MISSING
    sign = "+" if pair[0] >= 0 else "\u2212"
    return f"{sign}{abs(pair[0]):.4f} ± {_Z * pair[1]:.4f}"


def _loss_section(losses: Mapping[tuple[str, int], Row], sizes: Row) -> Section:
    def text(name: str, length: int) -> str:
        row = losses.get((name, length))
        return MISSING if row is None else f"{math.exp(row['loss']):.2f}"

    length, segment = sizes["length"], sizes["segment"]
    lines = [
        [label, text(name, length), text(name, segment),
         _pair_text(_difference(losses.get((name, length)), losses.get(("window", length))))]
        for name, label in LABELS.items()
    ]  # fmt: skip
    heads = [f"{count_text(n)} at a time" for n in (length, segment)]
    return Section(
        heading="Perplexity",
        caption="Held-out books, the same tokens read whole and cut into segments that are read by "
        "themselves. Last column: loss less that of the window of one segment, in nats, 95 % over "
        "windows.",
        table=Table(head=["model", *heads, "to the window"], lines=lines),
    )


def _segment_section(losses: Mapping[tuple[str, int], Row], sizes: Row) -> Section:
    length, segment = sizes["length"], sizes["segment"]
    shown = [(name, losses[name, length]) for name in LABELS if (name, length) in losses]
    columns = [c for c in (1, 2, 4, 8, 16) if c <= length // segment]
    lines = [[LABELS[name], *(f"{row['by_segment'][c - 1]:.3f}" for c in columns)]
             for name, row in shown]  # fmt: skip
    series = [
        Series(label=LABELS[name], colour=list(LABELS).index(name),
               x=[float(i + 1) for i in range(len(row["by_segment"]))], y=row["by_segment"])
        for name, row in shown
    ]  # fmt: skip
    svg = line_plot(
        series, x_title="segment", y_title="loss, nats", x_ticks=columns,
        x_text=lambda x: count_text(round(x)), y_text=lambda y: f"{y:.2f}",
    ) if series else None  # fmt: skip
    return Section(
        heading="Loss by segment",
        caption=f"Read whole; segments of {count_text(segment)} tokens, counted from 1. Texts get "
        "harder and easier along the way for all models alike: compare lines.",
        svg=svg,
        legend=[(one.label, one.colour) for one in series],
        table=Table(head=["model", *(f"segment {c}" for c in columns)], lines=lines),
    )


def _gate_sections(trained: Mapping[str, Row]) -> list[Section]:
    lines = []
    for name, row in trained.items():
        gates = [share for layer in row["gates"] for share in layer]
        if not gates:
            continue
        first = [share for layer in row["gates_before"] for share in layer]
        counts = [sum(low / 10 <= g < low / 10 + 0.1 for g in gates) for low in range(9)]
        counts.append(len(gates) - sum(counts))
        moved = statistics.fmean(abs(a - b) for a, b in zip(gates, first, strict=True))
        lines.append([LABELS[name], *(str(n) for n in counts),
                      str(sum(g < _NEAR for g in gates)), str(sum(g > _FAR for g in gates)),
                      f"{moved:.3f}"])  # fmt: skip
    if not lines:
        return []
    bins = [f"{low / 10:.1f} to {low / 10 + 0.1:.1f}" for low in range(10)]
    return [
        Section(
            heading="Gates after training",
            caption="Heads by their share of the memory, all layers. They start spread from 0.05 "
            "to 0.95; specialised heads end beyond that, mixers between.",
            table=Table(
                head=["model", *bins, f"below {_NEAR:g}", f"above {_FAR:g}", "mean move"],
                lines=lines,
            ),
        )
    ]


def _training_section(trained: Mapping[str, Row]) -> Section:
    names = [name for name in LABELS if name in trained]
    series = [
        Series(label=LABELS[name], colour=list(LABELS).index(name),
               x=[float(step) for step, _ in trained[name]["curve"]],
               y=[loss for _, loss in trained[name]["curve"]])
        for name in names
    ]  # fmt: skip
    steps = trained[names[0]]["steps"]
    svg = line_plot(
        series, x_title="step", y_title="training loss, nats",
        x_ticks=[round(steps * share / 4) for share in range(5)],
        x_text=lambda x: count_text(round(x)), y_text=lambda y: f"{y:g}",
    )  # fmt: skip
    lines = [
        [LABELS[name], count_text(round(trained[name]["tokens_per_second"])),
         f"{trained[name]['curve'][-1][1]:.4f}", str(trained[name]["compiled"]),
         seconds_text(trained[name]["seconds"])]
        for name in names
    ]  # fmt: skip
    return Section(
        heading="Training",
        caption="The same batches for all.",
        svg=svg,
        legend=[(one.label, one.colour) for one in series],
        table=Table(head=["model", "tokens/s", "last loss", "compiled", "time"], lines=lines),
    )


def _kept_sections(kept: Mapping[int, Row]) -> list[Section]:
    if not kept:
        return []
    lengths = sorted(kept)
    size = bytes_text(kept[lengths[0]]["bytes"])
    line = [LABELS["infini"], size, *(f"{math.exp(kept[n]['loss']):.2f}" for n in lengths)]
    return [
        Section(
            heading="The model that is kept",
            caption="In bfloat16, measured as it is kept.",
            table=Table(
                head=["model", "file", *(f"perplexity at {count_text(n)}" for n in lengths)],
                lines=[line],
            ),
        )
    ]


def _environment(rows: Sequence[Row]) -> list[tuple[str, str]]:
    shown = []
    for name in ("device", "driver", "torch", "triton", "python", "longspan", "commit"):
        values = list(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None))
        if values:
            shown.append((name, ", ".join(values)))
    return shown
