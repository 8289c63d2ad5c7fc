"""Run the study: train each variant, ask it, keep the rows. What is finished is kept."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError, LongspanError, nearest_name
from ...eval.rows import RowFile, provenance, settings_key
from ...models.transformer import Transformer
from ...train.tokenizer import load_tokenizer
from ..clock import Clock, OutOfTime
from ..stick_breaking_length.data import StudyData
from .asking import HAYSTACKS, ask
from .sizes import FULL, SMALL, PasskeySizes
from .task import Words, read_words
from .training import Training, train_variant
from .variants import VARIANTS, gate_shares

__all__ = ["FULL", "SMALL", "STUDY", "PasskeyOutcome", "phases", "run_passkey"]

STUDY = "infini-passkey"
Row = Mapping[str, Any]

# Seconds of a step of each variant, in those of "linear": what a budget is planned with.
_COSTS = {"linear": 1.0, "local": 1.0, "full": 1.2, "prefilled": 1.3, "delta": 1.4,
          "detached": 1.5, "delta-corrected": 2.0}  # fmt: skip
_CALIBRATION = 8  # steps timed for a plan


@dataclass(frozen=True, kw_only=True, slots=True)
class PasskeyOutcome:
    """rows: all rows. is_finished: False if the time of this call was up or a phase failed.
    failures: one line each; the other phases ran.
    """

    rows: list[Row]
    is_finished: bool
    failures: list[str]


def phases(sizes: PasskeySizes) -> list[str]:
    """VARIANT:SEED, in the order in which they run: all variants of a seed, then the next seed."""
    return [f"{variant}:{seed}" for seed in sizes.seeds for variant in VARIANTS]


def run_passkey(
    data: StudyData,
    tokenizer: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    sizes: PasskeySizes = FULL,
    budget_minutes: float | None = None,
    steps: int | None = None,
    device: torch.device | str | None = None,
    stop_after: float | None = None,
    only: Sequence[str] | None = None,
    listener: Callable[[str], None] | None = None,
) -> PasskeyOutcome:
    """Run the study, or go on where it stopped.

    Args:
        data: of `open_data`. tokenizer: the tokenizer.json beside it.
        folder: gets rows.jsonl, plan.json and runs/ (training, with checkpoints and models).
        sizes: FULL or SMALL.
        budget_minutes: what all of `only` may take on this device; the number of steps, the same
            for all variants, follows. Default: `steps`.
        steps: of each training. Default: those of `sizes`.
        device: default: a GPU where there is one.
        stop_after: seconds after which this call returns; call again to go on.
        only: phases: names of variants, seeds as ":0", or both as "linear:0". Default: all. For
            several processes, give each other phases and another folder, and the same `steps`.
        listener: called with a line of text for each thing that is done.

    Raises:
        ConfigError: `only` names no phase, or the tokenizer has no single digits.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    study = _Study(
        data=data, words=read_words(load_tokenizer(tokenizer)), home=Path(folder), sizes=sizes,
        device=device, clock=Clock(stop_after), say=listener or (lambda text: None),
        chosen=_chosen(only, phases(sizes)), budget=budget_minutes, steps=steps,
    )  # fmt: skip
    with RowFile(Path(folder) / "rows.jsonl") as rows:
        study.rows = rows
        finished = True
        try:
            study.run()
        except OutOfTime:
            finished = False
        return PasskeyOutcome(
            rows=list(rows.rows),
            is_finished=finished and not study.failures,
            failures=study.failures,
        )


def _chosen(only: Sequence[str] | None, known: list[str]) -> list[str]:
    if only is None:
        return known

    def matches(name: str, phase: str) -> bool:
        variant, seed = phase.split(":")
        return name in (phase, variant, f":{seed}")

    for name in only:
        if not any(matches(name, phase) for phase in known):
            raise ConfigError(f"only: {name!r} is no phase. {nearest_name(name, known)}")
    return [phase for phase in known if any(matches(name, phase) for name in only)]


@dataclass(kw_only=True)
class _Study:
    data: StudyData
    words: Words
    home: Path
    sizes: PasskeySizes
    device: torch.device
    clock: Clock
    say: Callable[[str], None]
    chosen: list[str]
    budget: float | None
    steps: int | None
    rows: RowFile = field(init=False)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        # Books travel to the device once, in 32 bits; a prompt widens what it takes of them.
        self.train_book, self.heldout_book = (
            torch.from_numpy(file.ids[:].astype("int32")).to(self.device)
            for file in (self.data.train, self.data.heldout)
        )

    def run(self) -> None:
        """All phases; for each, the synthetic haystack first."""
        steps = self._plan()
        for phase in self.chosen:
            variant, seed = phase.split(":")
            try:
                self._phase(variant, int(seed), steps)
            except (OutOfTime, LongspanError):
                raise
            except Exception as error:  # a kernel or the memory of one phase
                traceback.print_exc()
                self.failures.append(f"{phase}: {type(error).__name__}: {error}")
                self.say(f"FAILED: {self.failures[-1]}")

    def _plan(self) -> int:
        path = self.home / "plan.json"
        if path.exists():
            return int(json.loads(path.read_text())["steps"])
        steps, seconds = self.steps or self.sizes.steps, None
        if self.steps is None and self.budget is not None:
            seconds = self._seconds_per_step()
            whole = sum(_COSTS[phase.split(":")[0]] for phase in self.chosen) * seconds
            every = self.sizes.log_every
            share = 60.0 * self.budget * self.sizes.step_share
            steps = max(2, int(share / whole / every)) * every
        plan = {"steps": steps, "budget_minutes": self.budget, "seconds_per_step": seconds}
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        aside.write_text(json.dumps(plan, indent=2))
        os.replace(aside, path)
        self.say(f"plan: {steps} steps of {self.sizes.tokens_per_step} tokens each")
        return steps

    def _seconds_per_step(self) -> float:
        """Of "linear", the mean over its stages by their shares."""
        total = 0.0
        folder = self.home / "runs" / "calibration"
        for stage in self.sizes.stages:
            one = dataclasses.replace(
                self.sizes, stages=(dataclasses.replace(stage, share=1.0),), log_every=_CALIBRATION
            )
            shutil.rmtree(folder, ignore_errors=True)
            training = self._training("linear", 0, 2 * _CALIBRATION, one)
            log = train_variant(training, folder, clock=Clock(), say=lambda text: None).rows
            total += stage.share * (log[1]["seconds"] - log[0]["seconds"]) / _CALIBRATION
        shutil.rmtree(folder, ignore_errors=True)
        return total

    def _phase(self, variant: str, seed: int, steps: int) -> None:
        name = {"variant": variant, "seed": seed}
        lengths = self._lengths(variant, seed)
        cells = [
            {**name, "haystack": haystack, "length": length}
            for haystack in HAYSTACKS
            for length in lengths
            if haystack != "book" or length in self.sizes.book_lengths
        ]
        missing = [cell for cell in cells if self.rows.find(self._key("passkey", cell)) is None]
        trained = self.rows.find(self._key("trained", name))
        if not missing and trained is not None:
            return
        model = self._model(variant, seed, steps)
        for cell in missing:
            self._ask(model, cell)

    def _lengths(self, variant: str, seed: int) -> list[int]:
        sizes = self.sizes
        if variant == "full":
            return list(sizes.full_lengths)
        if variant in ("local", "detached") and seed != sizes.seeds[0]:
            return list(sizes.control_lengths)
        return list(sizes.trials)

    def _training(
        self, variant: str, seed: int, steps: int, sizes: PasskeySizes | None = None
    ) -> Training:
        return Training(
            variant=VARIANTS[variant], seed=seed, steps=steps, sizes=sizes or self.sizes,
            words=self.words, vocab_size=self.data.train.vocab_size, book=self.train_book,
            device=self.device, dtype=self.dtype,
        )  # fmt: skip

    def _model(self, variant: str, seed: int, steps: int) -> Transformer:
        name = {"variant": variant, "seed": seed}
        folder = self.home / "runs" / f"{variant}-{seed}"
        if (folder / "model" / "model.safetensors").exists():
            return Transformer.load(folder / "model", device=self.device)
        self.clock.check(needed=2.0)
        training = self._training(variant, seed, steps)
        model, log = train_variant(training, folder, clock=self.clock, say=self.say)
        last = log[-1]
        if self.rows.find(self._key("trained", name)) is None:
            self._add("trained", name, {
                "steps": steps,
                "tokens": steps * self.sizes.tokens_per_step,
                "seconds": last["seconds"],
                "num_parameters": model.num_parameters,
                "dtype": str(self.dtype).removeprefix("torch."),
                "curve": [
                    [row["step"], row["length"], round(row["answer"], 4), round(row["right"], 4)]
                    for row in log
                ],
                "gates_before": log[0]["gates"],
                "gates": gate_shares(model),
                "sizes": dataclasses.asdict(self.sizes),
            })  # fmt: skip
        model.save(folder / "model")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return model

    def _ask(self, model: Transformer, cell: Row) -> None:
        self.clock.check(needed=8.0)
        length = cell["length"]
        begin = time.monotonic()
        result = ask(
            model, self.words, length=length, trials=self.sizes.trials[length],
            haystack=cell["haystack"], book=self.heldout_book, segment=self.sizes.segment,
            chunk_tokens=self.sizes.chunk_tokens, dtype=torch.float32,
        )  # fmt: skip
        self._add("passkey", cell, {**result, "segment": self.sizes.segment, "dtype": "float32"})
        found = "/".join(str(part["found"]) for part in result["cells"].values())
        self.say(
            f"{cell['variant']}, seed {cell['seed']}, {cell['haystack']}, {length}: {found} of "
            f"{self.sizes.trials[length]} at start/middle/end, {time.monotonic() - begin:.1f} s"
        )

    def _key(self, kind: str, settings: Mapping[str, Any]) -> str:
        return settings_key({"kind": kind, **settings})

    def _add(self, kind: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        self.rows.append(
            {"key": self._key(kind, settings), "study": STUDY, "kind": kind,
             **settings, **result, **provenance(self.device)}
        )  # fmt: skip
