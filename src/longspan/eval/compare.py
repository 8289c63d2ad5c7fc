"""Compare mechanisms on a pretrained model and a real text: loss, time, memory, agreement.

Every mechanism reads the same tokens in one forward pass. Exact attention goes first; its last
hidden states are kept (length x width, far smaller than log-probabilities), and from them and the
hidden states of each mechanism the next-token distributions are compared position by position.
"""

from __future__ import annotations

import contextlib
import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..errors import ConfigError, LongspanError
from .compare_plan import Candidate
from .jobs import Listener, SilentListener, Subject, patched_model
from .layers import own_shares, patched_shares
from .memory import PeakMemory
from .perplexity import exp_or_inf
from .rows import RowFile, provenance, settings_key
from .scoring import (
    Agreement,
    SplitModel,
    agreement,
    as_input_ids,
    check_token_ids,
    token_losses,
)
from .statistics import bucket_edges, bucket_means, standard_error

__all__ = ["compare"]

_NUM_BUCKETS = 32
_WARM_UP_TOKENS = 256
_MAX_RUNS, _CHEAP_SECONDS = 3, 15.0  # the prefill is timed again while that is cheap
_PREFILL_SHARE = 0.75  # of the work of one line, for progress; the rest is scoring


def compare(
    subject: Subject,
    candidates: Sequence[Candidate],
    rows: RowFile,
    *,
    layers: str = "all",
    skip_refused: bool = False,
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Run every candidate on the same tokens and append one row each.

    Args:
        subject: model, tokens, facts.
        candidates: from `plan_candidates`; the first is the model's own exact attention.
        rows: where rows go. A candidate whose key is already there is not run again.
        layers: which layers are patched, as in `longspan.hf.patch`.
        skip_refused: leave out a candidate that the model or this machine refuses, instead of
            raising before anything is measured.
        listener: told about progress.

    Returns:
        The rows of the candidates, in their order, old and new.

    Raises:
        ConfigError: fewer than 2 tokens, or ids of another tokenizer.
        LongspanError: a candidate cannot run on this model (unless `skip_refused`).
        KeyboardInterrupt: passed on; rows that were finished are in `rows`.

    Semantics:
        prefill_seconds is the time of the model's body on all tokens at once (no cache is kept, no
        logits are computed), median of prefill_runs. cpu_share is the share of its threads' time
        that the process got meanwhile (CPU only): far below 1, the machine was busy. peak_bytes is
        the growth during that pass.
        visited_fraction averages over layers, patched or not; a sliding layer counts its window.
        loss_change_error is the standard error of the mean change over stretches of positions.
    """
    run = _Run(subject, layers, rows, listener or SilentListener())
    results: dict[str, dict[str, Any]] = {}
    todo = []
    for candidate in candidates:
        old = rows.find(run.key(candidate))
        if old is None:
            todo.append(candidate)
        else:
            results[candidate.label] = old
            run.listener.finish(candidate.label, old, "kept")
    if todo:
        todo = run.try_out(todo, skip_refused=skip_refused)
        exact = candidates[0]
        measured = run.prefill(exact, repeats=exact in todo)
        for candidate in todo:
            exact_row = results.get(exact.label)
            results[candidate.label] = run.measure(candidate, measured, exact_row)
    return [results[c.label] for c in candidates if c.label in results]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prefill:
    hidden: Tensor
    seconds: tuple[float, ...]
    cpu_share: float | None
    peak_bytes: int | None
    peak_method: str
    visited: Mapping[int, float]  # of each patched layer
    approximate_calls: int
    exact_calls: int


class _Run:
    """What stays the same over the lines of one comparison."""

    def __init__(self, subject: Subject, layers: str, rows: RowFile, listener: Listener) -> None:
        if len(subject.tokens) < 2:
            raise ConfigError(
                f"tokens: {len(subject.tokens)} came. Allowed: 2 or more (one to read, one to "
                "predict). Pass a longer text or a larger --length."
            )
        self.model = subject.model
        self.notes = subject.notes
        self.split = SplitModel(subject.model)
        self.ids = as_input_ids(subject.tokens, self.split.device)
        check_token_ids(self.ids, self.split.vocabulary)
        self.length = self.ids.shape[1]
        self.layers = layers
        self.rows = rows
        self.listener = listener
        data = self.ids.cpu().numpy().tobytes()
        self.facts = {
            **subject.facts,
            "length": self.length,
            "tokens_sha256": hashlib.sha256(data).hexdigest(),
            "dtype": str(next(subject.model.parameters()).dtype).removeprefix("torch."),
            "device_type": self.split.device.type,
        }

    def settings(self, candidate: Candidate) -> dict[str, Any]:
        layers = self.layers if candidate.config is not None else "none"
        return {
            **self.facts,
            "kind": "compare",
            "mechanism": candidate.mechanism,
            "config": candidate.settings,
            "layers": layers,
            "version": __version__,
        }

    def key(self, candidate: Candidate) -> str:
        return settings_key(self.settings(candidate))

    def patched(self, candidate: Candidate) -> contextlib.AbstractContextManager[Any]:
        return patched_model(self.model, candidate, self.layers)

    def try_out(self, todo: Sequence[Candidate], *, skip_refused: bool) -> list[Candidate]:
        """Run each candidate on a few tokens: warms it up, and refuses before hours are spent."""
        accepted = []
        few = self.ids if self.ids.device.type == "cuda" else self.ids[:, :_WARM_UP_TOKENS]
        for candidate in todo:
            try:
                with self.patched(candidate):
                    self.split.hidden(few)
            except LongspanError as error:
                if not skip_refused:
                    raise
                self.listener.finish(candidate.label, None, str(error))
            else:
                accepted.append(candidate)
        return accepted

    def prefill(self, candidate: Candidate, *, repeats: bool) -> _Prefill:
        """Time the body on all tokens; again, up to three times, where that is cheap."""
        self.listener.begin(candidate.label)
        with self.patched(candidate) as report:
            used = time.process_time()
            with PeakMemory(self.split.device) as memory:
                hidden, first = self._timed(lambda share: self._advance(_PREFILL_SHARE * share))
            seconds = [first]
            while repeats and len(seconds) < _MAX_RUNS and sum(seconds) + first < _CHEAP_SECONDS:
                seconds.append(self._timed(None)[1])
            share = (time.process_time() - used) / (sum(seconds) * torch.get_num_threads())
            return _Prefill(
                hidden=hidden,
                seconds=tuple(seconds),
                cpu_share=min(1.0, share) if self.split.device.type == "cpu" else None,
                peak_bytes=memory.peak_bytes,
                peak_method=memory.method,
                visited=patched_shares(report),
                approximate_calls=report.approximate_calls if report is not None else 0,
                exact_calls=report.exact_calls if report is not None else 0,
            )

    def _advance(self, share: float) -> None:
        self.listener.advance(share)

    def _timed(self, progress: Callable[[float], None] | None) -> tuple[Tensor, float]:
        self._synchronize()
        start = time.perf_counter()
        hidden = self.split.hidden(self.ids, progress=progress)
        self._synchronize()
        return hidden, time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.split.device.type == "cuda":
            torch.cuda.synchronize(self.split.device)

    def measure(
        self, candidate: Candidate, exact: _Prefill, exact_row: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Measure one candidate and store its row."""

        def advance(share: float) -> None:
            self._advance((1 - _PREFILL_SHARE) * share)

        if candidate.config is None:
            result = exact
            losses = token_losses(self.split, self.ids, hidden=exact.hidden, progress=advance)
            quality = self._quality(losses, None, None)
        else:
            result = self.prefill(candidate, repeats=True)
            seen = agreement(self.split, self.ids, exact.hidden, result.hidden, progress=advance)
            assert exact_row is not None, "exact attention runs first"
            quality = self._quality(seen.losses, seen, exact_row)
        seconds = statistics.median(result.seconds)
        reference = exact_row["prefill_seconds"] if exact_row else seconds
        row = {
            "key": self.key(candidate),
            "label": candidate.label,
            **self.settings(candidate),
            **quality,
            "prefill_seconds": seconds,
            "prefill_runs": len(result.seconds),
            "prefill_ratio": seconds / reference,
            "cpu_share": result.cpu_share,
            "peak_bytes": result.peak_bytes,
            "peak_method": result.peak_method,
            **self._visits(result),
            **provenance(self.split.device),
            **self.notes,
        }
        self.rows.append(row)
        self.listener.finish(candidate.label, row, "")
        return row

    def _quality(
        self, losses: Tensor, seen: Agreement | None, exact_row: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        edges = bucket_edges(1, self.length, _NUM_BUCKETS)
        by_position = bucket_means(losses.tolist(), 1, edges)
        loss = float(losses.mean())
        reference = exact_row["loss"] if exact_row else loss
        reference_means = exact_row["loss_by_position"] if exact_row else by_position
        changes = [a - b for a, b in zip(by_position, reference_means, strict=True)]
        kl_means = (
            bucket_means(seen.kl_by_position.tolist(), 1, edges) if seen else [0.0] * len(changes)
        )
        spread = standard_error(changes)
        return {
            "loss": loss,
            "perplexity": exp_or_inf(loss),
            "loss_change": loss - reference,
            "loss_change_error": None if spread != spread else spread,
            "perplexity_ratio": exp_or_inf(loss - reference),
            "kl": seen.kl if seen else 0.0,
            "top1": seen.top1 if seen else 1.0,
            "edges": edges,
            "loss_by_position": by_position,
            "kl_by_position": kl_means,
        }

    def _visits(self, result: _Prefill) -> dict[str, Any]:
        own = own_shares(self.model, self.length)
        shares = {**own, **result.visited} if own else {}
        return {
            "visited_fraction": sum(shares.values()) / len(shares) if shares else None,
            "num_layers": len(shares),
            "num_patched_layers": len(result.visited),
            "approximate_calls": result.approximate_calls,
            "exact_calls": result.exact_calls,
        }
