"""A growing key-value buffer whose snapshots are values, with amortised appends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KeyValueBuffer"]

_BLOCK = 256  # capacity is a multiple of this many tokens


class _Memory:
    """The tensors that snapshots share, and how far they are written."""

    def __init__(self, keys: Tensor, values: Tensor, written: int) -> None:
        self.keys = keys  # (B, H_kv, capacity, D)
        self.values = values  # (B, H_kv, capacity, D_v)
        self.written = written


@dataclass(frozen=True, slots=True)
class KeyValueBuffer:
    """Tokens start .. stop of some memory. Operations return new snapshots.

    Only the snapshot that ends where the memory is written up to may write behind itself; any
    other copies first, so no snapshot ever sees another one's tokens.
    """

    memory: _Memory
    start: int
    stop: int

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> KeyValueBuffer:
        """A snapshot that holds exactly these tokens; no copy."""
        return cls(_Memory(keys, values, keys.shape[2]), 0, keys.shape[2])

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.stop - self.start

    @property
    def keys(self) -> Tensor:
        """(B, H_kv, length, D), a view."""
        return self.memory.keys[:, :, self.start : self.stop]

    @property
    def values(self) -> Tensor:
        """(B, H_kv, length, D_v), a view."""
        return self.memory.values[:, :, self.start : self.stop]

    def append(self, keys: Tensor, values: Tensor) -> KeyValueBuffer:
        """With more tokens at the end."""
        if torch.is_grad_enabled() and any(
            t.requires_grad for t in (keys, values, self.memory.keys, self.memory.values)
        ):
            # writing in place would break the graph of earlier chunks
            return self.of(torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2))
        stop = self.stop + keys.shape[2]
        memory, start = self.memory, self.start
        if memory.written != self.stop or stop > memory.keys.shape[2]:
            memory, start = self._roomier(keys.shape[2]), 0
            stop = self.length + keys.shape[2]
        memory.keys[:, :, stop - keys.shape[2] : stop] = keys
        memory.values[:, :, stop - keys.shape[2] : stop] = values
        memory.written = stop
        return KeyValueBuffer(memory, start, stop)

    def keep_last(self, count: int) -> KeyValueBuffer:
        """Only the newest `count` tokens; memory is reused when it fills up."""
        return KeyValueBuffer(self.memory, max(self.start, self.stop - count), self.stop)

    def drop_last(self, count: int) -> KeyValueBuffer:
        """Without the newest `count` tokens."""
        return KeyValueBuffer(self.memory, self.start, self.stop - count)

    def select(self, index: Tensor) -> KeyValueBuffer:
        """Batch entries `index`; a copy."""
        index = index.to(self.memory.keys.device)
        return self.of(self.keys.index_select(0, index), self.values.index_select(0, index))

    def _roomier(self, extra: int) -> _Memory:
        """A copy with room for `extra` tokens and half as much again as is needed."""
        needed = self.length + extra
        capacity = -(-(needed + needed // 2) // _BLOCK) * _BLOCK

        def grow(tensor: Tensor) -> Tensor:
            batch, heads, _, dim = tensor.shape
            grown = tensor.new_empty((batch, heads, capacity, dim))
            grown[:, :, : self.length] = tensor
            return grown

        return _Memory(grow(self.keys), grow(self.values), self.length)
