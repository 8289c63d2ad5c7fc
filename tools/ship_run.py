"""Take the model of a `longspan train` run into the repository, with a card of measured numbers.

    python tools/ship_run.py RUN_FOLDER NAME HELDOUT_FOLDER [--windows N] [--lengths A,B]

HELDOUT_FOLDER is a folder of `longspan study --prepare-only`. The model is kept in bfloat16 and
measured as it is kept. Refuses a file above 8 MB, and a run with another tokenizer than the models
that are there.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from longspan.eval.extrapolation import book_windows, window_losses
from longspan.eval.report.numbers import bytes_text, count_text
from longspan.eval.rows import provenance
from longspan.mechanisms import mechanism_of_config
from longspan.models import Transformer
from longspan.train import TokenFile, TrainConfig

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "src" / "longspan" / "models" / "shipped"
MOST_BYTES = 8_000_000


def ship(
    run: Path,
    name: str,
    heldout: TokenFile,
    *,
    start: str | None,
    windows: int,
    lengths: tuple[int, ...],
    shipped: Path = SHIPPED,
) -> Path:
    """Copy, measure and describe; nothing is left if a check fails. Returns the new folder."""
    if (run / "tokenizer.json").read_bytes() != (shipped / "tokenizer.json").read_bytes():
        raise SystemExit(f"{run} has another tokenizer than {shipped}")
    target = shipped / name
    made = target.with_name(f".{name}.part")
    Transformer.load(run / "model").to(torch.bfloat16).save(made)
    size = (made / "model.safetensors").stat().st_size
    if size > MOST_BYTES:
        (made / "model.safetensors").unlink()
        (made / "config.json").unlink()
        made.rmdir()
        raise SystemExit(f"{run} has {size} bytes in bfloat16, above {MOST_BYTES}")
    model = Transformer.load(made).float()
    rows, books = book_windows(heldout, length=lengths[-1], per_book=windows)
    losses = {n: window_losses(model, rows, length=n).double().mean().item() for n in lengths}
    text = card(run, name, model, losses, size=size, books=len(set(books)), start=start)
    (made / "README.md").write_text(text, encoding="utf-8")
    target.mkdir(exist_ok=True)
    for file in made.iterdir():
        file.replace(target / file.name)
    made.rmdir()
    return target


def card(
    run: Path,
    name: str,
    model: Transformer,
    losses: dict[int, float],
    *,
    size: int,
    books: int,
    start: str | None,
) -> str:
    """Markdown; every number is of the run or measured here."""
    config = TrainConfig.from_json((run / "train.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = log[-5:]
    attention = model.config.attention_of(0)
    mechanism = mechanism_of_config(attention).name
    notes: dict[str, Any] = provenance(torch.device("cpu"))
    gates = [
        share
        for key, gate in model.named_parameters()
        if key.endswith("longspan_gate")
        for share in torch.sigmoid(gate.detach()).tolist()
    ]
    segment = f":segment_length={attention.segment_length}" if mechanism == "infini" else ""
    begin = f" --start {start}" if start else ""
    tokens = config.steps * config.tokens_per_step
    came = f"It began with the weights of {start} and was trained" if start else "Trained"
    lines = [
        f"# longspan-{name}",
        "",
        f"A small language model with {mechanism} attention ({attention}): "
        f"{count_text(model.num_parameters)} parameters, width {model.config.width}, "
        f"{model.config.layers} layers, {model.config.heads} heads, {bytes_text(size)} in "
        "bfloat16. Made to show how attention behaves at length, not to be talked to: it "
        "continues prose.",
        "",
        f"{came} for {count_text(config.steps)} steps of {count_text(config.tokens_per_step)} "
        f"tokens ({tokens / 1e6:.1f} M) of public-domain books (published before 1929), "
        f"{count_text(config.length)} tokens at a time; training loss over the last "
        f"{len(last) * config.log_every} steps "
        f"{sum(r['loss'] for r in last) / len(last):.4f} nats per token, on {notes['device']}, "
        f"{config.dtype}.",
    ]
    if gates:
        lines += [
            "",
            f"Gates: heads read between {100 * min(gates):.0f} and {100 * max(gates):.0f} % from "
            f"the memory, {100 * sum(gates) / len(gates):.0f} % on average.",
        ]
    lines += [
        "",
        f"Held-out books ({books}), loss in nats per token, so many tokens read at a time, float32 "
        "of the bfloat16 weights:",
        "",
        "| tokens read | loss | perplexity |",
        "|---:|---:|---:|",
        *(f"| {count_text(n)} | {loss:.4f} | {math.exp(loss):.2f} |" for n, loss in losses.items()),
        "",
        "Made by",
        "",
        "```",
        f"longspan train --text books-train.tar.xz{begin} --attention {mechanism}{segment} "
        f"--length {config.length} --batch {config.batch_size} --steps {config.steps} "
        f"--learning-rate {config.learning_rate:g} --device cpu",
        "```",
        "",
        f"Commit {notes['commit']}, torch {notes['torch']}. Licence of the weights: Apache-2.0.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--start", help="what the run began with")
    parser.add_argument("--windows", type=int, default=1, help="per book")
    parser.add_argument("--lengths", default="512,2048,32768")
    chosen = parser.parse_args()
    heldout = TokenFile.open(chosen.heldout / "heldout.npy")
    lengths = tuple(int(n) for n in chosen.lengths.split(","))
    print(ship(chosen.run, chosen.name, heldout, start=chosen.start, windows=chosen.windows,
               lengths=lengths))  # fmt: skip


if __name__ == "__main__":
    main()
