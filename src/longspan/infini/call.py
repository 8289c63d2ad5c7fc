"""From the arguments to one form: checked, and joined with what the state still holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._validation import Call
from ..errors import ConfigError, ShapeError, UnsupportedError
from .config import InfiniConfig
from .state import InfiniState

__all__ = ["InfiniCall", "make_call", "wide_dtype"]

NOT_CAUSAL = (
    "is_causal is False, but Infini-attention is causal by definition: the memory holds the "
    "segments before a query's own. Pass is_causal=True"
)


class InfiniCall(NamedTuple):
    """What every implementation receives. Key 0 is the first of a segment."""

    query: Tensor  # (B, H, N_q, D)
    key: Tensor  # (B, H_kv, N_k, D), the tokens of the state first
    value: Tensor  # (B, H_kv, N_k, D_v)
    memory_query: Tensor  # (B, H, N_q, D)
    memory_key: Tensor  # (B, H_kv, N_k, D)
    write_gate: Tensor | None  # (B, H_kv, N_k), wide; "gated_delta" only
    log_decay: Tensor | None
    gate: Tensor  # (H,), wide
    memory: Tensor  # (B, H_kv, F, D_v), wide: what was folded before key 0
    normaliser: Tensor  # (B, H_kv, F)
    written: Tensor  # (B,) int64
    key_lengths: Tensor | None  # (B,) int32
    scale: float
    query_offset: int
    seen: int  # tokens after this call
    own_memory_key: bool  # memory_key is not key
    starts_empty: bool  # no state was given, so that nothing is held before key 0
    config: InfiniConfig


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums, memories and gates are computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def make_call(
    name: str,
    call: Call,
    config: InfiniConfig,
    *,
    gate: Tensor | None,
    memory_query: Tensor | None,
    memory_key: Tensor | None,
    write_gate: Tensor | None,
    log_decay: Tensor | None,
    initial_state: InfiniState | None,
) -> InfiniCall:
    """Check what is particular to this mechanism and join the call with its state."""
    if not call.is_causal:
        raise UnsupportedError(f"{name}: {NOT_CAUSAL}.")
    query, key, value = call.query, call.key, call.value
    batch, kv_heads, n_k, head_dim = key.shape
    wide = wide_dtype(query.dtype)
    checked_gate = _check_gate(name, gate, query)
    memory_query = _check_like(name, "memory_query", memory_query, "query", query)
    own_memory_key = memory_key is not None
    memory_key = _check_like(name, "memory_key", memory_key, "key", key)
    if config.update == "gated_delta":
        ones = key.new_ones((batch, kv_heads, n_k), dtype=wide)
        write_gate = _check_rate(name, "write_gate", write_gate, ones)
        log_decay = _check_rate(name, "log_decay", log_decay, torch.zeros_like(ones))
    elif write_gate is not None or log_decay is not None:
        given = "write_gate" if write_gate is not None else "log_decay"
        raise UnsupportedError(
            f"{name}: {given} was given but config.update is {config.update!r}; only "
            "update='gated_delta' uses it. Drop it, or change the config."
        )
    state = initial_state
    if state is None:
        state = InfiniState.empty(
            config, batch, kv_heads, head_dim, value.shape[-1], dtype=key.dtype, device=key.device
        )
        return InfiniCall(
            query, key, value, memory_query, memory_key, write_gate, log_decay, checked_gate,
            state.memory, state.normaliser, state.written, call.key_lengths, call.scale,
            call.query_offset, n_k, own_memory_key, True, config,
        )  # fmt: skip
    _check_state(name, state, call, config, own_memory_key)
    held = state.key.shape[2]
    if own_memory_key and state.memory_key is not None:
        memory_key = torch.cat((state.memory_key, memory_key), 2)
    if held:
        key, value = torch.cat((state.key, key), 2), torch.cat((state.value, value), 2)
        if write_gate is not None and state.write_gate is not None:
            write_gate = torch.cat((state.write_gate, write_gate), 2)
        if log_decay is not None and state.log_decay is not None:
            log_decay = torch.cat((state.log_decay, log_decay), 2)
    if not own_memory_key:
        memory_key = key
    lengths = None if call.key_lengths is None else call.key_lengths + held
    return InfiniCall(
        query, key, value, memory_query, memory_key, write_gate, log_decay, checked_gate,
        state.memory, state.normaliser, state.written, lengths, call.scale,
        call.query_offset + held, state.seen + n_k, own_memory_key, False, config,
    )  # fmt: skip


def _check_gate(name: str, gate: Tensor | None, query: Tensor) -> Tensor:
    heads, wide = query.shape[1], wide_dtype(query.dtype)
    if gate is None:
        return query.new_zeros(heads, dtype=wide)
    if not isinstance(gate, Tensor) or tuple(gate.shape) != (heads,):
        got = tuple(gate.shape) if isinstance(gate, Tensor) else repr(gate)
        raise ShapeError(
            f"{name}: gate is {got}; it must be a tensor of shape ({heads},), one number per query "
            "head, whose sigmoid is the share of the memory. Use torch.zeros(H) to start with."
        )
    if not gate.is_floating_point() or gate.device != query.device:
        raise ShapeError(
            f"{name}: gate is {gate.dtype} on {gate.device}; it must be floating point on "
            f"{query.device}. Cast or move it."
        )
    return gate.to(wide)


def _check_like(name: str, label: str, tensor: Tensor | None, other: str, like: Tensor) -> Tensor:
    if tensor is None:
        return like
    if not isinstance(tensor, Tensor) or tensor.shape != like.shape:
        got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ShapeError(
            f"{name}: {label} is {got}; it must have the shape of {other}, {tuple(like.shape)}: "
            f"the same vectors without position encoding. Leave it out if {other} has none."
        )
    if torch.is_autocast_enabled(like.device.type) and tensor.is_floating_point():
        tensor = tensor.to(like.dtype)
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ShapeError(
            f"{name}: {label} is {tensor.dtype} on {tensor.device} but {other} is {like.dtype} on "
            f"{like.device}. They must agree; cast or move it."
        )
    return tensor


def _check_rate(name: str, label: str, tensor: Tensor | None, like: Tensor) -> Tensor:
    if tensor is None:
        return like
    if not isinstance(tensor, Tensor) or tensor.shape != like.shape:
        got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ShapeError(
            f"{name}: {label} is {got}; it must be (B, H_kv, N_k) = {tuple(like.shape)}, one "
            "number per key. Leave it out for none."
        )
    return tensor.to(device=like.device, dtype=like.dtype)


def _check_state(
    name: str, state: InfiniState, call: Call, config: InfiniConfig, own_memory_key: bool
) -> None:
    if not isinstance(state, InfiniState):
        raise ShapeError(
            f"{name}: initial_state is a {type(state).__name__}; it must be the final_state of an "
            "earlier call, or None at the start."
        )
    if state.config != config:
        raise ConfigError(
            f"{name}: initial_state was made with {state.config} but config is {config}. Pass the "
            "settings it was made with, or initial_state=None."
        )
    if not state.can_continue:
        raise UnsupportedError(
            f"{name}: initial_state comes from a call with key_lengths, whose entries end at "
            "different places. Run entries of one length together, or the varlen form, and "
            "continue from those states."
        )
    wide = wide_dtype(call.query.dtype)
    rows = config.feature_dim(call.key.shape[-1])
    want = (*call.key.shape[:2], rows, call.value.shape[-1])
    if tuple(state.memory.shape) != want or state.memory.dtype is not wide:
        raise ShapeError(
            f"{name}: initial_state.memory is {tuple(state.memory.shape)} {state.memory.dtype}; "
            f"for these keys and values it must be {want} {wide}: (B, H_kv, F, D_v). Reorder or "
            "cast the state (InfiniState.to), or start from None."
        )
    for label, held, new in (("key", state.key, call.key), ("value", state.value, call.value)):
        if held.dtype != new.dtype or held.device != new.device:
            raise ShapeError(
                f"{name}: initial_state.{label} is {held.dtype} on {held.device} but {label} is "
                f"{new.dtype} on {new.device}. Use InfiniState.to, or cast {label}."
            )
    if state.key.shape[2] and own_memory_key != (state.memory_key is not None):
        had = "had" if state.memory_key is not None else "had no"
        raise ConfigError(
            f"{name}: the call that made initial_state {had} memory_key, this one "
            f"{'has one' if own_memory_key else 'has none'}. Pass memory_key in all calls of a "
            "stream or in none."
        )
