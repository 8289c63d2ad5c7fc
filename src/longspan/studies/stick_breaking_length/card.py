"""The model card of a small model, from the rows of the study that made it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from ...eval.report.numbers import bytes_text, count_text
from .page import build_report
from .variants import VARIANTS

__all__ = ["model_card"]


def model_card(rows: Sequence[Mapping[str, Any]], variant: str) -> str:
    """Markdown with what was measured on the file as it is kept.

    Args:
        rows: of `run_study`.
        variant: "stick-breaking" or "rope".

    Raises:
        ConfigError: the study has not made this model yet.
    """
    found = [row for row in rows if row["kind"] == "sibling" and row["variant"] == variant]
    if not found:
        raise ConfigError(
            f"rows: none of a small model {variant!r}. Allowed: rows of a finished study. Run "
            "longspan study stick-breaking-length to its end."
        )
    row, report = found[-1], build_report(rows)
    sizes = next(r for r in rows if r["kind"] == "plan")["sizes"]
    model = sizes["sibling"]
    lines = [
        f"| {count_text(int(length))} | {loss:.4f} | {math.exp(loss):.2f} |"
        for length, loss in row["losses"].items()
    ]
    return "\n".join(
        [
            f"# longspan-{variant}",
            "",
            f"A small language model with {VARIANTS[variant].label} attention: "
            f"{count_text(row['num_parameters'])} parameters, width {model['width']}, "
            f"{model['layers']} layers, {model['heads']} heads, {bytes_text(row['bytes'])} in "
            "bfloat16. Made to show how attention behaves at length, not to be talked to: it "
            "continues prose.",
            "",
            f"Trained on {row['tokens'] / 1e6:.1f} M tokens of public-domain books (published "
            f"before 1929), {count_text(sizes['length'])} tokens at a time, training loss "
            f"{row['final_loss']:.4f} nats per token, on {row['device']}.",
            "",
            "Held-out books, loss in nats per token, each token given what its part of so many "
            "tokens holds:",
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
