"""Perplexity and loss by position over long documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from .scoring import Progress, SplitModel, as_input_ids, token_losses
from .statistics import bucket_edges

__all__ = ["PerplexityResult", "Window", "perplexity", "plan_windows"]


class Window(NamedTuple):
    """Tokens start .. stop - 1 are read; of these, first_scored .. stop - 1 count."""

    start: int
    stop: int
    first_scored: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityResult:
    """Perplexity of a document read in windows.

    loss: mean negative log-likelihood per scored token, nats.
    perplexity: exp(loss).
    bits_per_token: loss / ln 2.
    bits_per_byte: bits of all scored tokens over their share of `num_bytes`; None if not given.
    num_tokens: scored tokens. window, stride, num_windows: how the document was read.
    edges, loss_by_position: mean loss of the scored tokens at index edges[i] .. edges[i+1] - 1
        *inside their window* (None where no token was scored); `counts` of tokens behind each mean.
    """

    loss: float
    perplexity: float
    bits_per_token: float
    bits_per_byte: float | None
    num_tokens: int
    window: int
    stride: int
    num_windows: int
    edges: tuple[int, ...]
    loss_by_position: tuple[float | None, ...]
    counts: tuple[int, ...]


def plan_windows(num_tokens: int, window: int, stride: int) -> list[Window]:
    """Windows over a document: each token is scored once, with as much context as its window has.

    The first window scores all of its tokens but the first, which nothing precedes. Each later one
    starts `stride` further on and scores the tokens that no earlier window scored. With
    stride == window the windows are disjoint and the first token of each is not scored; with
    stride < window every scored token beyond the first window has at least window - stride tokens
    of context.

    Raises:
        ConfigError: window < 2, stride outside 1 .. window, or fewer than 2 tokens.
    """
    if window < 2:
        raise ConfigError(
            f"window: {window} came. Allowed: 2 or more (one token to read, one to predict). "
            "Pass a longer window."
        )
    if not 1 <= stride <= window:
        raise ConfigError(
            f"stride: {stride} came. Allowed: 1 .. window = {window}. "
            "A smaller stride gives more context per token and costs more."
        )
    if num_tokens < 2:
        raise ConfigError(
            f"token_ids: {num_tokens} tokens came. Allowed: 2 or more. Pass a longer text."
        )
    windows, scored = [], 1
    for start in range(0, num_tokens, stride):
        stop = min(start + window, num_tokens)
        first = max(scored, start + 1)
        if first < stop:
            windows.append(Window(start, stop, first))
        scored = stop
        if stop == num_tokens:
            break
    return windows


def perplexity(
    model: Any,
    token_ids: Sequence[int] | Tensor,
    *,
    window: int,
    stride: int | None = None,
    num_buckets: int = 32,
    num_bytes: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of a document: exp of the mean natural-log loss of its tokens.

    Args:
        model: causal language model of transformers, or a `SplitModel` of one; patched or not.
        token_ids: the document, N ids.
        window: tokens read at once.
        stride: how far each window starts after the one before. Default: `window` (disjoint).
        num_buckets: at most so many stretches of positions in `loss_by_position`.
        num_bytes: UTF-8 size of the text of these tokens, for `bits_per_byte`.
        progress: called with shares of the work, which add up to 1.

    Returns:
        PerplexityResult. Numbers of different `window` or `stride` do not compare: report both.

    Raises:
        ConfigError: see `plan_windows`; or an id that the model has no embedding for.
        UnsupportedError: the model cannot be split, see `SplitModel`.

    Cost:
        (N / stride) forward passes of `window` tokens; memory of one pass plus one chunk of logits.

    Example:
        >>> plan_windows(10, window=4, stride=2)[:2]
        [Window(start=0, stop=4, first_scored=1), Window(start=2, stop=6, first_scored=4)]
    """
    split = model if isinstance(model, SplitModel) else SplitModel(model)
    ids = as_input_ids(token_ids, split.device)
    stride = window if stride is None else stride
    windows = plan_windows(ids.shape[1], window, stride)
    longest = max(w.stop - w.start for w in windows)
    edges = bucket_edges(1, longest, num_buckets)
    sums = torch.zeros(len(edges) - 1, dtype=torch.float64)
    counts = torch.zeros(len(edges) - 1, dtype=torch.int64)
    inner = torch.tensor(edges[1:-1], dtype=torch.int64)
    share = 1.0 / len(windows)
    for start, stop, first in windows:
        losses = token_losses(
            split,
            ids[:, start:stop],
            progress=(lambda part: progress(share * part)) if progress else None,
        )[first - start - 1 :]
        bucket = torch.bucketize(torch.arange(first - start, stop - start), inner, right=True)
        sums.index_add_(0, bucket, losses)
        counts.index_add_(0, bucket, torch.ones_like(bucket))
    total = int(counts.sum())
    loss = float(sums.sum()) / total
    bits = loss / math.log(2)
    return PerplexityResult(
        loss=loss,
        perplexity=exp_or_inf(loss),
        bits_per_token=bits,
        bits_per_byte=bits * ids.shape[1] / num_bytes if num_bytes else None,
        num_tokens=total,
        window=window,
        stride=stride,
        num_windows=len(windows),
        edges=tuple(edges),
        loss_by_position=tuple(
            float(s) / int(c) if c else None for s, c in zip(sums, counts, strict=True)
        ),
        counts=tuple(int(c) for c in counts),
    )


def exp_or_inf(loss: float) -> float:
    """exp(loss), infinity where it leaves the range of a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
