"""Ask a trained model: prompts of any length, read as streams in memory that does not grow."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...eval.statistics import wilson_interval
from ...infini.state import InfiniState
from ...models.transformer import Transformer, TransformerState
from .task import DIGITS, Words, draw_prompts
from .variants import hidden_after

__all__ = ["DEPTHS", "HAYSTACKS", "ask"]

#: Where the needle lies, as a share of the filler before it.
DEPTHS = {"start": 0.0, "middle": 0.5, "end": 1.0}
HAYSTACKS = ("landmark", "book")
_TEST = 1 << 40  # seeds of prompts that are asked; training's are odd and smaller


@torch.inference_mode()
def ask(
    model: Transformer,
    words: Words,
    *,
    length: int,
    trials: int,
    haystack: str,
    book: Tensor,
    segment: int,
    chunk_tokens: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """All depths at one length, `trials` prompts each, in one stream of 3 * trials rows.

    Args:
        model: in eval mode.
        words: of `read_words`.
        length: tokens of a prompt with its answer.
        trials: prompts per depth; the keys are the same at every depth and length.
        haystack: of HAYSTACKS. book: held-out text for "book".
        segment: chunks are multiples of it.
        chunk_tokens: tokens of all rows read at a time.
        dtype: bfloat16 computes matrix products in it.

    Returns:
        {"cells": {depth: {"trials", "found", "low", "high", "digits_right", "digits"}}, "seconds",
        "tokens_per_second", "state_bytes", "peak_bytes", "end_is_local"}. found: prompts whose
        five digits are each the model's first choice given the ones before, which is what greedy
        generation gives; low and high: its 95 % Wilson interval. state_bytes: the state of one row
        at the end (None for full attention). peak_bytes: None without a GPU. end_is_local: whether
        a needle at the end lies in the last segment with the question.

    Semantics:
        Full attention, which has no bounded state, reads prompts whole and one by one.
    """
    device = model.embedding.weight.device
    share = 1.0 if haystack == "book" else 0.0
    parts = [
        draw_prompts(words, length=length, count=trials, seed=_TEST, depth=depth,
                     book=book, book_share=share, device=device)
        for depth in DEPTHS.values()
    ]  # fmt: skip
    ids, keys = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "keys"))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.monotonic()
    is_stream = any(name.endswith("longspan_gate") for name, _ in model.named_parameters())
    state_bytes = None
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        if is_stream:
            chunk = max(1, chunk_tokens // (len(ids) * segment)) * segment
            hidden, state_bytes = _stream(model, ids, chunk)
        else:
            group = max(1, chunk_tokens // length)
            hidden = torch.cat(
                [model.hidden(some)[:, -DIGITS:] for some in torch.split(ids, group)]
            )
        guesses = F.linear(hidden, model.head.weight).argmax(-1)
    right = (guesses == keys).cpu()
    seconds = time.monotonic() - begin
    cells = {}
    for name, own in zip(DEPTHS, torch.split(right, trials), strict=True):
        found = int(own.all(1).sum())
        low, high = wilson_interval(found, trials)
        cells[name] = {
            "trials": trials, "found": found, "low": low, "high": high,
            "digits_right": int(own.sum()), "digits": own.numel(),
        }  # fmt: skip
    return {
        "cells": cells,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(ids.numel() / seconds, 1),
        "state_bytes": state_bytes,
        "end_is_local": words.needle_length + words.tail_length <= (length - 1) % segment + 1,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _stream(model: Transformer, ids: Tensor, chunk: int) -> tuple[Tensor, int]:
    """Hidden vectors of the last DIGITS tokens (B, DIGITS, width), bytes of one row's state."""
    state: TransformerState | None = None
    tail: list[Tensor] = []
    for part in torch.split(ids, chunk, 1):
        hidden, state = hidden_after(model, part, state)
        tail = [*tail, hidden[:, -DIGITS:].clone()][-DIGITS:]
    assert state is not None
    layers = [layer for layer in state.layers if isinstance(layer, InfiniState)]
    return torch.cat(tail, 1)[:, -DIGITS:], sum(layer.num_bytes for layer in layers) // len(ids)
