"""Infini-attention with the Triton kernels: torch's attention on segments, then one mixing pass.

The local part is exact attention on a batch of segments, for which torch has the fastest kernels;
what is ours reads keys and values once for the states, and queries and local outputs once for the
mix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._triton.launch import interpreting
from ..call import InfiniCall
from ..config import InfiniConfig
from ..ops import (
    MAX_ROWS,
    StatesAndInputs,
    infini_decode,
    infini_delta_states,
    infini_mix,
    infini_states,
)
from .eager import assemble
from .memory import memory_states
from .parts import local_attention, needed_states, plan

__all__ = ["infini_triton", "kernel_refusal"]

_WIDEST = 128
_NARROW = 64
_SHARED = 150 * 1024  # bytes that the widest tiles take


def infini_triton(call: InfiniCall) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, H, N_q, D_v), and memory and normaliser after the last segment to be folded."""
    config, n_k = call.config, call.key.shape[2]
    parts = plan(call)
    if _is_decoding(call):
        return _decode(call, needed_states(call, parts))
    count = needed_states(call, parts)
    if config.update in ("linear", "delta"):
        memory, normaliser, key, value = StatesAndInputs.apply(  # type: ignore[no-untyped-call]
            call.memory_key, call.value, call.memory, call.normaliser, call.key_lengths,
            config.segment_length, count, config.update == "delta",
        )  # fmt: skip
        call = call._replace(value=value, key=key if call.memory_key is call.key else call.key)
    else:
        memory, normaliser = memory_states(call, count)
    local = assemble(call, [local_attention(call, part) for part in parts])
    unread = not parts or parts[-1].segment + parts[-1].segments - 1 <= config.lag
    if config.first_segment == "gated" or not (call.starts_empty and unread):
        local = infini_mix(
            call.memory_query, local, memory, normaliser, call.gate, call.written,
            call.key_lengths, config.segment_length, config.lag, call.query_offset, n_k,
            config.first_segment == "local",
        )  # fmt: skip
    folded = max(n_k // config.segment_length - config.lag, 0)
    return local, memory[:, :, folded], normaliser[:, :, folded]


def _is_decoding(call: InfiniCall) -> bool:
    """Whether the rows are few, of one segment, and without gradients."""
    n_q, length = call.query.shape[2], call.config.segment_length
    tensors = (call.query, call.key, call.value, call.memory_query, call.memory_key, call.gate,
               call.memory, call.normaliser)  # fmt: skip
    return (
        n_q > 0
        and call.key_lengths is None
        and call.query_offset >= 0
        and (call.query_offset + n_q - 1) // length == call.query_offset // length
        and n_q * (call.query.shape[1] // max(call.key.shape[1], 1)) <= MAX_ROWS
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def _decode(call: InfiniCall, count: int) -> tuple[Tensor, Tensor, Tensor]:
    config, n_k = call.config, call.key.shape[2]
    if count == 0:
        memory, normaliser = call.memory.unsqueeze(2), call.normaliser.unsqueeze(2)
    elif config.update in ("linear", "delta"):
        states = infini_states if config.update == "linear" else infini_delta_states
        memory, normaliser, *_ = states(
            call.memory_key, call.value, call.memory, call.normaliser, None,
            config.segment_length, count,
        )  # fmt: skip
    else:
        memory, normaliser = memory_states(call, count)
    output = infini_decode(
        call.query, call.key, call.value, call.memory_query, memory, normaliser, call.gate,
        call.written, config.segment_length, config.lag, call.query_offset,
        config.first_segment == "local", call.scale,
    )  # fmt: skip
    folded = max(n_k // config.segment_length - config.lag, 0)
    return output, memory[:, :, folded], normaliser[:, :, folded]


def kernel_refusal(
    config: InfiniConfig, dtype: torch.dtype, device: torch.device, head_dim: int, value_dim: int
) -> str | None:
    """Why the kernels cannot run a call of this kind; None if they can."""
    update, feature_map = config.update, config.feature_map
    if dtype is torch.float32 and not interpreting():
        return "query is torch.float32; the Triton kernels take float16 and bfloat16"
    if update == "gated_delta":
        return "update='gated_delta' has no Triton kernel"
    if feature_map != "elu":
        return f"feature_map={feature_map!r} has no Triton kernel; only 'elu' has one"
    for label, dim in (("head dim", head_dim), ("value dim", value_dim)):
        if dim > _WIDEST or dim % 8:
            return f"{label} {dim}; the Triton kernels take multiples of 8 up to {_WIDEST}"
    if max(head_dim, value_dim) > _NARROW and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        room = getattr(properties, "shared_memory_per_block_optin")  # noqa: B009 (not in its stub)
        if room < _SHARED:
            return (
                f"the device has {room} bytes of shared memory a block; head dims over {_NARROW} "
                f"need {_SHARED} (A100, H100 and later)"
            )
    return None
