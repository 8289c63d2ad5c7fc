"""What streaming window attention remembers: the sinks and the most recent keys."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._state import load_state, save_state
from .config import WindowConfig

__all__ = ["WindowState"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowState:
    """Keys and values that later queries can still see; constant memory in the tokens seen.

    The first `num_sinks` keys, then the most recent `window - 1`: the next query brings its own
    key, which is the last of its window. Never more than num_sinks + window - 1 keys.

    key: (B, H_kv, K, D), sinks first, then in order of time; K = min(seen, num_sinks + window - 1).
    value: (B, H_kv, K, D_v).
    seen: tokens seen so far.
    config: the settings it was made with.

    Gradients flow through a state from one chunk to the next; `detach` cuts them.
    """

    key: Tensor
    value: Tensor
    seen: int
    config: WindowConfig

    @classmethod
    def kept_keys(cls, config: WindowConfig) -> tuple[int, int]:
        """How many of the first keys, and of the most recent ones, a stream has to keep."""
        return config.num_sinks, config.window - 1

    def detach(self) -> WindowState:
        """The same state outside of the autograd graph (truncated backpropagation)."""
        return replace(self, key=self.key.detach(), value=self.value.detach())

    def reorder(self, index: Tensor) -> WindowState:
        """The state of batch entries `index` (N,), int64; for beam search."""
        index = index.to(self.key.device)
        return replace(
            self, key=self.key.index_select(0, index), value=self.value.index_select(0, index)
        )

    def parts(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Its tensors and numbers by name, for files that hold several states."""
        return {"key": self.key, "value": self.value}, {"seen": self.seen}

    @classmethod
    def from_parts(
        cls, config: WindowConfig, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]
    ) -> WindowState:
        """Put together again what `parts` gave."""
        return cls(key=tensors["key"], value=tensors["value"], seen=numbers["seen"], config=config)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, which appears whole or not at all."""
        save_state(path, "WindowState", self.config, *self.parts())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: WindowConfig,
        *,
        device: torch.device | str = "cpu",
    ) -> WindowState:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ConfigError: no WindowState, or made with other settings than `config`.
        """
        return cls.from_parts(config, *load_state(path, "WindowState", config, device=device))
