"""A cache layer that keeps a bounded number of keys: the first ones and the most recent ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..errors import UnsupportedError

__all__ = ["BoundedLayer", "hand_out", "holder_of", "not_traced"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_HOLDER = "_longspan_cache_layer"
not_traced: Callable[[_Function], _Function] = torch.compiler.disable(  # type: ignore[no-untyped-call]
    reason="a cache made by longspan.hf.make_cache changes its length; with fullgraph=True use "
    "transformers' StaticCache"
)


def holder_of(key: Tensor) -> Any:
    """The cache layer of longspan that handed out `key`, if one did."""
    return getattr(key, _HOLDER, None)


def hand_out(key: Tensor, layer: Any) -> Tensor:
    """Mark keys that a cache layer gives to the dispatcher."""
    setattr(key, _HOLDER, layer)
    return key


class BoundedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keeps the first `num_first` real keys of each row and its last `num_recent`.

    `update` hands out the kept keys followed by the new ones; the dispatcher calls `trim` after
    it has used them, because only it knows which columns are padding.
    """

    is_sliding = False
    is_croppable = False
    is_compileable = False

    def __init__(self, num_first: int, num_recent: int) -> None:
        super().__init__()
        self.num_first = num_first
        self.num_recent = num_recent
        self.seen = 0
        self.keys: Any = None
        self.values: Any = None
        self.columns = torch.zeros((1, 0), dtype=torch.int64)  # (B or 1, K): tokens of the keys

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start empty, with the dtype and device of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.columns = self.columns.to(self.device)
        self.is_initialized = True

    @not_traced
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and return the kept keys and values followed by the new ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        new = torch.arange(self.seen, self.seen + count, device=self.columns.device)
        self.columns = torch.cat((self.columns, new.expand(self.columns.shape[0], -1)), dim=1)
        self.keys = torch.cat((self.keys, key_states), dim=2)
        self.values = torch.cat((self.values, value_states), dim=2)
        self.seen += count
        return hand_out(self.keys, self), self.values

    @not_traced
    def mask_of_keys(self, mask: Tensor) -> Tensor:
        """(B, K) of a mask over all tokens seen (B, seen): the columns of the keys held now."""
        return mask.gather(1, self.columns.expand(mask.shape[0], -1))

    @not_traced
    def trim(self, key_mask: Tensor | None) -> None:
        """Drop what no later query can see. key_mask: (B, K), True for real tokens; None: all."""
        self.keys.__dict__.pop(_HOLDER, None)  # a tensor that points at its owner is never freed
        limit, held = self.num_first + self.num_recent, self.keys.shape[2]
        if held <= limit:
            return
        if key_mask is None:
            index = torch.arange(held, device=self.keys.device)
            index = torch.cat((index[: self.num_first], index[held - self.num_recent :]))[None]
        else:
            index = _kept(key_mask, self.num_first, self.num_recent)
        rows = index.expand(self.keys.shape[0], -1)[:, None, :, None]
        count = max(index.shape[0], self.columns.shape[0])
        self.columns = self.columns.expand(count, -1).gather(1, index.expand(count, -1))
        self.keys = _gather(self.keys, rows)
        self.values = _gather(self.values, rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a full cache: one mask serves all layers, and `mask_of_keys` picks from it."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, also those that were dropped."""
        return self.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.columns = self.columns[:1, :0]
        self.is_initialized = False
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, -n as transformers passes it, while none has been dropped.

        Raises:
            UnsupportedError: keys were dropped, which cannot be undone.
        """
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if tokens_to_remove > 0 or self.keys.shape[2] < self.seen:
            raise UnsupportedError(
                f"crop: this layer holds {self.keys.shape[2]} of the {self.seen} tokens it saw, "
                "and what it dropped cannot come back (assisted decoding needs that). Use a "
                "DynamicCache, and a negative number of tokens."
            )
        self.keys = self.keys[:, :, :tokens_to_remove]
        self.values = self.values[:, :, :tokens_to_remove]
        self.columns = self.columns[:, :tokens_to_remove]
        self.seen += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows `beam_idx`, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._rows(lambda tensor: tensor[indices.to(tensor.device)])

    def _rows(self, change: Any) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = change(self.keys), change(self.values)
        if self.columns.shape[0] > 1:
            self.columns = change(self.columns)


def _kept(mask: Tensor, num_first: int, num_recent: int) -> Tensor:
    """(B, num_first + num_recent) columns, in order: the first and the last real ones of each row.

    A row with fewer real tokens is filled up with padding, which its mask hides.
    """
    rank = mask.cumsum(1) - 1
    real = mask.sum(1, keepdim=True)
    keep = mask & ((rank < num_first) | (rank >= real - num_recent))
    wanted = torch.where(keep, 2, torch.where(mask, 0, 1))  # padding before dropped tokens
    order = torch.argsort(wanted, dim=1, descending=True, stable=True)
    return order[:, : num_first + num_recent].sort(dim=1).values


def _gather(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor.gather(2, rows.expand(-1, tensor.shape[1], -1, tensor.shape[3]))
