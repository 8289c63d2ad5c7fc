"""Run the study: calibrate, train, evaluate, recall, small models. Finished rows are kept."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, LongspanError, nearest_name
from ...eval.extrapolation import book_windows, position_edges, position_losses, window_losses
from ...eval.rows import RowFile, provenance, settings_key
from ...eval.spans import span_profile
from ...models.transformer import Transformer
from ...train.batches import Batches, BatchSource
from ...train.config import TrainConfig
from ...train.loop import train
from ...train.tokens import TokenFile
from ...train.trained import with_settings
from ..clock import Clock, OutOfTime
from .data import StudyData
from .recall import VOCABULARY, RecallBatches, recall_accuracy
from .sizes import Sizes
from .speed import early_stop_rows, stopped
from .variants import READINGS, VARIANTS, Reading

__all__ = ["SIBLINGS", "Outcome", "run_study"]

Row = Mapping[str, Any]
Listener = Callable[[str], None]

RECALL_VARIANTS = ("stick-breaking", "rope", "nope")
SIBLINGS = ("stick-breaking", "rope")
_SPAN_THRESHOLDS = (0.5, 1e-2, 2.0**-14)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """rows: all rows. is_finished: False if the time of this call was up or a phase failed.
    failures: what failed, one line each; the other phases ran.
    """

    rows: list[Row]
    is_finished: bool
    failures: list[str]


def run_study(
    data: StudyData,
    folder: str | os.PathLike[str],
    *,
    sizes: Sizes,
    budget_minutes: float,
    device: torch.device | str | None = None,
    stop_after: float | None = None,
    compile: bool | None = None,
    listener: Listener | None = None,
    only: Sequence[str] | None = None,
) -> Outcome:
    """Run the study, or go on where it stopped.

    Args:
        data: of `open_data`.
        folder: gets rows.jsonl, plan.json, runs/ (training, with checkpoints) and models/ (the
            small models).
        sizes: FULL or SMALL.
        budget_minutes: what training and measuring may take on this device, all together; the
            number of training steps follows from it.
        device: default: a GPU where there is one.
        stop_after: seconds after which this call returns; call again to go on.
        compile: use torch.compile. Default: on a GPU.
        listener: called with a line of text for each thing that is done.
        only: phases to run, e.g. "length:rope", "small", "early-stop", "recall:nope"; a name
            before the colon takes all of its kind. Default: all. For several devices, run
            processes with other phases and other folders, and the same plan.json in each; their
            rows belong together (`tools/ship_study.py` takes several folders).

    Raises:
        ConfigError: `only` names no phase.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    study = _Study(
        data=data,
        home=Path(folder),
        sizes=sizes,
        budget=60.0 * budget_minutes,
        device=device,
        clock=Clock(stop_after),
        compile=device.type == "cuda" if compile is None else compile,
        say=listener or (lambda text: None),
        only=only,
    )
    with RowFile(study.home / "rows.jsonl") as rows:
        study.rows = rows
        try:
            study.run()
            finished = True
        except OutOfTime:
            finished = False
        return Outcome(
            rows=list(rows.rows),
            is_finished=finished and not study.failures,
            failures=study.failures,
        )


def chosen_phases(only: Sequence[str] | None, phases: Iterable[str]) -> list[str]:
    """The phases that are named, by themselves or by their kind, in the order of the study."""
    known = list(phases)
    if only is None:
        return known
    for name in only:
        if not any(name in (phase, phase.split(":")[0]) for phase in known):
            raise ConfigError(f"only: {name!r} is no phase. {nearest_name(name, known)}")
    return [phase for phase in known if phase in only or phase.split(":")[0] in only]


class _Study:
    """The phases, in order; each is skipped where its rows are there."""

    rows: RowFile

    def __init__(
        self,
        *,
        data: StudyData,
        home: Path,
        sizes: Sizes,
        budget: float,
        device: torch.device,
        clock: Clock,
        compile: bool,
        say: Listener,
        only: Sequence[str] | None,
    ) -> None:
        self.only = only
        self.data, self.home, self.sizes, self.budget = data, home, sizes, budget
        self.device, self.clock, self.compile, self.say = device, clock, compile, say
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.notes = provenance(device)
        self.failures: list[str] = []

    def run(self) -> None:
        """All phases. One that fails is reported, and those after it run."""
        plan = self._plan()
        steps, recall_steps = plan["steps"], plan["recall_steps"]
        phases: dict[str, Callable[[], None]] = {}
        for variant in VARIANTS:
            phases[f"length:{variant}"] = partial(self._variant, variant, steps)
        for variant in SIBLINGS:
            phases[f"small:{variant}"] = partial(self._sibling, variant, steps)
        phases["early-stop"] = partial(self._early_stop, steps)
        for variant in RECALL_VARIANTS:
            phases[f"recall:{variant}"] = partial(self._recall, variant, recall_steps)
        for name in chosen_phases(self.only, phases):
            self._attempt(name, phases[name])

    def _attempt(self, name: str, phase: Callable[[], None]) -> None:
        try:
            phase()
        except (OutOfTime, LongspanError):
            raise
        except Exception as error:  # a kernel or the memory of one phase
            traceback.print_exc()
            self.failures.append(f"{name}: {type(error).__name__}: {error}")
            self.say(f"FAILED: {self.failures[-1]}")

    # Planning

    def _plan(self) -> dict[str, Any]:
        """Steps that fit into the budget, the same for all variants; kept in plan.json."""
        path = self.home / "plan.json"
        if path.exists():
            plan: dict[str, Any] = json.loads(path.read_text())
            return plan
        seconds = {variant: self._seconds_per_step(variant) for variant in VARIANTS}
        share = self.sizes.training_share * self.budget
        every = self.sizes.log_every
        steps = max(2, int(share / sum(seconds.values()) / every)) * every
        minutes = self.budget / 60.0
        plan = {
            "budget_minutes": minutes,
            "steps": steps,
            "recall_steps": max(20, round(self.sizes.recall_steps * minutes)),
            "seconds_per_step": seconds,
            "calibration_seconds": round(self.clock.seconds, 1),
        }
        _write_text(path, json.dumps(plan, indent=2))
        tokens = steps * self.sizes.batch_size * self.sizes.length
        self._add(
            "plan",
            {},
            {
                **plan,
                "tokens": tokens,
                "epochs": tokens / len(self.data.train.ids),
                "train_sha256": self.data.train.sha256,
                "heldout_sha256": self.data.heldout.sha256,
                "vocab_size": self.data.train.vocab_size,
                "sizes": dataclasses.asdict(self.sizes),
            },
        )
        self.say(f"plan: {steps} steps of {self.sizes.batch_size * self.sizes.length} tokens")
        return plan

    def _seconds_per_step(self, variant: str) -> float:
        self.clock.check()
        count = self.sizes.calibration_steps
        config = self._config(variant, steps=count)
        config = dataclasses.replace(config, log_every=count // 4 or 1, checkpoint_every=count * 9)
        config = dataclasses.replace(
            config, checkpoint_every=config.log_every * max(1, count // config.log_every)
        )
        folder = self.home / "runs" / f"calibration-{variant}"
        shutil.rmtree(folder, ignore_errors=True)
        rows = train(config, self._batches(config), folder, device=self._accelerate_device()).rows
        shutil.rmtree(folder, ignore_errors=True)
        speeds = [row["tokens_per_second"] for row in rows[1:]] or [rows[0]["tokens_per_second"]]
        seconds = float(config.tokens_per_step / statistics.median(speeds))
        self.say(f"{variant}: {1e3 * seconds:.1f} ms per step, compiled: {rows[-1]['compiled']}")
        return seconds

    # The compared models

    def _variant(self, variant: str, steps: int) -> None:
        config = self._config(variant, steps=steps)
        readings = [reading for reading in READINGS if reading.variant == variant]
        wanted = [
            *(self._key("length", {"reading": r.name, "length": n})
              for r in readings for n in self.sizes.lengths),
            *(self._key("positions", {"reading": r.name}) for r in readings),
            *([self._key("spans", {"variant": variant})] if variant in SIBLINGS else []),
        ]  # fmt: skip
        trained = self._key("trained", {"variant": variant})
        if all(self.rows.find(key) for key in [trained, *wanted]):
            return
        model, log = self._train(config, self._batches(config), f"length-{variant}")
        if self.rows.find(trained) is None:
            self._add("trained", {"variant": variant}, self._summary(config, model, log))
        for reading in readings:
            self._evaluate(reading, model)
        if variant in SIBLINGS:
            self._spans(variant, model)

    def _evaluate(self, reading: Reading, model: Transformer) -> None:
        longest = self.sizes.lengths[-1]
        windows, books = book_windows(
            self.data.heldout, length=longest, per_book=self.sizes.windows_per_book
        )
        for length in self.sizes.lengths:
            key = {"reading": reading.name, "length": length}
            is_last = length == longest
            positions = {"reading": reading.name}
            done = self._find("length", key)
            if done and (not is_last or self._find("positions", positions)):
                continue
            self.clock.check(needed=5.0)
            scaling = reading.scaling(length, self.sizes.length)
            read = with_settings(model, rope_scaling=scaling) if scaling else model
            losses = window_losses(read, windows, length=length, dtype=self.dtype)
            means = losses.double().mean(1).tolist()
            loss = statistics.fmean(means)
            if not done:
                self._add(
                    "length",
                    key,
                    {
                        "loss": loss,
                        "window_losses": [round(mean, 6) for mean in means],
                        "books": books,
                        "num_tokens": losses.numel(),
                        "scaling": dataclasses.asdict(scaling) if scaling else None,
                    },
                )
            if is_last:
                edges = position_edges(longest)
                self._add("positions", positions, {"buckets": position_losses(losses, edges)})
            self.say(f"{reading.label} at {length}: loss {loss:.4f}")

    def _spans(self, variant: str, model: Transformer) -> None:
        if self._find("spans", {"variant": variant}):
            return
        self.clock.check(needed=5.0)
        ids = self._longest_text(self.sizes.span_length)
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16
        ):
            profile = span_profile(model, ids, thresholds=_SPAN_THRESHOLDS)
        keep = ("layer", "head", "threshold", "p10", "p50", "p90", "mean", "unspent", "visible")
        heads = [{name: row[name] for name in keep} for row in profile]
        self._add(
            "spans",
            {"variant": variant},
            {"mechanism": profile[0]["mechanism"], "length": ids.shape[1], "heads": heads},
        )
        self.say(f"{variant}: spans of {len(heads) // len(_SPAN_THRESHOLDS)} heads")

    def _early_stop(self, steps: int) -> None:
        missing = [
            n for n in self.sizes.speed_lengths if not self._find("early_stop", {"length": n})
        ]
        if not missing:
            return
        config = self._config("stick-breaking", steps=steps)
        model, _ = self._train(config, self._batches(config), "length-stick-breaking")
        longest = self.sizes.lengths[-1]
        windows, _ = book_windows(self.data.heldout, length=longest, per_book=1)
        backends = ("flash", "cudnn") if self.device.type == "cuda" else ("cpu",)
        for length in missing:
            self.clock.check(needed=10.0)
            ids = self._longest_text(length)
            measured = early_stop_rows(model, ids, dtype=self.dtype, backends=backends)
            for row in measured:
                if row["mechanism"] == "stick_breaking" and length in self.sizes.lengths:
                    other = stopped(model, row["early_stop"])
                    losses = window_losses(other, windows, length=length, dtype=self.dtype)
                    row["loss"] = losses.double().mean().item()
            self._add("early_stop", {"length": length}, {"lines": measured})
            self.say(f"early stop at {length}: {measured[1]['visited_fraction']:.3f} of the tiles")

    # Recall

    def _recall(self, variant: str, steps: int) -> None:
        task = {"variant": variant, "vocab_size": VOCABULARY}
        tests = [
            n for n in self.sizes.recall_tests if not self._find("recall", {**task, "pairs": n})
        ]
        if not tests:
            return
        config = self.sizes.recall_config(variant, steps=steps, dtype=self._dtype_name())
        source = RecallBatches(
            self.sizes.recall_pairs, batch_size=config.batch_size, steps=steps, seed=config.seed
        )
        model, log = self._train(config, source, f"recall-{variant}")
        for pairs in tests:
            result = recall_accuracy(
                model, pairs, sequences=self.sizes.recall_sequences, seed=12_345, dtype=self.dtype
            )
            self._add(
                "recall",
                {**task, "pairs": pairs},
                {**result, "final_loss": log[-1]["loss"], "steps": steps,
                 "trained_pairs": list(self.sizes.recall_pairs)},
            )  # fmt: skip
        self.say(f"recall, {variant}: trained to loss {log[-1]['loss']:.3f}")

    # Small models

    def _sibling(self, variant: str, steps: int) -> None:
        key = {"variant": variant}
        target = self.home / "models" / variant
        if self._find("sibling", key) and (target / "model.safetensors").exists():
            return
        config = self.sizes.sibling_config(
            variant, self.data.train.vocab_size, steps=self.sizes.sibling_factor * steps,
            dtype=self._dtype_name(), compile=self.compile,
        )  # fmt: skip
        model, log = self._train(config, self._batches(config), f"sibling-{variant}")
        kept = model.to(torch.bfloat16)
        kept.save(target)
        kept = Transformer.load(target, device=self.device).float()
        windows, _ = book_windows(
            self.data.heldout, length=self.sizes.lengths[-1], per_book=self.sizes.windows_per_book
        )
        losses = {
            length: window_losses(kept, windows, length=length, dtype=self.dtype)
            .double().mean().item()
            for length in (self.sizes.lengths[0], self.sizes.lengths[-1])
        }  # fmt: skip
        self._add(
            "sibling",
            key,
            {
                **self._summary(config, kept, log),
                "losses": {str(length): loss for length, loss in losses.items()},
                "bytes": (target / "model.safetensors").stat().st_size,
            },
        )
        self.say(f"small model, {variant}: loss {losses[self.sizes.lengths[0]]:.4f}")

    # Shared

    def _config(self, variant: str, *, steps: int) -> TrainConfig:
        return self.sizes.train_config(
            variant, self.data.train.vocab_size, steps=steps,
            dtype=self._dtype_name(), compile=self.compile,
        )  # fmt: skip

    def _batches(self, config: TrainConfig) -> Batches:
        return Batches(
            self.data.train, length=config.length, batch_size=config.batch_size, seed=config.seed
        )

    def _train(
        self, config: TrainConfig, source: BatchSource, name: str
    ) -> tuple[Transformer, list[Row]]:
        self.clock.check()
        folder = self.home / "runs" / name
        if (folder / "model" / "model.safetensors").exists():
            return self._load(name), _read_log(folder)

        def listener(row: Row) -> None:
            if row["step"] % (5 * config.log_every) == 0 or row["step"] == config.steps:
                left = (config.steps - row["step"]) * config.tokens_per_step
                self.say(
                    f"{name}: step {row['step']} of {config.steps}, loss {row['loss']:.4f}, "
                    f"{left / row['tokens_per_second']:.0f} s left"
                )

        result = train(
            config,
            source,
            folder,
            device=self._accelerate_device(),
            listener=listener,
            time_limit=self.clock.left,
        )
        if not result.is_finished:
            raise OutOfTime
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return result.model.eval(), result.rows

    def _load(self, name: str) -> Transformer:
        return Transformer.load(self.home / "runs" / name / "model", device=self.device)

    def _summary(
        self, config: TrainConfig, model: Transformer, log: Sequence[Row]
    ) -> dict[str, Any]:
        speeds = [row["tokens_per_second"] for row in log[1:]] or [log[0]["tokens_per_second"]]
        shares = [row["mfu"] for row in log[1:] if row["mfu"] is not None]
        step = max(1, len(log) // 50)
        return {
            "num_parameters": model.num_parameters,
            "steps": config.steps,
            "tokens": config.steps * config.tokens_per_step,
            "seconds": log[-1]["seconds"],
            "tokens_per_second": statistics.median(speeds),
            "mfu": statistics.median(shares) if shares else None,
            "compiled": log[-1]["compiled"],
            "dtype": config.dtype,
            "final_loss": statistics.fmean(row["loss"] for row in log[-5:]),
            "curve": [[row["step"], round(row["loss"], 5)] for row in log[::step]],
        }

    def _longest_text(self, length: int) -> Tensor:
        ids = _longest_document(self.data.heldout)
        if len(ids) < length:
            self.say(f"the longest text has {len(ids)} tokens, not {length}")
        return torch.from_numpy(ids[:length].astype("int64"))[None].to(self.device)

    def _dtype_name(self) -> str:
        return "bfloat16" if self.dtype is torch.bfloat16 else "float32"

    def _accelerate_device(self) -> str | None:
        return "cpu" if self.device.type == "cpu" else None

    def _key(self, kind: str, settings: Mapping[str, Any]) -> str:
        return settings_key({"kind": kind, **settings})

    def _find(self, kind: str, settings: Mapping[str, Any]) -> Row | None:
        return self.rows.find(self._key(kind, settings))

    def _add(self, kind: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        self.rows.append(
            {
                "key": self._key(kind, settings),
                "study": "stick-breaking-length",
                "kind": kind,
                **settings,
                **result,
                **self.notes,
            }
        )


def _longest_document(tokens: TokenFile) -> Any:
    documents: Iterator[Any] = (tokens.document(i) for i in range(len(tokens.names)))
    return max(documents, key=len)


def _read_log(folder: Path) -> list[Row]:
    from ...eval.rows import read_rows

    return list(read_rows(folder / "log.jsonl"))


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.write_text(text)
    os.replace(aside, path)
