"""What streaming Infini-attention remembers: the memory and the segment that is not full yet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._state import load_state, save_state
from ..errors import ConfigError, UnsupportedError
from .config import InfiniConfig

__all__ = ["InfiniState"]

_OPTIONAL = ("memory_key", "write_gate", "log_decay")


class InfiniState(NamedTuple):
    """Everything that later tokens need of the earlier ones; its size does not depend on them.

    A value: calls return a new one. Keep any of them to continue from there again. At a multiple
    of the segment length (`at_boundary`) it holds the memory alone, the natural prefix snapshot.

    memory: (B, H_kv, F, D_v), float32 (float64 for float64 inputs); F = config.feature_dim(D).
    normaliser: (B, H_kv, F), of the same dtype.
    written: (B,), int64: valid tokens that the memory holds.
    key, value: (B, H_kv, C, D) and (B, H_kv, C, D_v): the C = seen - folded tokens not in it yet.
    memory_key: (B, H_kv, C, D), their keys for the memory, or None where these are `key`.
    write_gate, log_decay: (B, H_kv, C) or None; only of `update="gated_delta"`.
    seen: tokens so far.
    config: the settings it was made with.
    can_continue: False after a call with `key_lengths`, whose entries end at different places.

    Gradients flow through a state from one chunk to the next; `detach` cuts them.
    """

    memory: Tensor
    normaliser: Tensor
    written: Tensor
    key: Tensor
    value: Tensor
    memory_key: Tensor | None
    write_gate: Tensor | None
    log_decay: Tensor | None
    seen: int
    config: InfiniConfig
    can_continue: bool = True

    @classmethod
    def empty(
        cls,
        config: InfiniConfig,
        batch: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> InfiniState:
        """The state before the first token; `dtype` is that of keys and values."""
        value_dim = head_dim if value_dim is None else value_dim
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        rows = config.feature_dim(head_dim)
        gates = config.update == "gated_delta"
        none = torch.zeros(batch, kv_heads, 0, dtype=wide, device=device)
        return cls(
            memory=torch.zeros(batch, kv_heads, rows, value_dim, dtype=wide, device=device),
            normaliser=torch.zeros(batch, kv_heads, rows, dtype=wide, device=device),
            written=torch.zeros(batch, dtype=torch.int64, device=device),
            key=torch.zeros(batch, kv_heads, 0, head_dim, dtype=dtype, device=device),
            value=torch.zeros(batch, kv_heads, 0, value_dim, dtype=dtype, device=device),
            memory_key=None,
            write_gate=none if gates else None,
            log_decay=none if gates else None,
            seen=0,
            config=config,
        )

    @property
    def folded(self) -> int:
        """Tokens whose segments are in the memory (padding included)."""
        return self.seen - self.key.shape[2]

    @property
    def at_boundary(self) -> bool:
        """Whether a segment has just ended."""
        return self.seen % self.config.segment_length == 0

    @property
    def num_bytes(self) -> int:
        """Bytes that its tensors take."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def detach(self) -> InfiniState:
        """The same state outside of the autograd graph (truncated backpropagation)."""
        return self._map(torch.Tensor.detach)

    def clone(self) -> InfiniState:
        """A copy that shares no memory."""
        return self._map(torch.Tensor.clone)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> InfiniState:
        """On another device; `dtype` is that of keys and values (the memory stays float32)."""
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        made: dict[str, Any] = {}
        for name, tensor in self._tensors().items():
            if dtype is None or name == "written":
                made[name] = tensor.to(device=device)
            else:
                kept = name in ("key", "value", "memory_key")
                made[name] = tensor.to(device=device, dtype=dtype if kept else wide)
        return self._replace(**made)

    def reorder(self, index: Tensor) -> InfiniState:
        """The state of batch entries `index` (N,), int64; for beam search."""
        index = index.to(self.memory.device)
        return self._map(lambda tensor: tensor.index_select(0, index))

    def reset(self, index: Tensor) -> InfiniState:
        """Empty the batch entries `index` (N,), int64: other requests begin there.

        The entries that stay go on; those emptied begin, where a segment begins. `seen` counts the
        tokens of the batch as before, `written` those in the memory of each entry.

        Raises:
            UnsupportedError: a segment is not finished, or is still seen exactly: its tokens
                belong to all entries. Reset at a boundary; with `local="sliding"`, keep one state
                per request instead.
        """
        if self.key.shape[2]:
            raise UnsupportedError(
                f"InfiniState.reset: {self.key.shape[2]} tokens are not in the memory yet and "
                "belong to all entries. Allowed: at the end of a segment (at_boundary), with "
                "local='segment'. Keep one state per request (reorder, cat), or wait."
            )
        index = index.to(self.memory.device)
        return self._replace(
            memory=self.memory.index_fill(0, index, 0.0),
            normaliser=self.normaliser.index_fill(0, index, 0.0),
            written=self.written.index_fill(0, index, 0),
        )

    @classmethod
    def cat(cls, states: Sequence[InfiniState]) -> InfiniState:
        """One batch of several states whose unfinished segments are as long.

        Entries of different ages go together at a boundary, or wherever as many tokens are not
        folded yet; `seen` is that of the first. `reorder` takes entries out again.

        Raises:
            ConfigError: no states, other settings, or unfinished segments of other lengths.
        """
        if not states:
            raise ConfigError("InfiniState.cat: states is empty; pass at least one.")
        first = states[0]
        for number, other in enumerate(states[1:], 1):
            for name, mine, its in (
                ("config", first.config, other.config),
                ("unfinished segment", first.key.shape[2], other.key.shape[2]),
                ("memory_key", first.memory_key is None, other.memory_key is None),
                ("can_continue", first.can_continue, other.can_continue),
            ):
                if mine != its:
                    raise ConfigError(
                        f"InfiniState.cat: the {name} of state {number} is {its}, of state 0 "
                        f"{mine}; they must be equal. Cut chunks so that both end at the same "
                        "place of a segment, or keep the states apart."
                    )
        made: dict[str, Any] = {
            name: torch.cat([getattr(state, name) for state in states]) for name in first._tensors()
        }
        return first._replace(**made)

    def crop(self, seen: int) -> InfiniState:
        """The state as it was after the first `seen` tokens (rejected speculation).

        Raises:
            UnsupportedError: `seen` lies before what is still kept exactly: a fold into the
                memory cannot be undone. Keep the state from before the fold.
            ConfigError: `seen` is more than there was.
        """
        if seen > self.seen or seen < 0:
            raise ConfigError(
                f"InfiniState.crop: seen is {seen}; allowed is {self.folded} to {self.seen}. "
                "Pass the number of tokens to keep."
            )
        if seen < self.folded:
            raise UnsupportedError(
                f"InfiniState.crop: seen is {seen}, but the first {self.folded} tokens have been "
                "folded into the memory, which cannot be undone. Keep the state from before the "
                f"fold, or crop to {self.folded} or more."
            )
        kept = seen - self.folded
        made: dict[str, Any] = {
            name: tensor[:, :, :kept]
            for name, tensor in self._tensors().items()
            if name not in ("memory", "normaliser", "written")
        }
        return self._replace(seen=seen, **made)

    def parts(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Its tensors and numbers by name, for files that hold several states."""
        return self._tensors(), {"seen": self.seen, "can_continue": int(self.can_continue)}

    @classmethod
    def from_parts(
        cls, config: InfiniConfig, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]
    ) -> InfiniState:
        """Put together again what `parts` gave."""
        made: dict[str, Any] = {**dict.fromkeys(_OPTIONAL), **tensors}
        return cls(
            **made,
            seen=numbers["seen"],
            config=config,
            can_continue=bool(numbers["can_continue"]),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, which appears whole or not at all."""
        save_state(path, "InfiniState", self.config, *self.parts())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: InfiniConfig,
        *,
        device: torch.device | str = "cpu",
    ) -> InfiniState:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ConfigError: no InfiniState, or made with other settings than `config`.
        """
        return cls.from_parts(config, *load_state(path, "InfiniState", config, device=device))

    def _tensors(self) -> dict[str, Tensor]:
        named = self._asdict()
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def _map(self, function: Any) -> InfiniState:
        made: dict[str, Any] = {name: function(t) for name, t in self._tensors().items()}
        return self._replace(**made)
