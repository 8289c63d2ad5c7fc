"""Multi-query recall with keys that are assigned again: the latest value counts.

A sequence is P assignments (key, value), then questions: a key, to be followed by its latest
value. Keys come from a set half as large as P, so that most are assigned more than once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...models.transformer import Transformer
from ...train.batches import IGNORED, Batch

__all__ = ["VOCABULARY", "RecallBatches", "draw_recall", "recall_accuracy"]

_KEYS = 256
_VALUES = 128
VOCABULARY = _KEYS + _VALUES
_QUESTIONS = 32


def draw_recall(num_pairs: int, batch_size: int, seed: Sequence[int]) -> Batch:
    """Sequences with `num_pairs` assignments; targets only after the keys of questions.

    Args:
        num_pairs: assignments per sequence.
        batch_size: sequences.
        seed: two numbers that make them.
    """
    import numpy as np

    draw = np.random.Generator(np.random.Philox(key=list(seed)))
    num_keys = max(2, num_pairs // 2)
    lines = np.arange(batch_size)[:, None]
    pool = np.argsort(draw.random((batch_size, _KEYS)), axis=1)[:, :num_keys]
    keys = pool[lines, draw.integers(num_keys, size=(batch_size, num_pairs))]
    values = _KEYS + draw.integers(_VALUES, size=(batch_size, num_pairs))
    latest = np.zeros((batch_size, _KEYS), dtype=np.int64)
    for pair in range(num_pairs):  # in order: a later assignment replaces an earlier one
        latest[lines[:, 0], keys[:, pair]] = values[:, pair]
    asked = keys[lines, draw.integers(num_pairs, size=(batch_size, _QUESTIONS))]
    answers = latest[lines, asked]
    left, right = np.concatenate((keys, asked), 1), np.concatenate((values, answers), 1)
    ids = np.stack((left, right), 2).reshape(batch_size, -1)
    targets = np.full_like(ids, IGNORED)
    targets[:, 2 * num_pairs :: 2] = answers
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets))


class RecallBatches:
    """Training batches; each step draws one number of pairs from `sizes`, small ones first.

    Over the first third of `steps` the largest allowed size grows to the last of `sizes`.
    """

    def __init__(self, sizes: Sequence[int], *, batch_size: int, steps: int, seed: int = 0) -> None:
        self.sizes, self.batch_size, self.steps, self.seed = sizes, batch_size, steps, seed

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        grown = min(1.0, 3 * (step + 1) / self.steps)
        allowed = max(1, round(grown * len(self.sizes)))
        # A multiplicative hash of the step picks the size: the same for every variant.
        size = self.sizes[(step * 2_654_435_761 >> 8) % allowed]
        return draw_recall(size, self.batch_size, (self.seed, step))


@torch.no_grad()
def recall_accuracy(
    model: Transformer, num_pairs: int, *, sequences: int, seed: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Share of questions whose likeliest answer is right.

    Returns:
        {"pairs", "right", "asked", "accuracy", "stale"}: stale is the share of answers that are
        an earlier value of the same key.
    """
    batch = draw_recall(num_pairs, sequences, (seed, num_pairs))
    device = model.embedding.weight.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        hidden = model.hidden(batch.inputs.to(device))
        asked = batch.targets.to(device) != IGNORED
        guesses = model.head(hidden[asked]).argmax(-1).cpu().view(sequences, -1)
    wanted = batch.targets[batch.targets != IGNORED].view(sequences, -1)
    right = guesses == wanted
    stale = _stale(batch.inputs, guesses, num_pairs) & ~right
    return {
        "pairs": num_pairs,
        "right": int(right.sum()),
        "asked": right.numel(),
        "accuracy": right.double().mean().item(),
        "stale": stale.double().mean().item(),
    }


def _stale(inputs: Tensor, guesses: Tensor, num_pairs: int) -> Tensor:
    """Whether a guess was ever assigned to the key that is asked for."""
    keys, values = inputs[:, : 2 * num_pairs : 2], inputs[:, 1 : 2 * num_pairs : 2]
    asked = inputs[:, 2 * num_pairs :: 2]
    same = (asked[:, :, None] == keys[:, None, :]) & (guesses[:, :, None] == values[:, None, :])
    return same.any(-1)
