"""A cache layer that holds the state of Infini-attention: the same few megabytes at any length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..errors import UnsupportedError
from ..infini.config import InfiniConfig
from ..infini.state import InfiniState
from .cache_layer import hand_out, not_traced

__all__ = ["InfiniLayer"]


class InfiniLayer(CacheLayerMixin):  # type: ignore[misc]
    """States of a batch of streams; keys and values are handed through to the dispatcher.

    `update` hands out the new keys alone; the dispatcher reads `states`, attends, and `put`s what
    comes after. Rows of one length share one state; padded rows, whose segments begin at different
    columns, have one each.
    """

    is_sliding = False
    is_croppable = False  # only inside the segment that is not folded yet
    is_compileable = False

    def __init__(self, config: InfiniConfig, active: Callable[[], bool] | None = None) -> None:
        super().__init__()
        self.config = config
        self.active = active  # says whether the model is still the one it was made for
        self.states: tuple[InfiniState, ...] = ()  # one for all rows, or one for each
        self.seen = 0  # columns, padding included
        self.pending = False

    @property
    def batch(self) -> int:
        """Rows; 0 before the first call."""
        return sum(state.memory.shape[0] for state in self.states)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @not_traced
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Count the new tokens, and return their keys and values.

        Raises:
            UnsupportedError: the model attends by something else now (the patch was undone, or
                the keys handed out before were never used), which would see these keys alone.
        """
        if self.pending or (self.active is not None and not self.active()):
            raise UnsupportedError(
                "past_key_values: a cache of Infini-attention was given to a model whose attention "
                "does not use it; what it holds is a memory, not keys. Use it with the converted "
                "model that make_cache was called with, while it is converted."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.pending = True
        self.seen += key_states.shape[2]
        return hand_out(key_states, self), value_states

    def put(self, states: tuple[InfiniState, ...]) -> None:
        """What the dispatcher leaves for the next call."""
        self.states = states
        self.pending = False

    def rows(self) -> tuple[InfiniState, ...]:
        """One state for each row."""
        if len(self.states) != 1 or self.batch == 1:
            return self.states
        state = self.states[0]
        device = state.memory.device
        return tuple(state.reorder(torch.tensor([b], device=device)) for b in range(self.batch))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a full cache: the mask says which of all columns are real."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Columns seen, also those that are in the memory."""
        return self.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.states, self.seen = (), 0
        self.is_initialized = self.pending = False

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back, -n as transformers passes it, inside the unfinished segment.

        Raises:
            UnsupportedError: a segment was folded into the memory since (assisted decoding may
                ask for that), or the rows are padded.
        """
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if tokens_to_remove > 0 or len(self.states) > 1:
            what = "a positive number" if tokens_to_remove > 0 else "a padded batch"
            raise UnsupportedError(
                f"crop: {what} came; a cache of Infini-attention takes back the last tokens of "
                "rows of one length, as a negative number. Run padded rows one by one."
            )
        self.states = tuple(s.crop(s.seen + tokens_to_remove) for s in self.states)
        self.seen += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows `beam_idx`, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        if len(self.states) == 1:
            self.states = (self.states[0].reorder(indices),)
        elif self.states:
            self.states = tuple(self.states[i] for i in indices.tolist())

    def offload(self) -> None:
        """Move the states to the CPU."""
        self.states = tuple(state.to("cpu") for state in self.states)

    def prefetch(self) -> None:
        """Move them back."""
        if self.is_initialized:
            self.states = tuple(state.to(self.device) for state in self.states)
