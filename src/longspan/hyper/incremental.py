"""The index of a growing sequence: each chunk is indexed once, when it is full."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._validation import Call
from .config import HyperConfig
from .impl.common import make_columns
from .index.chunks import build_chunk_index
from .plan import ChunkIndex, Columns

__all__ = ["Finished", "IndexCache"]


class Finished(NamedTuple):
    """Index and residual columns of the chunks that are full; a value, never changed."""

    lookup: ChunkIndex
    columns: Columns

    @property
    def num_chunks(self) -> int:
        """Chunks indexed so far, by the size of their order."""
        return self.lookup.globals.shape[2]

    @classmethod
    def of(
        cls, key: Tensor, value: Tensor, config: HyperConfig, planes: Tensor | None, seed: int
    ) -> Finished:
        """The full chunks of key (B, H_kv, N, D) and value (B, H_kv, N, D_v), without gradient."""
        return _index(key, value, config, planes, seed, 0)

    def extend(
        self, key: Tensor, value: Tensor, config: HyperConfig, planes: Tensor | None, seed: int
    ) -> Finished:
        """With the chunks that have become full in key and value, which hold the whole sequence."""
        done, full = self.num_chunks, key.shape[2] // config.chunk_size
        if full <= done:
            return self
        start, stop = done * config.chunk_size, full * config.chunk_size
        new = _index(key[:, :, start:stop], value[:, :, start:stop], config, planes, seed, done)
        clusters = done * config.clusters_per_chunk
        index, columns = new.lookup, new.columns
        moved = index._replace(
            order=index.order + start,
            starts=index.starts + start,
            labels=torch.where(index.labels < 0, -1, index.labels + clusters),
            globals=index.globals + start,
            samples=index.samples + start,
        )
        shifted = columns._replace(owner=columns.owner + clusters)
        return Finished(
            ChunkIndex(*(torch.cat(pair, 2) for pair in zip(self.lookup, moved, strict=True))),
            Columns(
                *(
                    None if a is None or b is None else torch.cat((a, b), 2)
                    for a, b in zip(self.columns, shifted, strict=True)
                )  # type: ignore[arg-type]
            ),
        )

    def select(self, rows: Tensor) -> Finished:
        """Batch entries `rows`."""
        return Finished(
            ChunkIndex(*(t.index_select(0, rows) for t in self.lookup)),
            Columns(*(None if t is None else t.index_select(0, rows) for t in self.columns)),  # type: ignore[arg-type]
        )

    def first(self, num_chunks: int) -> Finished:
        """Only the first chunks."""
        total = max(self.num_chunks, 1)

        def cut(tensor: Tensor) -> Tensor:
            return tensor[:, :, : tensor.shape[2] // total * num_chunks]

        return Finished(
            ChunkIndex(*(cut(t) for t in self.lookup)),
            Columns(*(None if t is None else cut(t) for t in self.columns)),  # type: ignore[arg-type]
        )


class IndexCache:
    """The finished chunks of a cache of keys that somebody else keeps, e.g. transformers.

    `attach` marks the tensor that holds all keys; a call that receives this very tensor uses the
    index instead of making it again.
    """

    _MARK = "_longspan_index_cache"

    def __init__(self) -> None:
        self.finished: Finished | None = None
        self.made_with: tuple[HyperConfig, int] | None = None

    @classmethod
    def of_key(cls, key: Tensor) -> IndexCache | None:
        """The cache that this tensor of keys was marked with."""
        return getattr(key, cls._MARK, None)

    def attach(self, key: Tensor) -> None:
        """Mark the tensor (B, H_kv, N, D) of all keys."""
        setattr(key, self._MARK, self)

    def get(
        self, key: Tensor, value: Tensor, config: HyperConfig, planes: Tensor | None, seed: int
    ) -> Finished:
        """Finished chunks of all keys and values so far."""
        if self.finished is None or self.made_with != (config, seed):
            self.finished = Finished.of(key, value, config, planes, seed)
            self.made_with = (config, seed)
        self.finished = self.finished.extend(key, value, config, planes, seed)
        return self.finished

    def crop(self, length: int) -> None:
        """Keys from `length` on are gone."""
        if self.finished is not None and self.made_with is not None:
            most = length // self.made_with[0].chunk_size
            self.finished = self.finished.first(min(most, self.finished.num_chunks))

    def select(self, rows: Tensor) -> None:
        """Only batch entries `rows` are left."""
        if self.finished is not None:
            self.finished = self.finished.select(rows.to(self.finished.lookup.order.device))

    def clear(self) -> None:
        """Forget everything."""
        self.finished = self.made_with = None


def _index(
    key: Tensor, value: Tensor, config: HyperConfig, planes: Tensor | None, seed: int, first: int
) -> Finished:
    with torch.no_grad(), torch.autocast(key.device.type, enabled=False):
        key, value = key.detach(), value.detach()
        index = build_chunk_index(key, value, config, planes, seed, first)
        call = Call(key[:, :, :0], key, value, None, True, 1.0, 0)
        return Finished(index, make_columns(call, config, index))
