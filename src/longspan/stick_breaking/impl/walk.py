"""The tiles of one call in plain torch: which heads, queries and keys are computed together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .common import Geometry, Settings, gate_floor, wide_dtype
from .tiles import times

__all__ = ["QUERY_BLOCK", "Walk", "key_chunk"]

QUERY_BLOCK = 256
_KEY_CHUNK = 256
_KEY_CHUNK_FEW_ROWS = 1024  # decoding: fewer, longer steps
_FEW_ROWS = 16
_TILE_ELEMENTS = 1 << 18  # scores at a time: one megabyte, stays in a CPU's second cache

Range = tuple[int, int]


def key_chunk(n_q: int) -> int:
    """Keys in a chunk, for calls with `n_q` queries."""
    return _KEY_CHUNK_FEW_ROWS if n_q <= _FEW_ROWS else _KEY_CHUNK


class Walk:
    """The tiles of one call: inputs folded to (U, G, N, D), where U = B * H_kv and G = H / H_kv."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        settings: Settings,
    ) -> None:
        batch, heads, n_q, _ = query.shape
        kv_heads, n_k = key.shape[1], key.shape[2]
        self.wide = wide_dtype(query.dtype)
        self.settings = settings
        self.geometry = Geometry(
            n_q, n_k, settings.query_offset, settings.attend_current, settings.window
        )
        self.num_units, self.groups = batch * kv_heads, heads // max(kv_heads, 1)
        self.q = self.fold(query)
        self.k = key.reshape(batch * kv_heads, n_k, key.shape[-1])
        self.v = value.reshape(batch * kv_heads, n_k, value.shape[-1])
        self.bias: Tensor | None = None
        if settings.logit_bias is not None:
            per_unit = settings.logit_bias.to(self.wide).reshape(kv_heads, self.groups, 1, 1)
            self.bias = per_unit.repeat(batch, 1, 1, 1)
        self.lengths, self.length_list = None, [n_k] * self.num_units
        if settings.key_lengths is not None:
            self.lengths = settings.key_lengths.repeat_interleave(kv_heads)
            self.length_list = [min(int(n), n_k) for n in self.lengths.tolist()]
        self.blocks = list(self.geometry.query_blocks(QUERY_BLOCK))
        self.chunk = key_chunk(n_q)

    def fold(self, tensor: Tensor) -> Tensor:
        """(B, H, ...) to (U, G, ...)."""
        return tensor.reshape(self.num_units, self.groups, *tensor.shape[2:])

    def like_query(self, *tail: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised (U, G, N_q, *tail)."""
        return self.q.new_empty((*self.q.shape[:3], *tail), dtype=dtype)

    def units(self, *, alone: bool) -> Iterator[tuple[slice, slice]]:
        """Heads that are computed together, as slices of (U, G).

        `alone`: one query head at a time, for walks that end where that head's sticks are spent;
        walking together would make a head's result depend on its neighbours.
        """
        if alone:
            for u in range(self.num_units):
                for g in range(self.groups):
                    yield slice(u, u + 1), slice(g, g + 1)
            return
        rows = min(self.geometry.n_q, QUERY_BLOCK)
        step = max(_TILE_ELEMENTS // max(rows * self.groups * self.chunk, 1), 1)
        for u in range(0, self.num_units, step):
            yield slice(u, min(u + step, self.num_units)), slice(0, self.groups)

    def chunks(self, unit: tuple[slice, slice], rows: Range) -> list[Range]:
        """Key ranges that `rows` see, near to far."""
        return self.geometry.key_chunks(rows, self.chunk, max(self.length_list[unit[0]]))

    def sees(self, unit: tuple[slice, slice], keys: Range) -> Tensor | int:
        """1 for heads whose entry has valid keys in this range, else 0; broadcasts to (u, g)."""
        if self.lengths is None:
            return 1
        return (self.lengths[unit[0]] > keys[0]).unsqueeze(-1).int()

    def load_queries(self, unit: tuple[slice, slice], rows: Range) -> Tensor:
        """(u, g, rows, D), scaled."""
        return self.q[*unit, slice(*rows)].to(self.wide) * self.settings.scale

    def load_keys(self, unit: tuple[slice, slice], keys: Range) -> tuple[Tensor, Tensor]:
        """Keys and values (u, keys, D); padding is zero, so that it cannot enter as 0 * NaN."""
        k = self.k[unit[0], slice(*keys)].to(self.wide)
        v = self.v[unit[0], slice(*keys)].to(self.wide)
        if self.lengths is not None and keys[1] > min(self.length_list[unit[0]]):
            index = torch.arange(*keys, device=k.device)
            padding = (index >= self.lengths[unit[0]].unsqueeze(-1)).unsqueeze(-1)
            k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
        return k, v

    def logits(
        self, unit: tuple[slice, slice], q: Tensor, k: Tensor, rows: Range, keys: Range
    ) -> Tensor:
        """(u, g, rows, keys); keys that are not seen are -inf, so that their gate is 0."""
        z = times(q, k.mT)
        if self.bias is not None:
            z += self.bias[unit]
        padded = self.lengths is not None and keys[1] > min(self.length_list[unit[0]])
        lengths = self.lengths[unit[0]] if padded and self.lengths is not None else None
        hidden = self.geometry.hidden(rows, keys, lengths, z.device)
        if hidden is not None:
            z.masked_fill_(hidden, float("-inf"))
        if self.settings.gate_threshold is not None:
            z.masked_fill_(z < gate_floor(self.settings.gate_threshold), float("-inf"))
        return z
