"""Streaming HyperAttention: all keys, and the index of the chunks that are full."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._state import load_state, save_state
from .._validation import validate
from ..errors import ConfigError, ShapeError, UnsupportedError
from ..types import Impl
from .config import HyperConfig
from .incremental import Finished, IndexCache
from .index.lsh import draw_projections
from .plan import ChunkIndex, Columns

__all__ = ["HyperChunk", "HyperState", "hyper_attention_chunk"]

_BLOCK = 256  # capacity is a multiple of this many tokens


class _Memory:
    """Tensors that states share, and how far they are written."""

    def __init__(self, keys: Tensor, values: Tensor, written: int) -> None:
        self.keys, self.values, self.written = keys, values, written


class HyperState:
    """What the next chunk of a stream needs. Never changed by a call.

    A new state shares memory with the one it came from; appending is amortised O(1) a token, and
    each chunk of config.chunk_size keys is indexed once, when it is full. Continuing from an older
    state (another branch of a conversation) copies what is needed.

    key: (B, H_kv, seen, D), all keys, oldest first; None before the first chunk.
    value: (B, H_kv, seen, D_v).
    seen: tokens seen since the start.
    seed: of the hash planes and samples.
    finished: index and columns of the full chunks.
    """

    def __init__(self, config: HyperConfig = HyperConfig(), seed: int = 0) -> None:
        if config.structure != "chunks" or config.max_error is not None:
            raise ConfigError(
                f"HyperState: structure is {config.structure!r} and max_error {config.max_error}; "
                "a stream needs structure='chunks' and max_error=None, because both others look "
                "at queries that come later. Use HyperConfig(), or keep the keys yourself."
            )
        self.config = config
        self.seed = seed
        self.seen = 0
        self.finished: Finished | None = None
        self._memory: _Memory | None = None

    @classmethod
    def kept_keys(cls, config: HyperConfig) -> tuple[int, int] | None:
        """How many keys a stream has to keep: None, all of them."""
        return None

    @classmethod
    def index_cache(cls, config: HyperConfig) -> IndexCache | None:
        """What keeps the index of a key-value cache that is not ours; None if nothing can."""
        streams = config.structure == "chunks" and config.max_error is None
        return IndexCache() if streams else None

    @property
    def key(self) -> Tensor | None:
        """(B, H_kv, seen, D), a view, or None."""
        return None if self._memory is None else self._memory.keys[:, :, : self.seen]

    @property
    def value(self) -> Tensor | None:
        """(B, H_kv, seen, D_v), a view, or None."""
        return None if self._memory is None else self._memory.values[:, :, : self.seen]

    def append(self, key: Tensor, value: Tensor) -> HyperState:
        """The state after these tokens, (B, H_kv, n, D) and (B, H_kv, n, D_v)."""
        self._check_fits(key, value)
        state = HyperState(self.config, self.seed)
        state.seen = self.seen + key.shape[2]
        state._memory = self._appended(key, value)
        assert state.key is not None
        assert state.value is not None
        planes = self._planes(key)
        if self.finished is None:
            state.finished = Finished.of(state.key, state.value, self.config, planes, self.seed)
        else:
            state.finished = self.finished.extend(state.key, state.value, self.config, planes,
                                                  self.seed)  # fmt: skip
        return state

    def detach(self) -> HyperState:
        """The same state outside of the autograd graph (truncated backpropagation)."""
        if self.key is None or self.value is None:
            return self
        memory = _Memory(self.key.detach(), self.value.detach(), self.seen)
        return self._with(memory, self.seen, self.finished)

    def reorder(self, index: Tensor) -> HyperState:
        """Batch entries `index` (any length, repeats allowed), as beam search needs."""
        if self.key is None or self.value is None or self.finished is None:
            return self
        index = index.to(self.key.device)
        keys, values = self.key.index_select(0, index), self.value.index_select(0, index)
        return self._with(_Memory(keys, values, self.seen), self.seen, self.finished.select(index))

    def crop(self, seen: int) -> HyperState:
        """The state as it was after the first `seen` tokens (rejected speculation).

        Raises:
            ConfigError: more tokens than were seen, or fewer than none.
        """
        if not 0 <= seen <= self.seen:
            raise ConfigError(
                f"HyperState.crop: seen is {seen}; allowed is 0 to {self.seen}, the tokens seen. "
                "Keep an earlier state."
            )
        if self._memory is None or self.finished is None:
            return self
        finished = self.finished.first(seen // self.config.chunk_size)
        return self._with(self._memory, seen, finished)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file; it appears whole or not at all."""
        tensors: dict[str, Tensor] = {}
        if self.key is not None and self.value is not None and self.finished is not None:
            tensors = {"key": self.key, "value": self.value}
            for prefix, part in (
                ("index", self.finished.lookup),
                ("column", self.finished.columns),
            ):
                tensors.update(
                    (f"{prefix}_{name}", tensor.clone())  # two may share memory
                    for name, tensor in part._asdict().items()
                    if tensor is not None
                )
        save_state(path, "HyperState", self.config, tensors,
                   {"seen": self.seen, "seed": self.seed})  # fmt: skip

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: HyperConfig = HyperConfig(),
        *,
        device: torch.device | str = "cpu",
    ) -> HyperState:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ConfigError: another kind of file, or made with other settings.
        """
        tensors, numbers = load_state(path, "HyperState", config, device=device)
        state = cls(config, numbers["seed"])
        if not tensors:
            return state
        columns: dict[str, Any] = {n: tensors.get(f"column_{n}") for n in Columns._fields}
        finished = Finished(
            ChunkIndex(*(tensors[f"index_{name}"] for name in ChunkIndex._fields)),
            Columns(**columns),
        )
        memory = _Memory(tensors["key"], tensors["value"], numbers["seen"])
        return state._with(memory, numbers["seen"], finished)

    def _with(self, memory: _Memory, seen: int, finished: Finished | None) -> HyperState:
        state = HyperState(self.config, self.seed)
        state._memory, state.seen, state.finished = memory, seen, finished
        return state

    def _planes(self, key: Tensor) -> Tensor | None:
        if self.config.index != "lsh":
            return None
        return draw_projections(self.seed, key.shape[1], key.shape[3],
                                self.config.num_projections, key.device)  # fmt: skip

    def _appended(self, key: Tensor, value: Tensor) -> _Memory:
        memory, stop = self._memory, self.seen + key.shape[2]
        if memory is None:
            return _Memory(key, value, stop)
        if torch.is_grad_enabled() and any(
            t.requires_grad for t in (key, value, memory.keys, memory.values)
        ):
            # writing in place would break the graph of earlier chunks
            keys, values = memory.keys[:, :, : self.seen], memory.values[:, :, : self.seen]
            return _Memory(torch.cat((keys, key), 2), torch.cat((values, value), 2), stop)
        if memory.written != self.seen or stop > memory.keys.shape[2]:
            capacity = -(-(stop + stop // 2) // _BLOCK) * _BLOCK
            grown = []
            for tensor in (memory.keys, memory.values):
                room = tensor.new_empty((*tensor.shape[:2], capacity, tensor.shape[3]))
                room[:, :, : self.seen] = tensor[:, :, : self.seen]
                grown.append(room)
            memory = _Memory(grown[0], grown[1], self.seen)
        memory.keys[:, :, self.seen : stop] = key
        memory.values[:, :, self.seen : stop] = value
        memory.written = stop
        return memory

    def _check_fits(self, key: Tensor, value: Tensor) -> None:
        for label, held, new in (("key", self.key, key), ("value", self.value, value)):
            if held is None:
                continue
            alike = (*held.shape[:2], held.shape[3]) == (*new.shape[:2], new.shape[3])
            if not alike or held.dtype != new.dtype or held.device != new.device:
                raise ShapeError(
                    f"hyper_attention_chunk: {label} is {tuple(new.shape)} {new.dtype} on "
                    f"{new.device}, but the state holds {tuple(held.shape)} {held.dtype} on "
                    f"{held.device}. All but the length must agree; start from an empty state."
                )


class HyperChunk(NamedTuple):
    """output: (B, H, n, D_v) of this chunk; final_state: to be passed with the next."""

    output: Tensor
    final_state: HyperState


def hyper_attention_chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: HyperState | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    config: HyperConfig | None = None,
    seed: int = 0,
    impl: Impl | str = "auto",
) -> HyperChunk:
    """The next tokens of a causal stream: chunks of any size, down to one, equal the whole.

    Args:
        query: (B, H, n, D), the next n tokens.
        key: (B, H_kv, n, D).
        value: (B, H_kv, n, D_v).
        state: what the call before returned; None starts a stream.
        scale, enable_gqa, impl: as in `hyper_attention`.
        config, seed: for the first chunk; later ones take them from `state`.

    Returns:
        HyperChunk(output, final_state). The state passed in is not changed and may be used again,
        e.g. for another continuation.

    Raises:
        ConfigError: `config` differs from the one in `state`, or cannot stream (the paper's
            recursion, max_error).
        ShapeError: the chunk does not fit the cached keys.

    Semantics:
        A chunk of keys is indexed once, from its own keys. With gradients enabled, gradients
        reach earlier chunks through the state.

    Cost:
        As `hyper_attention` for n queries, without the index of chunks that were full before; up
        to 16 queries without gradient read only what they visit. The state holds all keys and
        values, and about 1 / cluster_size more.

    Example:
        >>> q = torch.randn(1, 2, 6, 16)
        >>> first = hyper_attention_chunk(q[:, :, :5], q[:, :, :5], q[:, :, :5])
        >>> last = hyper_attention_chunk(q[:, :, 5:], q[:, :, 5:], q[:, :, 5:], first.final_state)
        >>> last.final_state.seen
        6
    """
    from .api import stream_call

    name = "hyper_attention_chunk"
    if state is None:
        state = HyperState(config or HyperConfig(), seed)
    elif config is not None and config != state.config:
        raise ConfigError(
            f"{name}: config is {config} but the state was made with {state.config}. Leave config "
            "out, or start from an empty state."
        )
    call = validate(name, query, key, value, is_causal=True, scale=scale,
                    enable_gqa=enable_gqa, query_offset=state.seen)  # fmt: skip
    if call.query.shape[2] != call.key.shape[2]:
        raise ShapeError(
            f"{name}: query has {call.query.shape[2]} tokens and key {call.key.shape[2]}; a chunk "
            "holds the same tokens in both. Use hyper_attention with query_offset for others."
        )
    if 0 in call.key.shape[:2]:
        raise UnsupportedError(
            f"{name}: key has shape {tuple(call.key.shape)}; a stream needs at least one sequence "
            "and one head. Leave the call out."
        )
    longer = state.append(call.key, call.value)
    assert longer.key is not None
    assert longer.value is not None
    assert longer.finished is not None
    whole = call._replace(key=longer.key, value=longer.value)
    return HyperChunk(
        stream_call(name, whole, state.config, state.seed, impl, longer.finished).output, longer
    )
