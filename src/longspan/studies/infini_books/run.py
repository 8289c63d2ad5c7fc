"""Run the study: train each model on long stretches of books, then measure the losses."""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError, nearest_name
from ...eval.extrapolation import book_windows, position_losses, window_losses
from ...eval.rows import RowFile, provenance, settings_key
from ...exact.config import ExactConfig
from ...infini.config import InfiniConfig
from ...models.transformer import Transformer
from ...models.transformer_config import TransformerConfig
from ...train.batches import Batches
from ...train.config import TrainConfig
from ...train.loop import train
from ...window.config import WindowConfig
from ..clock import Clock, OutOfTime
from ..stick_breaking_length.data import StudyData

__all__ = [
    "FULL",
    "KEPT",
    "LABELS",
    "SMALL",
    "BooksOutcome",
    "BooksSizes",
    "attention_of",
    "run_books",
]

Row = Mapping[str, Any]

#: Name -> label, in the order in which they are trained: what says most comes first.
LABELS = {
    "infini": "Infini, linear",
    "window": "window of one segment",
    "cache": "window of two segments",
    "infini-delta": "Infini, delta",
    "full": "full attention",
}
KEPT = "infini"  # the model that is saved in bfloat16 under models/


@dataclass(frozen=True, kw_only=True, slots=True)
class BooksSizes:
    """model: sizes. length: of training and of what is measured. segment: of the memory, and the
    window. batch_size: sequences per step. steps, learning_rate (peak). windows_per_book: measured.
    """

    model: dict[str, int]
    length: int
    segment: int
    batch_size: int
    steps: int
    learning_rate: float
    windows_per_book: int
    log_every: int


FULL = BooksSizes(
    model={"width": 192, "layers": 5, "heads": 3, "mlp_width": 512},
    length=32768,
    segment=2048,
    batch_size=2,
    steps=3000,
    learning_rate=4e-3,
    windows_per_book=2,
    log_every=10,
)

SMALL = BooksSizes(
    model={"width": 64, "layers": 2, "heads": 2},
    length=1024,
    segment=64,
    batch_size=2,
    steps=60,
    learning_rate=4e-3,
    windows_per_book=2,
    log_every=5,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BooksOutcome:
    """rows: all rows. is_finished: False if the time of this call was up."""

    rows: list[Row]
    is_finished: bool


def attention_of(name: str, segment: int) -> Any:
    """Attention of a model of LABELS.

    Raises:
        ConfigError: no model has this name.
    """
    known: dict[str, Any] = {
        "infini": InfiniConfig(segment_length=segment),
        "window": WindowConfig(window=segment),
        "cache": WindowConfig(window=2 * segment),
        "infini-delta": InfiniConfig(segment_length=segment, update="delta"),
        "full": ExactConfig(),
    }
    if name not in known:
        raise ConfigError(f"only: {name!r} is no model of this study. {nearest_name(name, known)}")
    return known[name]


def run_books(
    data: StudyData,
    folder: str | os.PathLike[str],
    *,
    sizes: BooksSizes = FULL,
    steps: int | None = None,
    device: torch.device | str | None = None,
    stop_after: float | None = None,
    only: Sequence[str] | None = None,
    compile: bool | None = None,
    listener: Callable[[str], None] | None = None,
) -> BooksOutcome:
    """Run the study, or go on where it stopped.

    Args:
        data: of `open_data`.
        folder: gets rows.jsonl, runs/ (training, with checkpoints) and models/.
        sizes: FULL or SMALL.
        steps: of each training, instead of those of `sizes`.
        device: default: a GPU where there is one.
        stop_after: seconds after which this call returns; call again to go on.
        only: names of LABELS; the others are left out.
        compile: use torch.compile. Default: on a GPU.
        listener: called with a line of text for each thing that is done.

    Semantics:
        All models have the same weights apart from the gates at the start, and see the same
        batches. Losses are of the same held-out tokens, read whole and cut into segments that are
        read by themselves; the second says what a model knows without anything before its segment.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if steps is not None:
        sizes = dataclasses.replace(sizes, steps=steps)
    with RowFile(Path(folder) / "rows.jsonl") as rows:
        study = _Study(
            data=data, home=Path(folder), sizes=sizes, device=device, rows=rows,
            clock=Clock(stop_after), say=listener or (lambda text: None),
            compile=device.type == "cuda" if compile is None else compile,
        )  # fmt: skip
        finished = True
        try:
            for name in only or LABELS:
                attention_of(name, sizes.segment)
                study.run(name)
        except OutOfTime:
            finished = False
        return BooksOutcome(rows=list(rows.rows), is_finished=finished)


def gates_of(model: Transformer) -> list[list[float]]:
    """Share of the memory by layer and head, sigmoid(gate); empty without memory."""
    return [
        torch.sigmoid(gate.detach().double().cpu()).tolist()
        for name, gate in model.named_parameters()
        if name.endswith("longspan_gate")
    ]


@dataclass(kw_only=True)
class _Study:
    data: StudyData
    home: Path
    sizes: BooksSizes
    device: torch.device
    rows: RowFile
    clock: Clock
    compile: bool
    say: Callable[[str], None]

    def run(self, name: str) -> None:
        model = self._model(name)
        for length in (self.sizes.length, self.sizes.segment):
            self._measure(name, model, length, "loss")
        if name == KEPT:
            target = self.home / "models" / name
            if not (target / "model.safetensors").exists():
                model.to(torch.bfloat16).save(target)
            kept = Transformer.load(target, device=self.device).float()
            for length in (self.sizes.length, self.sizes.segment):
                self._measure(name, kept, length, "kept",
                              bytes=(target / "model.safetensors").stat().st_size)  # fmt: skip

    def _model(self, name: str) -> Transformer:
        folder = self.home / "runs" / name
        if (folder / "model" / "model.safetensors").exists():
            return Transformer.load(folder / "model", device=self.device).eval()
        self.clock.check()
        config = self._config(name)
        first = gates_of(Transformer(config.model, seed=config.seed))
        result = train(
            config,
            Batches(self.data.train, length=config.length, batch_size=config.batch_size,
                    seed=config.seed),
            folder,
            device="cpu" if self.device.type == "cpu" else None,
            time_limit=self.clock.left,
            listener=lambda row: self._tell(name, config, row),
        )  # fmt: skip
        if not result.is_finished:
            raise OutOfTime
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        self._add(
            "trained",
            {"model": name},
            {
                "steps": config.steps,
                "tokens": config.steps * config.tokens_per_step,
                "seconds": result.rows[-1]["seconds"],
                "tokens_per_second": statistics.median(r["tokens_per_second"] for r in result.rows),
                "num_parameters": result.model.num_parameters,
                "curve": [[row["step"], round(row["loss"], 5)] for row in result.rows],
                "gates_before": first,
                "gates": gates_of(result.model),
                "attention": str(config.model.attention),
                "sizes": dataclasses.asdict(self.sizes),
                "compiled": result.rows[-1]["compiled"],
            },
        )
        return result.model.eval()

    def _tell(self, name: str, config: TrainConfig, row: Row) -> None:
        if row["step"] % (5 * config.log_every) == 0 or row["step"] == config.steps:
            self.say(f"{name}: step {row['step']} of {config.steps}, loss {row['loss']:.4f}")

    def _measure(self, name: str, model: Transformer, length: int, kind: str, **more: Any) -> None:
        key = {"model": name, "length": length}
        if self.rows.find(self._key(kind, key)):
            return
        self.clock.check(needed=2.0)
        sizes = self.sizes
        windows, books = book_windows(
            self.data.heldout, length=sizes.length, per_book=sizes.windows_per_book
        )
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        losses = window_losses(model, windows, length=length, dtype=dtype)
        means = losses.double().mean(1).tolist()
        edges = list(range(0, sizes.length + 1, sizes.segment))
        self._add(
            kind,
            key,
            {"loss": statistics.fmean(means), "window_losses": means, "books": books,
             "by_segment": [part["loss"] for part in position_losses(losses, edges)], **more},
        )  # fmt: skip
        self.say(f"{name}, {length} tokens at a time, {kind}: loss {statistics.fmean(means):.4f}")

    def _config(self, name: str) -> TrainConfig:
        sizes = self.sizes
        return TrainConfig(
            model=TransformerConfig(
                vocab_size=self.data.train.vocab_size,
                positions="rope",
                attention=attention_of(name, sizes.segment),
                **dict[str, Any](sizes.model),
            ),
            steps=sizes.steps,
            length=sizes.length,
            batch_size=sizes.batch_size,
            learning_rate=sizes.learning_rate,
            warmup_steps=max(1, sizes.steps // 10),
            dtype="bfloat16" if self.device.type == "cuda" else "float32",
            compile=self.compile,
            log_every=sizes.log_every,
            checkpoint_every=10 * sizes.log_every,
        )

    def _key(self, kind: str, settings: Mapping[str, Any]) -> str:
        return settings_key({"kind": kind, **settings})

    def _add(self, kind: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        self.rows.append(
            {
                "key": self._key(kind, settings),
                "study": "infini-books",
                "kind": kind,
                **settings,
                **result,
                **provenance(self.device),
            }
        )
