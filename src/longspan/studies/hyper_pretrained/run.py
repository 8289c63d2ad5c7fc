"""Run the study on one model: perplexity, patched layers, tasks, captured mass. Rows are kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError, nearest_name
from ...eval.data import Text
from ...eval.layers import count_full_layers
from ...eval.rows import RowFile, provenance, settings_key
from ...hf import parse_config
from ...mechanisms import mechanism_of_config
from ..clock import Clock, OutOfTime
from .measure import document_rows, layer_masses, patched, token_losses, visited_share
from .settings import SETTINGS, SHOWN, setting_text
from .tasks import TASKS, TaskPrompt, make_task, score_tasks

__all__ = ["PARTS", "PretrainedOutcome", "run_pretrained"]

PARTS = ("perplexity", "tasks", "layers", "mass")
_LAYER_STEP = 5
_ANSWER_ROOM = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainedOutcome:
    """rows: all rows. is_finished: False if the time of this call was up."""

    rows: list[Mapping[str, Any]]
    is_finished: bool


def run_pretrained(
    loaded: Any,
    texts: Sequence[Text],
    folder: str | os.PathLike[str],
    *,
    tokens: Sequence[int] = (4096, 8192),
    documents: int = 4,
    prompts: int = 50,
    batch: int = 4,
    settings: Sequence[str] | None = None,
    parts: Sequence[str] = PARTS,
    impl: str = "auto",
    stop_after: float | None = None,
    listener: Callable[[str], None] | None = None,
) -> PretrainedOutcome:
    """Measure a pretrained model with its attention replaced, or go on where that stopped.

    Args:
        loaded: of `longspan.models.load`; a model with the modules of Llama.
        texts: held-out; the first `documents` that are long enough give perplexity, the longest
            hides needles.
        folder: gets rows.jsonl.
        tokens: lengths. Layers and mass are measured at the last one.
        prompts: per task and length.
        batch: documents or prompts at a time.
        settings: names of SETTINGS or settings as they are typed. Default: all for perplexity,
            SHOWN for the rest.
        parts: of PARTS.
        impl: of the mechanisms.
        stop_after: seconds after which this call returns; call again to go on.
        listener: called with a line of text for each row.

    Raises:
        ConfigError: an unknown part, or texts that are too short.
    """
    for part in parts:
        if part not in PARTS:
            raise ConfigError(f"parts: {part!r} is none. {nearest_name(part, PARTS)}")
    with RowFile(Path(folder) / "rows.jsonl") as rows:
        study = _Study(
            loaded=loaded, texts=list(texts), rows=rows, documents=documents, prompts=prompts,
            batch=batch, impl=impl, clock=Clock(stop_after), say=listener or (lambda text: None),
        )  # fmt: skip
        finished = True
        try:
            for part in parts:
                for name in settings or (list(SETTINGS) if part == "perplexity" else SHOWN):
                    parse_config(setting_text(name))  # refuse before hours of work
            for part in parts:
                study.run(part, list(tokens), settings)
        except OutOfTime:
            finished = False
        return PretrainedOutcome(rows=list(rows.rows), is_finished=finished)


@dataclass(kw_only=True)
class _Study:
    loaded: Any
    texts: list[Text]
    rows: RowFile
    documents: int
    prompts: int
    batch: int
    impl: str
    clock: Clock
    say: Callable[[str], None]
    made: dict[tuple[str, int], list[TaskPrompt]] = field(default_factory=dict)

    def run(self, part: str, lengths: list[int], settings: Sequence[str] | None) -> None:
        if part == "perplexity":
            for length in lengths:
                for name in settings or SETTINGS:
                    self._perplexity(name, length)
        elif part == "tasks":
            for length in lengths:
                for name in settings or SHOWN:
                    for task in TASKS:
                        self._task(name, task, length)
        elif part == "layers":
            for name in settings or SHOWN:
                self._layers(name, lengths[-1])
        else:
            self._mass(lengths[-1])

    def _perplexity(self, name: str, length: int) -> None:
        """All full-attention layers patched."""
        key = {"setting": name, "tokens": length, "documents": self.documents}
        if self._find("perplexity", key):
            return
        ids = self._ids(length)
        config = parse_config(setting_text(name))
        begin = time.perf_counter()
        with patched(self.loaded.model, config, impl=self.impl):
            losses = token_losses(self.loaded.model, ids, batch=self.batch)
        result = {
            "config": str(config),
            "num_documents": len(ids),
            "visited": visited_share(config, length),
            "loss": losses.double().mean().item(),
            "loss_second_half": losses[:, length // 2 :].double().mean().item(),
            "document_losses": losses.double().mean(1).tolist(),
            "seconds": time.perf_counter() - begin,
        }
        self._add("perplexity", key, result)
        self.say(f"{name} at {length}: loss {result['loss']:.4f}")

    def _layers(self, name: str, length: int) -> None:
        """Loss against the number of patched layers, the last ones first."""
        config = parse_config(setting_text(name))
        total = count_full_layers(self.loaded.model)
        counts = sorted({*range(0, total, _LAYER_STEP), total})
        for count in [0] if mechanism_of_config(config).is_exact else counts:
            key = {"setting": name, "tokens": length, "documents": self.documents, "layers": count}
            if self._find("layers", key):
                continue
            ids = self._ids(length)
            chosen = config if count else parse_config("exact")
            with patched(self.loaded.model, chosen, layers=f"last:{count}", impl=self.impl):
                losses = token_losses(self.loaded.model, ids, batch=self.batch)
            loss = losses.double().mean().item()
            self._add("layers", key, {"loss": loss, "visited": visited_share(config, length)})
            self.say(f"{name}, {count} layers: loss {loss:.4f}")

    def _task(self, name: str, task: str, length: int) -> None:
        key = {"setting": name, "task": task, "tokens": length, "prompts": self.prompts}
        if self._find("task", key):
            return
        self.clock.check(needed=1.0)
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        config = parse_config(setting_text(name))
        made = self._prompts(task, length)
        scores: list[float] = []
        begin = time.perf_counter()
        with patched(model, config, impl=self.impl):
            for start in range(0, self.prompts, self.batch):
                self.clock.check()
                scores += score_tasks(model, tokenizer, made[start : start + self.batch])
        mean = sum(scores) / len(scores)
        self._add(
            "task",
            key,
            {"score": mean, "scores": scores, "visited": visited_share(config, length),
             "seconds": time.perf_counter() - begin},
        )  # fmt: skip
        self.say(f"{name}, {task} at {length}: {100 * mean:.1f} %")

    def _prompts(self, task: str, length: int) -> list[TaskPrompt]:
        """Made once: all settings read the same."""
        if (task, length) not in self.made:
            book = max((text.text for text in self.texts), key=len)
            self.made[task, length] = [
                make_task(
                    task, self.loaded.tokenizer, length=length - _ANSWER_ROOM, seed=seed, book=book
                )
                for seed in range(self.prompts)
            ]
        return self.made[task, length]

    def _mass(self, length: int) -> None:
        count = count_full_layers(self.loaded.model)
        missing = [
            n for n in range(count) if not self._find("mass", {"tokens": length, "layer": n})
        ]
        if not missing:
            return
        ids = self._ids(length)[:1]
        lines: list[dict[str, Any]] = []
        for line in layer_masses(self.loaded.model, ids, missing):
            if lines and lines[-1]["layer"] != line["layer"]:
                self._keep_mass(length, lines)
                lines = []
                self.clock.check()
            lines.append(line)
        self._keep_mass(length, lines)

    def _keep_mass(self, length: int, lines: list[dict[str, Any]]) -> None:
        layer = lines[0]["layer"]
        self._add("mass", {"tokens": length, "layer": layer}, {"lines": lines})
        self.say(f"captured mass, layer {layer}")

    def _ids(self, length: int) -> torch.Tensor:
        self.clock.check(needed=1.0)
        texts = [text.text for text in self.texts[: self.documents]]
        return document_rows(self.loaded.tokenizer, texts, length).to(self.loaded.model.device)

    def _key(self, kind: str, settings: Mapping[str, Any]) -> str:
        return settings_key({"kind": kind, "sha256": self.loaded.sha256, **settings})

    def _find(self, kind: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        return self.rows.find(self._key(kind, settings))

    def _add(self, kind: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        self.rows.append(
            {
                "key": self._key(kind, settings),
                "study": "hyper-pretrained",
                "kind": kind,
                **settings,
                **result,
                "model": self.loaded.name,
                "sha256": self.loaded.sha256,
                "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
                **provenance(self.loaded.model.device),
            }
        )
