"""Run the study: a base model, then a few hundred steps under each attention, then the losses."""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...eval.extrapolation import book_windows, window_losses
from ...eval.rows import RowFile, provenance, settings_key
from ...exact.config import ExactConfig
from ...hyper import HyperConfig
from ...models.transformer import Transformer
from ...models.transformer_config import TransformerConfig
from ...train.batches import Batches
from ...train.config import TrainConfig
from ...train.loop import train
from ...train.trained import with_settings
from ..clock import Clock, OutOfTime
from ..stick_breaking_length.data import StudyData

__all__ = ["FULL", "SMALL", "TUNED", "FinetuneOutcome", "FinetuneSizes", "run_finetune"]

Row = Mapping[str, Any]

#: Name -> attention in the continued training, forward and backward. The default, which has no
#: kernels yet, is the slow one and comes last.
TUNED: dict[str, Any] = {
    "exact": ExactConfig(),
    "paper, LSH": HyperConfig(
        structure="recursion", index="lsh", center_keys=False, residual="uniform",
        num_samples=256, num_projections=7, num_sinks=0,
    ),
    "paper, k-means": HyperConfig(
        structure="recursion", index="kmeans", residual="uniform", num_samples=256,
        num_projections=7, num_sinks=0,
    ),
    "default": HyperConfig(),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSizes:
    """model: sizes. length: of all training and of what is measured. base_batch, tune_batch:
    sequences per step; base_steps, tune_steps; base_rate, tune_rate: peaks. windows_per_book:
    measured. smallest: `min_length` of the mechanisms, below which they are exact; None keeps
    theirs.
    """

    model: dict[str, int]
    length: int
    base_batch: int
    tune_batch: int
    base_steps: int
    tune_steps: int
    base_rate: float
    tune_rate: float
    windows_per_book: int
    log_every: int
    smallest: int | None = None


FULL = FinetuneSizes(
    model={"width": 512, "layers": 6, "heads": 8, "mlp_width": 1408},
    length=8192,
    base_batch=8,
    tune_batch=1,
    base_steps=400,
    tune_steps=200,
    base_rate=2e-3,
    tune_rate=4e-4,
    windows_per_book=2,
    log_every=10,
)

SMALL = FinetuneSizes(
    model={"width": 64, "layers": 2, "heads": 2},
    length=2048,
    base_batch=1,
    tune_batch=1,
    base_steps=60,
    tune_steps=20,
    base_rate=4e-3,
    tune_rate=1e-3,
    windows_per_book=1,
    log_every=5,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneOutcome:
    """rows: all rows. is_finished: False if the time of this call was up."""

    rows: list[Row]
    is_finished: bool


def run_finetune(
    data: StudyData,
    folder: str | os.PathLike[str],
    *,
    sizes: FinetuneSizes = FULL,
    device: torch.device | str | None = None,
    stop_after: float | None = None,
    compile: bool | None = None,
    listener: Callable[[str], None] | None = None,
) -> FinetuneOutcome:
    """Run the study, or go on where it stopped.

    Args:
        data: of `open_data`.
        folder: gets rows.jsonl and runs/ (training, with checkpoints).
        sizes: FULL or SMALL.
        device: default: a GPU where there is one.
        stop_after: seconds after which this call returns; call again to go on.
        compile: use torch.compile for the exact runs. Default: on a GPU.
        listener: called with a line of text for each thing that is done.

    Semantics:
        Every continuation starts with the weights of the base and fresh optimizer state, and sees
        the same batches, which the base has not seen in this order. The exact one is the control:
        what more training gives by itself. Each model is measured under exact attention and under
        what it was tuned with, the base under all.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with RowFile(Path(folder) / "rows.jsonl") as rows:
        study = _Study(
            data=data, home=Path(folder), sizes=sizes, device=device, rows=rows,
            clock=Clock(stop_after), say=listener or (lambda text: None),
            compile=device.type == "cuda" if compile is None else compile,
        )  # fmt: skip
        finished = True
        try:
            study.run()
        except OutOfTime:
            finished = False
        return FinetuneOutcome(rows=list(rows.rows), is_finished=finished)


@dataclass(kw_only=True)
class _Study:
    data: StudyData
    home: Path
    sizes: FinetuneSizes
    device: torch.device
    rows: RowFile
    clock: Clock
    compile: bool
    say: Callable[[str], None]

    def run(self) -> None:
        base = self._model("base")
        for name in TUNED:
            self._measure("base", base, name)
        for name in TUNED:
            tuned = self._model(name)
            for reading in dict.fromkeys(("exact", name)):
                self._measure(name, tuned, reading)

    def _model(self, name: str) -> Transformer:
        """The base, or its continuation under an attention; trained if it is not there."""
        folder = self.home / "runs" / name.replace(", ", "-")
        if (folder / "model" / "model.safetensors").exists():
            return Transformer.load(folder / "model", device=self.device)
        self.clock.check()
        config = self._config(name)
        result = train(
            config,
            self._batches(config),
            folder,
            device="cpu" if self.device.type == "cpu" else None,
            time_limit=self.clock.left,
            start=None if name == "base" else self.home / "runs" / "base" / "model",
            listener=lambda row: self.say(f"{name}: step {row['step']}, loss {row['loss']:.4f}"),
        )
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
                "sizes": dataclasses.asdict(self.sizes),
            },
        )
        return result.model.eval()

    def _measure(self, name: str, model: Transformer, reading: str) -> None:
        key = {"model": name, "reading": reading}
        if self.rows.find(self._key("loss", key)):
            return
        self.clock.check(needed=3.0)
        windows, books = book_windows(
            self.data.heldout, length=self.sizes.length, per_book=self.sizes.windows_per_book
        )
        read = with_settings(model, attention=self._attention(reading))
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        losses = window_losses(read, windows, length=self.sizes.length, dtype=dtype)
        means = losses.double().mean(1).tolist()
        self._add(
            "loss",
            key,
            {"loss": statistics.fmean(means), "window_losses": means, "books": books,
             "attention": str(self._attention(reading))},
        )  # fmt: skip
        self.say(f"{name} read under {reading}: loss {statistics.fmean(means):.4f}")

    def _attention(self, name: str) -> Any:
        config = TUNED[name]
        if self.sizes.smallest is not None and isinstance(config, HyperConfig):
            config = dataclasses.replace(config, min_length=self.sizes.smallest)
        return config

    def _config(self, name: str) -> TrainConfig:
        sizes, is_base = self.sizes, name == "base"
        steps = sizes.base_steps if is_base else sizes.tune_steps
        model = TransformerConfig(
            vocab_size=self.data.train.vocab_size,
            positions="rope",
            attention=self._attention("exact" if is_base else name),
            **dict[str, Any](sizes.model),
        )
        return TrainConfig(
            model=model,
            steps=steps,
            length=sizes.length,
            batch_size=sizes.base_batch if is_base else sizes.tune_batch,
            learning_rate=sizes.base_rate if is_base else sizes.tune_rate,
            warmup_steps=max(1, steps // 10),
            seed=0 if is_base else 1,
            dtype="bfloat16" if self.device.type == "cuda" else "float32",
            compile=self.compile and name in ("base", "exact"),
            log_every=sizes.log_every,
            checkpoint_every=5 * sizes.log_every,
        )

    def _batches(self, config: TrainConfig) -> Batches:
        return Batches(
            self.data.train, length=config.length, batch_size=config.batch_size, seed=config.seed
        )

    def _key(self, kind: str, settings: Mapping[str, Any]) -> str:
        return settings_key({"kind": kind, **settings})

    def _add(self, kind: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        self.rows.append(
            {
                "key": self._key(kind, settings),
                "study": "hyper-finetune",
                "kind": kind,
                **settings,
                **result,
                **provenance(self.device),
            }
        )
