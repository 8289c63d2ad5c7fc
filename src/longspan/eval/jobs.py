"""Jobs: one row each, skipped when the row is there already; sweeps are lists of jobs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .. import __version__
from ..errors import ConfigError
from .compare_plan import Candidate
from .layers import count_full_layers
from .passkey import run_cell
from .perplexity import perplexity
from .rows import RowFile, provenance, settings_key
from .scoring import Progress, SplitModel
from .tail import tail_loss

__all__ = [
    "Job",
    "Listener",
    "Subject",
    "passkey_jobs",
    "patched_model",
    "perplexity_jobs",
    "run_jobs",
    "tail_jobs",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """The model and the tokens that are measured on, with what the rows say about them.

    model: causal language model of transformers. tokens: ids, length N.
    facts: flat values that identify model and text, e.g. model name and text sha256; part of keys.
    notes: flat values that rows record but keys ignore, e.g. the command line.
    """

    model: Any
    tokens: Sequence[int]
    facts: Mapping[str, Any]
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Listener(Protocol):
    """Told about the progress of a run of several lines."""

    def begin(self, label: str) -> None:
        """A line begins."""

    def advance(self, share: float) -> None:
        """This share of the line's work was done."""

    def finish(self, label: str, row: Mapping[str, Any] | None, note: str) -> None:
        """The line is done: a new row, an old row (`note` "kept"), or None and the reason."""


class SilentListener:
    """A listener that does nothing."""

    def begin(self, label: str) -> None:
        """Do nothing."""

    def advance(self, share: float) -> None:
        """Do nothing."""

    def finish(self, label: str, row: Mapping[str, Any] | None, note: str) -> None:
        """Do nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One row to be made. `settings` say everything that its result depends on."""

    label: str
    settings: Mapping[str, Any]
    run: Callable[[Progress], Mapping[str, Any]]


def run_jobs(
    jobs: Sequence[Job],
    rows: RowFile,
    *,
    device: Any = "cpu",
    notes: Mapping[str, Any] | None = None,
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Run the jobs whose rows are missing; returns all rows in the order of the jobs.

    Args:
        jobs: what to run.
        rows: where rows go and where finished ones are found.
        device: where the model is, for the record.
        notes: flat values added to each new row.
        listener: told about progress.

    An exception, KeyboardInterrupt among them, passes through; rows that were finished stay.
    """
    listener = listener or SilentListener()
    results = []
    for job in jobs:
        settings = {**job.settings, "version": __version__}
        key = settings_key(settings)
        row = rows.find(key)
        if row is None:
            listener.begin(job.label)
            result = job.run(listener.advance)
            start = {"key": key, "label": job.label}
            row = {**start, **settings, **result, **provenance(device), **(notes or {})}
            rows.append(row)
            listener.finish(job.label, row, "")
        else:
            listener.finish(job.label, row, "kept")
        results.append(row)
    return results


@contextlib.contextmanager
def patched_model(model: Any, candidate: Candidate, layers: str) -> Iterator[Any]:
    """The model under a candidate's attention; yields the report of the patch, None for exact."""
    if candidate.config is None:
        yield None
        return
    from ..hf import patch
    from ..hf.native import native_attention

    native = native_attention(model)
    if native is not None:
        with native.replaced(candidate.config, layers) as report:
            yield report
        return
    with patch(model, candidate.config, layers=layers) as report:
        yield report


def _base(subject: Subject, candidate: Candidate, layers: str, kind: str) -> dict[str, Any]:
    return {
        **subject.facts,
        "kind": kind,
        "mechanism": candidate.mechanism,
        "config": candidate.settings,
        "layers": layers if candidate.config is not None else "none",
    }


def perplexity_jobs(
    subject: Subject,
    candidates: Sequence[Candidate],
    patched: Sequence[int],
    *,
    window: int,
    stride: int,
    num_bytes: int | None = None,
) -> list[Job]:
    """Perplexity against the number of patched layers, counted from the last.

    Args:
        subject: model and document.
        candidates: mechanisms; exact attention stands for 0 patched layers.
        patched: numbers of layers; 0 is measured once, whatever the mechanism.
        window, stride, num_bytes: see `longspan.eval.perplexity`.

    Raises:
        ConfigError: a number that is negative or beyond the model's layers.
    """
    split = SplitModel(subject.model)
    total = count_full_layers(subject.model)
    for count in patched:
        if not 0 <= count <= total:
            raise ConfigError(
                f"patched: {count} came. Allowed: 0 .. {total}, the full-attention layers. "
                "Pass numbers of layers, counted from the last."
            )

    def job(candidate: Candidate, count: int) -> Job:
        layers = f"last:{count}"

        def run(progress: Progress) -> dict[str, Any]:
            with patched_model(subject.model, candidate, layers):
                result = perplexity(
                    split,
                    subject.tokens,
                    window=window,
                    stride=stride,
                    num_bytes=num_bytes,
                    progress=progress,
                )
            return dataclasses.asdict(result)

        settings = {
            **_base(subject, candidate, layers, "perplexity"),
            "num_patched_layers": count,
            "window": window,
            "stride": stride,
            "length": len(subject.tokens),
        }
        label = f"{candidate.label}, last {count} layers" if count else "exact"
        return Job(label=label, settings=settings, run=run)

    exact, others = candidates[0], candidates[1:]
    jobs = [job(exact, 0)] if 0 in patched or not others else []
    return jobs + [job(c, count) for c in others for count in patched if count]


def tail_jobs(
    subject: Subject,
    candidates: Sequence[Candidate],
    contexts: Sequence[int],
    *,
    tail: int,
    layers: str = "all",
) -> list[Job]:
    """Loss on the last `tail` tokens for each mechanism and number of tokens of context."""
    split = SplitModel(subject.model)

    def job(candidate: Candidate, context: int) -> Job:
        def run(progress: Progress) -> dict[str, Any]:
            with patched_model(subject.model, candidate, layers):
                result = tail_loss(
                    split, subject.tokens, context=context, tail=tail, progress=progress
                )
            return dataclasses.asdict(result)

        settings = {
            **_base(subject, candidate, layers, "tail"),
            "context": context,
            "tail": tail,
            "length": len(subject.tokens),
        }
        return Job(label=f"{candidate.label}, context {context}", settings=settings, run=run)

    return [job(candidate, context) for candidate in candidates for context in contexts]


def passkey_jobs(
    subject: Subject,
    tokenizer: Any,
    candidates: Sequence[Candidate],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    seeds: Sequence[int],
    haystack: str,
    book: str | None,
    layers: str = "all",
) -> list[Job]:
    """Passkey retrieval: one job per mechanism, length and depth, see `run_cell`."""
    split = SplitModel(subject.model)

    def job(candidate: Candidate, length: int, depth: float) -> Job:
        def run(progress: Progress) -> dict[str, Any]:
            with patched_model(subject.model, candidate, layers):
                cell = run_cell(
                    subject.model,
                    tokenizer,
                    length=length,
                    depth=depth,
                    seeds=seeds,
                    haystack=haystack,
                    book=book,
                    split=split,
                    progress=progress,
                )
            return dataclasses.asdict(cell)

        settings = {
            **_base(subject, candidate, layers, "passkey"),
            "haystack": haystack,
            "length": length,
            "depth": depth,
            "seeds": list(seeds),
        }
        label = f"{candidate.label}, {length} tokens, depth {depth:g}"
        return Job(label=label, settings=settings, run=run)

    return [job(c, n, d) for c in candidates for n in lengths for d in depths]
