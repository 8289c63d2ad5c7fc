"""A cache layer that keeps all keys, and the index that a mechanism makes of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .cache_layer import not_traced

__all__ = ["IndexedLayer"]


class IndexedLayer(DynamicLayer):  # type: ignore[misc]
    """transformers' layer; the keys that it hands out are marked with the index cache.

    A call that receives them uses and extends the index. Padded batches are packed on the way, so
    they index anew.
    """

    def __init__(self, index: Any) -> None:
        super().__init__()
        self.index = index

    @not_traced
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and return all keys and values."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.index.attach(keys)
        return keys, values

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Remove the last tokens, as transformers passes it."""
        super().crop(*args, **kwargs)
        self.index.crop(self.get_seq_length())

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.index.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows `beam_idx`, for beam search."""
        super().reorder_cache(beam_idx)
        self.index.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.index.clear()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        super().batch_select_indices(indices)
        self.index.clear()
