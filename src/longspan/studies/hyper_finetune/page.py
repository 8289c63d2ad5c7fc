"""From the rows of the study to its report; no number is typed here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from ...eval.report.numbers import MISSING, count_text, percent_text, seconds_text
from ...eval.report.svg import Series, line_plot
from ...eval.statistics import standard_error
from ..registry import STUDIES
from ..report import Report, Section, Table, Verdict
from .run import FULL, TUNED

__all__ = ["build_report", "gaps"]

Row = Mapping[str, Any]
_Z = 1.959964


def build_report(rows: Sequence[Row]) -> Report:
    """The report; a study that is not finished gives the lines it has rows for.

    Raises:
        ConfigError: no row of this study.
    """
    own = [row for row in rows if row.get("study") == "hyper-finetune"]
    trained = {row["model"]: row for row in own if row["kind"] == "trained"}
    if "base" not in trained:
        raise ConfigError(
            f"rows: {len(rows)} came, none of this study's base model. Allowed: the rows.jsonl of "
            "`longspan study hyper-finetune`. Pass that file."
        )
    losses = {(row["model"], row["reading"]): row for row in own if row["kind"] == "loss"}
    base = trained["base"]
    sizes, info = base["sizes"], STUDIES["hyper-finetune"]
    verdicts = [_verdict(name, losses, trained, sizes) for name in TUNED if name != "exact"]
    small = "" if sizes["length"] == FULL.length else " --small"
    return Report(
        name=info.name,
        question=info.question,
        headline=". ".join(f"{v.claim}: {v.outcome} ({v.numbers})" for v in verdicts),
        verdicts=verdicts,
        facts=[
            ("parameters", count_text(base["num_parameters"])),
            ("length", count_text(sizes["length"])),
            ("base", f"{count_text(base['steps'])} steps, {base['tokens'] / 1e6:.1f} M tokens"),
            ("continued", f"{count_text(sizes['tune_steps'])} steps"),
            ("training time", seconds_text(sum(row["seconds"] for row in trained.values()))),
        ],
        sections=[_loss_section(losses, sizes), _curve_section(trained)],
        differences=[
            "The papers apply HyperAttention to models as they are; training under it is our "
            "question, and the control is as many more steps with exact attention.",
            "One seed, one small model; rates are not tuned on held-out texts.",
            "The gradient is that of the estimate with its index and samples held fixed.",
        ],
        command=f"longspan study hyper-finetune --train books-train.tar.xz "
        f"--heldout books-heldout.tar.xz{small}",
        environment=_environment(own),
    )


def gaps(
    losses: Mapping[tuple[str, str], Row], name: str
) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Gap to exact attention before and after, each with its standard error over windows.

    Before: the base under the approximation less the base. After: the tuned model under it less
    the control that went on with exact attention.
    """
    wanted = [("base", name), ("base", "exact"), (name, name), ("exact", "exact")]
    if any(pair not in losses for pair in wanted):
        return None
    before = _difference(losses[wanted[0]], losses[wanted[1]])
    return before, _difference(losses[wanted[2]], losses[wanted[3]])


def _difference(one: Row, other: Row) -> tuple[float, float]:
    each = [a - b for a, b in zip(one["window_losses"], other["window_losses"], strict=True)]
    return statistics.fmean(each), standard_error(each)


def _verdict(
    name: str, losses: Mapping[tuple[str, str], Row], trained: Mapping[str, Row], sizes: Row
) -> Verdict:
    claim = f"A few hundred steps under HyperAttention ({name}) close most of its gap (ours)"
    pair = gaps(losses, name)
    if pair is None:
        return Verdict(claim=claim, outcome="not measured", numbers="no rows")
    if sizes["length"] != FULL.length:
        return Verdict(claim=claim, outcome="not measured", numbers="sizes for a processor")
    (before, error), (after, later) = pair
    if before <= _Z * error:
        text = f"no gap to close: {_signed(before)} ± {_Z * error:.4f} nats"
        return Verdict(claim=claim, outcome="not measured", numbers=text)
    closed = 1 - after / before
    outcome = "reproduced" if closed >= 0.5 else "partly" if closed > 0.1 else "not reproduced"
    return Verdict(
        claim=claim,
        outcome=outcome,
        numbers=f"gap {_signed(before)} ± {_Z * error:.4f} nats before, {_signed(after)} ± "
        f"{_Z * later:.4f} after {count_text(trained[name]['steps'])} steps: "
        f"{percent_text(max(0.0, closed))} closed",
    )


def _signed(value: float) -> str:
    return f"{'+' if value >= 0 else chr(0x2212)}{abs(value):.4f}"


def _loss_section(losses: Mapping[tuple[str, str], Row], sizes: Row) -> Section:
    def text(model: str, reading: str) -> str:
        row = losses.get((model, reading))
        return MISSING if row is None else f"{math.exp(row['loss']):.2f}"

    lines = [
        [name, text("base", name), text(name, name), text(name, "exact")]
        for name in TUNED
    ]  # fmt: skip
    return Section(
        heading="Perplexity before and after",
        caption=f"Held-out books, {count_text(sizes['length'])} tokens at a time. Before: the base "
        "model read under each attention. After: continued under it and read under it; and read "
        "under exact attention, which says what the tuning did to the model itself.",
        table=Table(head=["attention", "before", "after", "after, read exactly"], lines=lines),
    )


def _curve_section(trained: Mapping[str, Row]) -> Section:
    names = [name for name in TUNED if name in trained]
    series = [
        Series(
            label=name, colour=index,
            x=[float(step) for step, _ in trained[name]["curve"]],
            y=[loss for _, loss in trained[name]["curve"]],
        )
        for index, name in enumerate(names)
    ]  # fmt: skip
    steps = trained[names[0]]["steps"] if names else 1
    svg = line_plot(
        series, x_title="step", y_title="training loss, nats",
        x_ticks=[round(steps * share / 4) for share in range(5)],
        x_text=lambda x: count_text(round(x)), y_text=lambda y: f"{y:g}",
    ) if names else None  # fmt: skip
    lines = [
        [name, count_text(row["steps"]), count_text(round(row["tokens_per_second"])),
         seconds_text(row["seconds"])]
        for name, row in trained.items()
    ]  # fmt: skip
    return Section(
        heading="Training",
        caption="The base, and the continuations from its weights over the same batches.",
        svg=svg,
        legend=[(one.label, one.colour) for one in series],
        table=Table(head=["model", "steps", "tokens/s", "time"], lines=lines),
    )


def _environment(rows: Sequence[Row]) -> list[tuple[str, str]]:
    shown = []
    for name in ("device", "driver", "torch", "triton", "python", "longspan", "commit"):
        values = list(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None))
        if values:
            shown.append((name, ", ".join(values)))
    return shown
