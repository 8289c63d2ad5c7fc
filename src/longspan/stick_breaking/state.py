"""Streaming: keys and values without positions, fed in chunks of any size.

Stick-breaking depends on the order of keys, not on their positions, so a state is nothing but the
cached keys and values. A window bounds it.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from .._state import load_state, save_state
from ..errors import ConfigError, ShapeError
from ..types import Impl
from .api import stick_breaking_attention
from .cache import KeyValueBuffer
from .config import StickBreakingConfig

__all__ = ["StickBreakingChunk", "StickBreakingState", "stick_breaking_attention_chunk"]


class StickBreakingState:
    """Keys and values seen so far: what the next chunk needs. Never changed by a call.

    A new state shares memory with the one it came from, and appending is amortised O(1) a token;
    continuing from an older state (another branch of a conversation) copies what is needed.

    key: (B, H_kv, C, D), the C cached keys, oldest first; None before the first chunk.
    value: (B, H_kv, C, D_v).
    seen: tokens seen since the start; more than C once a window dropped some.
    """

    def __init__(self, config: StickBreakingConfig = StickBreakingConfig()) -> None:
        self.config = config
        self.seen = 0
        self._buffer: KeyValueBuffer | None = None

    @classmethod
    def kept_keys(cls, config: StickBreakingConfig) -> tuple[int, int] | None:
        """How many of the first and of the most recent keys a stream has to keep; None: all."""
        if config.window is None:
            return None
        return 0, config.window - int(config.attend_current)  # a query brings its own key

    @property
    def key(self) -> Tensor | None:
        """(B, H_kv, C, D) or None."""
        return None if self._buffer is None else self._buffer.keys

    @property
    def value(self) -> Tensor | None:
        """(B, H_kv, C, D_v) or None."""
        return None if self._buffer is None else self._buffer.values

    @property
    def num_cached(self) -> int:
        """Tokens held, C."""
        return 0 if self._buffer is None else self._buffer.length

    def append(self, key: Tensor, value: Tensor) -> StickBreakingState:
        """The state after these tokens, (B, H_kv, n, D) and (B, H_kv, n, D_v), all of them held."""
        if self._buffer is None:
            return self._with(KeyValueBuffer.of(key, value), self.seen + key.shape[2])
        self._check_fits(key, value)
        return self._with(self._buffer.append(key, value), self.seen + key.shape[2])

    def trim(self) -> StickBreakingState:
        """Without the keys that no later query can see (those outside the window)."""
        kept = self.kept_keys(self.config)
        if self._buffer is None or kept is None:
            return self
        return self._with(self._buffer.keep_last(kept[1]), self.seen)

    def detach(self) -> StickBreakingState:
        """The same state outside of the autograd graph (truncated backpropagation)."""
        if self._buffer is None:
            return self
        buffer = KeyValueBuffer.of(self._buffer.keys.detach(), self._buffer.values.detach())
        return self._with(buffer, self.seen)

    def reorder(self, index: Tensor) -> StickBreakingState:
        """Batch entries `index` (any length, repeats allowed), as beam search needs."""
        if self._buffer is None:
            return self
        return self._with(self._buffer.select(index), self.seen)

    def crop(self, seen: int) -> StickBreakingState:
        """The state as it was after the first `seen` tokens (rejected speculation).

        Raises:
            ConfigError: more tokens than were seen, or the window already dropped keys that
                the shorter state needs.
        """
        drop = self.seen - seen
        if seen < 0 or drop < 0 or drop > self.num_cached:
            raise ConfigError(
                f"StickBreakingState.crop: seen is {seen}; allowed is "
                f"{self.seen - self.num_cached} to {self.seen}. Keep an earlier state."
            )
        kept = self.kept_keys(self.config)
        if kept is not None and self.num_cached - drop < min(seen, kept[1]):
            raise ConfigError(
                f"StickBreakingState.crop: seen is {seen}, but the window of {self.config.window} "
                "has dropped keys that this state needs. Keep an earlier state."
            )
        if self._buffer is None or drop == 0:
            return self
        return self._with(self._buffer.drop_last(drop), seen)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file; it appears whole or not at all."""
        tensors = {} if self._buffer is None else {"key": self.key, "value": self.value}
        save_state(path, "StickBreakingState", self.config, tensors, {"seen": self.seen})  # type: ignore[arg-type]

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: StickBreakingConfig = StickBreakingConfig(),
        *,
        device: torch.device | str = "cpu",
    ) -> StickBreakingState:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ConfigError: another kind of file, or made with other settings.
        """
        tensors, numbers = load_state(path, "StickBreakingState", config, device=device)
        state = cls(config)
        state.seen = numbers["seen"]
        if tensors:
            state._buffer = KeyValueBuffer.of(tensors["key"], tensors["value"])
        return state

    def _with(self, buffer: KeyValueBuffer, seen: int) -> StickBreakingState:
        state = StickBreakingState(self.config)
        state._buffer, state.seen = buffer, seen
        return state

    def _check_fits(self, key: Tensor, value: Tensor) -> None:
        for label, held, new in (("key", self.key, key), ("value", self.value, value)):
            assert held is not None
            alike = (*held.shape[:2], held.shape[3]) == (*new.shape[:2], new.shape[3])
            if not alike or held.dtype != new.dtype or held.device != new.device:
                raise ShapeError(
                    f"stick_breaking_attention_chunk: {label} is {tuple(new.shape)} {new.dtype} on "
                    f"{new.device}, but the state holds {tuple(held.shape)} {held.dtype} on "
                    f"{held.device}. All but the length must agree; start from an empty state."
                )


class StickBreakingChunk(NamedTuple):
    """output: (B, H, n, D_v) of this chunk; final_state: to be passed with the next."""

    output: Tensor
    final_state: StickBreakingState


def stick_breaking_attention_chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: StickBreakingState | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    logit_bias: Tensor | None = None,
    config: StickBreakingConfig | None = None,
    impl: Impl | str = "auto",
) -> StickBreakingChunk:
    """The next tokens of a stream: chunks of any size, down to one token, equal the whole.

    Args:
        query: (B, H, n, D), the next n tokens.
        key: (B, H_kv, n, D).
        value: (B, H_kv, n, D_v).
        state: what the call before returned; None starts a stream.
        scale, enable_gqa, logit_bias, impl: as in `stick_breaking_attention`.
        config: for the first chunk; later ones take it from `state`.

    Returns:
        StickBreakingChunk(output, final_state). The state passed in is not changed and may be used
        again, e.g. for another continuation.

    Raises:
        ConfigError: `config` differs from the one in `state`.
        ShapeError: the chunk does not fit the cached keys.

    Semantics:
        With gradients enabled, gradients reach earlier chunks through the state; `early_stop`
        looks at the sticks of one chunk, so it may stop elsewhere than in a call over the whole,
        within the same bound.

    Cost:
        As `stick_breaking_attention` for n queries and the cached keys; the state grows by n keys
        and values, and is bounded by `config.window` if set.

    Example:
        >>> q = torch.randn(1, 2, 6, 16)
        >>> a, b = q[:, :, :5], q[:, :, 5:]
        >>> first = stick_breaking_attention_chunk(a, a, a)
        >>> last = stick_breaking_attention_chunk(b, b, b, first.final_state)
        >>> torch.allclose(last.output, stick_breaking_attention(q, q, q)[:, :, 5:], atol=1e-6)
        True
    """
    if state is None:
        state = StickBreakingState(config or StickBreakingConfig())
    elif config is not None and config != state.config:
        raise ConfigError(
            f"stick_breaking_attention_chunk: config is {config} but the state was made with "
            f"{state.config}. Leave config out, or start from an empty state."
        )
    if key.shape[2] != query.shape[2]:
        raise ShapeError(
            f"stick_breaking_attention_chunk: query has {query.shape[2]} tokens and key "
            f"{key.shape[2]}; a chunk holds the same tokens in both. Use "
            "stick_breaking_attention with query_offset for other alignments."
        )
    offset = state.num_cached
    longer = state.append(key, value)
    assert longer.key is not None
    assert longer.value is not None
    output = stick_breaking_attention(
        query,
        longer.key,
        longer.value,
        is_causal=True,
        scale=scale,
        enable_gqa=enable_gqa,
        query_offset=offset,
        logit_bias=logit_bias,
        config=state.config,
        impl=impl,
    )
    return StickBreakingChunk(output, longer.trim())
