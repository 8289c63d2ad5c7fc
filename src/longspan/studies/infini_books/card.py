"""The model card of the small model, from the rows of the study that made it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from ...eval.report.numbers import bytes_text, count_text
from .page import build_report
from .run import KEPT

__all__ = ["model_card"]


def model_card(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown with what was measured on the file as it is kept.

    Args:
        rows: of `run_books`.

    Raises:
        ConfigError: the study has not made the model yet.
    """
    kept = {row["length"]: row for row in rows if row["kind"] == "kept"}
    trained = [row for row in rows if row["kind"] == "trained" and row["model"] == KEPT]
    if not kept or not trained:
        raise ConfigError(
            f"rows: none of the kept model {KEPT!r}. Allowed: rows of a finished study. Run "
            "longspan study infini-books to its end."
        )
    row, sizes, report = trained[-1], trained[-1]["sizes"], build_report(rows)
    model, lengths = sizes["model"], sorted(kept)
    lines = [f"| {count_text(n)} | {kept[n]['loss']:.4f} | {math.exp(kept[n]['loss']):.2f} |"
             for n in lengths]  # fmt: skip
    gates = [share for layer in row["gates"] for share in layer]
    return "\n".join(
        [
            f"# longspan-{KEPT}",
            "",
            "A small language model with Infini-attention: softmax within segments of "
            f"{count_text(sizes['segment'])} tokens, and a compressive memory of all before: "
            f"{count_text(row['num_parameters'])} parameters, width {model['width']}, "
            f"{model['layers']} layers, {model['heads']} heads, "
            f"{bytes_text(kept[lengths[0]]['bytes'])} in bfloat16. Made to show how attention "
            "behaves at length, not to be talked to: it continues prose.",
            "",
            f"Trained on {row['tokens'] / 1e6:.1f} M tokens of public-domain books (published "
            f"before 1929), {count_text(sizes['length'])} tokens at a time, training loss "
            f"{row['curve'][-1][1]:.4f} nats per token, on {row['device']}. Heads read between "
            f"{min(gates):.0%} and {max(gates):.0%} from the memory.",
            "",
            "Held-out books, loss in nats per token, so many tokens read at a time:",
            "",
            "| tokens read | loss | perplexity |",
            "|---:|---:|---:|",
            *lines,
            "",
            "Made by",
            "",
            "```",
            report.command,
            "```",
            "",
            f"Commit {row['commit']}, torch {row['torch']}. Licence of the weights: Apache-2.0.",
            "",
        ]
    )
