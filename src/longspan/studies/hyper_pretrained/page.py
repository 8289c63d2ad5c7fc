"""From the rows of the study to its report; only the paper's own numbers are typed here."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from ...eval.report.numbers import MISSING, count_text, percent_text, value_text
from ...eval.report.svg import NUM_COLOURS, Series, line_plot
from ...eval.statistics import standard_error
from ..registry import STUDIES
from ..report import Report, Section, Table, Verdict
from .settings import SETTINGS

__all__ = ["build_report", "true_perplexity"]

Row = Mapping[str, Any]
_Z = 1.959964

#: ChatGLM2-6B-32k at 32k on LongBench texts, as printed by the authors' script (arXiv:2310.05869).
PAPER_EXACT, PAPER_HYPER = 5.6, 6.3
#: The same script with all 28 layers patched, run by others, at 8k, 16k and 32k: exact, patched.
OTHERS_ALL_LAYERS = {8192: (7.91, 11.74), 16384: (6.24, 12.29), 32768: (5.63, 12.16)}


def true_perplexity(printed: float) -> float:
    """e ** loss of what the authors' script prints: 2 ** loss, with a loss in nats.

    Example:
        >>> round(true_perplexity(5.6), 1)
        12.0
    """
    return math.exp(math.log2(printed))


def build_report(rows: Sequence[Row]) -> Report:
    """The report; a study that is not finished gives the sections it has rows for.

    Raises:
        ConfigError: no row of this study.
    """
    own = [row for row in rows if row.get("study") == "hyper-pretrained"]
    if not own:
        raise ConfigError(
            f"rows: {len(rows)} came, none of this study. Allowed: the rows.jsonl of "
            "`longspan study hyper-pretrained`. Pass that file."
        )
    models = {name: [r for r in own if r["model"] == name] for name in _names(own)}
    losses = {name: _Losses(rows) for name, rows in models.items()}
    many = len(models) > 1
    info = STUDIES["hyper-pretrained"]
    return Report(
        name=info.name,
        question=info.question,
        headline=" ".join(
            f"{name}: {_headline(losses[name])}" if many else _headline(losses[name])
            for name in models
        ),
        verdicts=[
            dataclasses.replace(
                verdict, claim=f"{verdict.claim}: {name}" if many else verdict.claim
            )
            for name, rows in models.items()
            for verdict in _verdicts(losses[name], rows)
        ],
        facts=[fact for rows in models.values() for fact in _facts(rows)],
        sections=[
            *(
                dataclasses.replace(
                    section, heading=f"{name}: {section.heading}" if many else section.heading
                )
                for name, rows in models.items()
                for section in (
                    *_perplexity_sections(losses[name]),
                    *_layer_sections(rows),
                    *_task_sections(rows),
                    *_mass_sections(rows),
                )
            ),
            _paper_section(),
        ],
        differences=_differences(list(models)),
        command="\n".join(
            f"longspan study hyper-pretrained --model {name} --tokens {_lengths(rows)} "
            "--heldout books-heldout.tar.xz"
            for name, rows in models.items()
        ),
        environment=_environment(own),
    )


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(str(row["model"]) for row in rows))


def _lengths(rows: Sequence[Row]) -> str:
    return " --tokens ".join(str(n) for n in sorted({row["tokens"] for row in rows}))


def _of(rows: Sequence[Row], kind: str) -> list[Row]:
    """Rows of a kind; of rows with the same key the last."""
    return list({row["key"]: row for row in rows if row["kind"] == kind}.values())


def _in_order(names: Sequence[str]) -> list[str]:
    return [
        *(n for n in SETTINGS if n in names),
        *dict.fromkeys(n for n in names if n not in SETTINGS),
    ]


class _Losses:
    """Perplexity rows by setting and length; differences paired by document."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {(row["setting"], row["tokens"]): row for row in _of(rows, "perplexity")}
        self.lengths = sorted({tokens for _, tokens in self.rows})
        self.names = _in_order([name for name, _ in self.rows])

    def get(self, name: str, length: int) -> Row | None:
        return self.rows.get((name, length))

    def rise(self, name: str, length: int) -> tuple[float, float] | None:
        """Loss less that of exact attention and its standard error over documents."""
        row, exact = self.get(name, length), self.get("exact", length)
        if row is None or exact is None:
            return None
        mine, its = row.get("document_losses", ()), exact.get("document_losses", ())
        # A row without its documents' losses has no interval.
        each = [a - b for a, b in zip(mine, its, strict=True)] if mine and its else []
        error = standard_error(each) if len(each) > 1 else math.nan
        return float(row["loss"] - exact["loss"]), error


def _rise_text(rise: tuple[float, float] | None) -> str:
    if rise is None:
        return MISSING
    percent, error = 100 * math.expm1(rise[0]), 100 * _Z * rise[1]
    text = f"{'+' if percent >= 0 else chr(0x2212)}{abs(percent):.1f} %"
    return text if math.isnan(error) else f"{text} ± {error:.1f}"


def _headline(losses: _Losses) -> str:
    if not losses.rows:
        return "The study has not measured perplexity yet."
    longest = losses.lengths[-1]
    parts = []
    for name in ("exact", "default", "paper, LSH", "paper, k-means"):
        row = losses.get(name, longest)
        if row is not None:
            parts.append(f"{name} {math.exp(row['loss']):.2f}")
    return f"Perplexity at {count_text(longest)} tokens, all layers: {', '.join(parts)}."


def _verdicts(losses: _Losses, rows: Sequence[Row]) -> list[Verdict]:
    return [_paper_verdict(rows), _default_verdict(losses), _kmeans_verdict(losses)]


def _paper_verdict(rows: Sequence[Row]) -> Verdict:
    claim = (
        f"Some layers with the paper's HyperAttention: perplexity {PAPER_EXACT} to {PAPER_HYPER} "
        f"({true_perplexity(PAPER_EXACT):.1f} to {true_perplexity(PAPER_HYPER):.1f} once computed "
        "as e to the loss; ChatGLM2-6B, 32k; abstract of arXiv:2310.05869)"
    )
    found = _layer_losses(rows).get("paper, LSH", {})
    if 0 not in found or len(found) < 3:
        return Verdict(claim=claim, outcome="not measured", numbers="no rows")
    total, paper = max(found), true_perplexity(PAPER_HYPER) / true_perplexity(PAPER_EXACT)
    ratios = {n: math.exp(found[n] - found[0]) for n in found}
    within = [n for n in found if ratios[n] <= paper]
    most = max(within)
    outcome = "reproduced" if most >= total / 2 else "partly" if most > 0 else "not reproduced"
    return Verdict(
        claim=claim,
        outcome=outcome,
        numbers=f"a rise of at most {percent_text(paper - 1)} holds up to {most} of {total} layers "
        f"here; with all of them {percent_text(ratios[total] - 1)}",
    )


def _default_verdict(losses: _Losses) -> Verdict:
    claim = "Our default in all layers keeps perplexity within 2 % (ours)"
    rises = {n: rise for n in losses.lengths if (rise := losses.rise("default", n))}
    if not rises:
        return Verdict(claim=claim, outcome="not measured", numbers="no rows")
    good = [math.expm1(rise[0]) <= 0.02 for rise in rises.values()]
    texts = ", ".join(f"{_rise_text(rise)} at {count_text(n)}" for n, rise in rises.items())
    outcome = "reproduced" if all(good) else "partly" if any(good) else "not reproduced"
    return Verdict(claim=claim, outcome=outcome, numbers=texts)


def _kmeans_verdict(losses: _Losses) -> Verdict:
    claim = (
        "k-means in place of LSH lowers perplexity (abstract of the k-means HyperAttention work)"
    )
    pairs = [("paper, LSH", "paper, k-means"), ("LSH of 16, p=16", "k-means of 16, p=16")]
    length = losses.lengths[-1] if losses.lengths else 0
    texts, wins = [], []
    for one, other in pairs:
        first, second = losses.get(one, length), losses.get(other, length)
        if first is not None and second is not None:
            texts.append(f"{math.exp(first['loss']):.2f} to {math.exp(second['loss']):.2f}")
            wins.append(second["loss"] < first["loss"])
    if not texts:
        return Verdict(claim=claim, outcome="not measured", numbers="no rows")
    outcome = "reproduced" if all(wins) else "partly" if any(wins) else "not reproduced"
    numbers = "; ".join(texts) + " (the paper's structure; chunks with probes)"
    return Verdict(claim=claim, outcome=outcome, numbers=numbers)


def _perplexity_sections(losses: _Losses) -> list[Section]:
    sections = []
    for length in losses.lengths:
        lines = []
        for name in losses.names:
            row = losses.get(name, length)
            if row is not None:
                lines.append(
                    [
                        name,
                        percent_text(row["visited"]),
                        f"{math.exp(row['loss']):.2f}",
                        _rise_text(losses.rise(name, length)),
                        f"{math.exp(row['loss_second_half']):.2f}",
                    ]
                )
        sections.append(
            Section(
                heading=f"Perplexity at {count_text(length)} tokens",
                caption="Held-out books, all full-attention layers replaced, weights untouched. "
                "Visited: share of the causal scores computed. Rise over exact attention, with "
                "its 95 % interval over documents. Second half: tokens in the second half of the "
                "text, which have the most to miss.",
                table=Table(
                    head=["setting", "visited", "perplexity", "rise", "second half"], lines=lines
                ),
            )
        )
    return sections


def _layer_losses(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for row in _of(rows, "layers"):
        found.setdefault(row["setting"], {})[row["layers"]] = row["loss"]
    return {name: dict(sorted(found[name].items())) for name in _in_order(list(found))}


def _layer_sections(rows: Sequence[Row]) -> list[Section]:
    found = {name: curve for name, curve in _layer_losses(rows).items() if len(curve) > 1}
    if not found:
        return []
    counts = sorted({count for curve in found.values() for count in curve})
    lines, series = [], []
    for index, (name, curve) in enumerate(found.items()):
        cells = [f"{math.exp(curve[n]):.2f}" if n in curve else MISSING for n in counts]
        lines.append([name, *cells])
        series.append(
            Series(label=name, colour=index % NUM_COLOURS, x=[float(n) for n in curve],
                   y=[math.exp(loss) for loss in curve.values()])
        )  # fmt: skip
    return [
        Section(
            heading="Perplexity by patched layers",
            caption="The last so many layers are replaced, the others stay exact.",
            svg=line_plot(
                series, x_title="patched layers", y_title="perplexity",
                x_ticks=[float(n) for n in counts], x_text=lambda x: f"{x:.0f}",
                y_text=lambda y: f"{y:g}",
            ),
            legend=[(one.label, one.colour) for one in series],
            table=Table(head=["setting", *(str(n) for n in counts)], lines=lines),
        )
    ]  # fmt: skip


def _task_sections(rows: Sequence[Row]) -> list[Section]:
    found = {(r["setting"], r["task"], r["tokens"]): r for r in _of(rows, "task")}
    names = _in_order([name for name, _, _ in found])
    tasks = list(dict.fromkeys(task for _, task, _ in found))
    sections = []
    for length in sorted({tokens for _, _, tokens in found}):
        lines = []
        for name in names:
            cells = []
            for task in tasks:
                row = found.get((name, task, length))
                cells.append(MISSING if row is None else _score_text(row["scores"]))
            lines.append([name, *cells])
        sections.append(
            Section(
                heading=f"Tasks at {count_text(length)} tokens",
                caption="Percent right, with 95 % intervals over prompts. Needles: every token of "
                "the number is the first choice. Variables and common words: share of the right "
                "words among as many likeliest ones; by chance 25 % and about 9 %.",
                table=Table(head=["setting", *tasks], lines=lines),
            )
        )
    return sections


def _score_text(scores: Sequence[float]) -> str:
    mean = 100 * statistics.fmean(scores)
    error = 100 * _Z * standard_error(scores) if len(scores) > 1 else math.nan
    return f"{mean:.0f}" if math.isnan(error) else f"{mean:.0f} ± {error:.0f}"


def _mass_sections(rows: Sequence[Row]) -> list[Section]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in _of(rows, "mass"):
        for line in row["lines"]:
            pair = (line["captured_mass"], line["error"])
            lines.setdefault(line["name"], []).append(pair)
    if not lines:
        return []
    layers = max(len(pairs) for pairs in lines.values())
    return [
        Section(
            heading="Captured mass",
            caption=f"Share of the softmax mass in the clusters that a query opens, over "
            f"{layers} layers and all heads of one document; and the relative error of a head's "
            "output.",
            table=Table(
                head=["index", "layers", "mean", "worst layer", "error"],
                lines=[
                    [
                        name,
                        str(len(pairs)),
                        percent_text(statistics.fmean(mass for mass, _ in pairs)),
                        percent_text(min(mass for mass, _ in pairs)),
                        value_text(statistics.fmean(error for _, error in pairs)),
                    ]
                    for name, pairs in lines.items()
                ],
            ),
        )
    ]


def _paper_section() -> Section:
    lines = [
        [
            "paper, 32k, some layers",
            f"{PAPER_EXACT} to {PAPER_HYPER}",
            f"{true_perplexity(PAPER_EXACT):.1f} to {true_perplexity(PAPER_HYPER):.1f}",
        ]
    ]
    lines += [
        [
            f"others with the same script, {count_text(length)}, all 28 layers",
            f"{exact} to {hyper}",
            f"{true_perplexity(exact):.1f} to {true_perplexity(hyper):.1f}",
        ]
        for length, (exact, hyper) in OTHERS_ALL_LAYERS.items()
    ]
    return Section(
        heading="The paper's own numbers",
        caption="ChatGLM2-6B-32k on LongBench texts. The authors' script raises 2, not e, to a "
        "loss in nats, so what it prints is not perplexity; the last column is e to the same "
        "loss (nearly: the script averages over documents after the power). Not measured by us.",
        table=Table(head=["setting", "printed", "perplexity"], lines=lines),
    )


def _facts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    facts = [("model", f"{rows[0]['model']}, {rows[0].get('dtype', 'float32')}")]
    documents = {row["num_documents"] for row in _of(rows, "perplexity")}
    if documents:
        facts.append(("documents", ", ".join(str(n) for n in sorted(documents))))
    prompts = {row["prompts"] for row in _of(rows, "task")}
    if prompts:
        facts.append(("prompts per task", ", ".join(str(n) for n in sorted(prompts))))
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    facts.append(("time in perplexity and tasks", f"{seconds / 60:.1f} min"))
    return facts


def _differences(models: Sequence[str]) -> list[str]:
    return [
        f"The model is {' or '.join(models)} at its trained length; the paper's is ChatGLM2-6B-32k "
        "at 32k, where a cheaper method has more to skip and a larger model more to spare.",
        "Held-out books before 1929 in place of LongBench texts; perplexity is e to the mean loss.",
        '"paper" settings follow the paper and its code: recursion over halves, blocks of sorted '
        "tokens, 256 uniform samples; overlapping entries are counted once, which the code does "
        "not do.",
        "Tasks are made in the manner of RULER; they are not its files, and need no generation.",
    ]


def _environment(rows: Sequence[Row]) -> list[tuple[str, str]]:
    shown = []
    for name in ("device", "driver", "torch", "triton", "python", "longspan", "commit"):
        values = list(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None))
        if values:
            shown.append((name, ", ".join(values)))
    return shown
