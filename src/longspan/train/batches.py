"""Which sequences each step trains on: a function of seed and step, so any step can be resumed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from .tokens import TokenFile

__all__ = ["IGNORED", "Batch", "BatchSource", "Batches"]

IGNORED = -100  # targets with this value have no loss


class Batch(NamedTuple):
    """inputs: (B, N), int64. targets: (B, N), int64, the token after each input, or IGNORED."""

    inputs: Tensor
    targets: Tensor


class BatchSource(Protocol):
    """What a training run reads: the same step always gives the same batch."""

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0, on the CPU."""
        ...


class Batches:
    """Sequences of `length` tokens from a corpus, each once per epoch, in an order drawn anew.

    The corpus is cut into windows of `length` (+ 1 for the last target). Epoch e shifts the cuts by
    a drawn number of tokens and shuffles the windows; both depend on (seed, e) alone.

    Args:
        tokens: the corpus.
        length: inputs per sequence.
        batch_size: sequences per step.
        seed: of order and shifts.

    Raises:
        ConfigError: the corpus has fewer than two windows.
    """

    def __init__(self, tokens: TokenFile, *, length: int, batch_size: int, seed: int = 0) -> None:
        self.ids, self.length, self.batch_size, self.seed = tokens.ids, length, batch_size, seed
        self.num_windows = (len(tokens.ids) - 1) // length - 1
        if self.num_windows < 1:
            raise ConfigError(
                f"Batches: the corpus has {len(tokens.ids)} tokens and length is {length}; two "
                "windows must fit. Give more text or a smaller length."
            )
        self._epoch = -1
        self._starts: Any = None

    def batch(self, step: int) -> Batch:
        """The batch of a step; it may span the end of an epoch."""
        import numpy as np

        first = step * self.batch_size
        rows = [self._window(first + row) for row in range(self.batch_size)]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def _window(self, index: int) -> np.ndarray[Any, Any]:
        epoch, place = divmod(index, self.num_windows)
        if epoch != self._epoch:
            self._epoch, self._starts = epoch, self._draw(epoch)
        start = int(self._starts[place])
        return self.ids[start : start + self.length + 1]

    def _draw(self, epoch: int) -> Any:
        import numpy as np

        draw = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        shift = int(draw.integers(self.length))
        return draw.permutation(self.num_windows) * self.length + shift
