"""Infini-attention in plain torch: all segments at once, differentiable, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import InfiniCall, wide_dtype
from ..features import features
from .memory import divide, memory_states
from .parts import Part, local_attention, needed_states, plan

__all__ = ["assemble", "has_memory", "infini_eager"]


def infini_eager(call: InfiniCall) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, H, N_q, D_v), and memory and normaliser after the last segment to be folded."""
    parts = plan(call)
    count = needed_states(call, parts)
    memory, normaliser = memory_states(call, count)
    pieces = [_mixed(call, part, memory, normaliser) for part in parts]
    folded = max(call.key.shape[2] // call.config.segment_length - call.config.lag, 0)
    return assemble(call, pieces), memory[:, :, folded], normaliser[:, :, folded]


def assemble(call: InfiniCall, pieces: list[Tensor]) -> Tensor:
    """The parts in order, behind zeros for rows before the first key."""
    blank = min(max(0, -call.query_offset), call.query.shape[2])
    if blank or not pieces:  # zero, but of the graph
        gone = torch.ones((), dtype=torch.bool, device=call.query.device)
        rows = call.query[:, :, : blank if pieces else None].masked_fill(gone, 0.0)
        pieces = [rows @ rows.new_zeros(rows.shape[-1], call.value.shape[-1]), *pieces]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def has_memory(call: InfiniCall, segment: int, count: int) -> Tensor:
    """(B, count) bool: whether the memory that these segments read holds a token."""
    config, device = call.config, call.query.device
    segments = torch.arange(segment, segment + count, device=device)
    held = (segments - config.lag).clamp(min=0) * config.segment_length
    held = held.clamp(max=call.key.shape[2]).unsqueeze(0)
    if call.key_lengths is not None:
        held = torch.minimum(held, call.key_lengths.unsqueeze(-1))
    return (held + call.written.unsqueeze(-1)) > 0


def _mixed(call: InfiniCall, part: Part, memory: Tensor, normaliser: Tensor) -> Tensor:
    config, wide = call.config, wide_dtype(call.query.dtype)
    local = local_attention(call, part)
    unread = call.starts_empty and part.segment + part.segments - 1 <= config.lag
    if unread and config.first_segment == "local":
        return local
    last = memory.shape[2] - 1
    first = min(max(part.segment - config.lag, 0), last)
    held = slice(first, min(first + part.segments, last + 1))
    batch, heads = call.query.shape[:2]
    kv_heads = max(call.key.shape[1], 1)
    rows = slice(part.start, part.stop)
    shape = (batch, kv_heads, heads // kv_heads, part.segments, -1)
    phi = features(call.memory_query[:, :, rows], config)
    phi = phi.reshape(*shape, phi.shape[-1])
    read = phi @ memory[:, :, held].unsqueeze(2)
    if config.has_normaliser:
        total = phi @ normaliser[:, :, held].unsqueeze(2).unsqueeze(-1)
        read = divide(read, total)
    near = local.to(wide).reshape(*shape, local.shape[-1])
    gate = torch.sigmoid(call.gate).reshape(kv_heads, -1, 1, 1, 1)
    mixed = gate * read + (1 - gate) * near
    if config.first_segment == "local":
        seen = has_memory(call, part.segment, part.segments)[:, None, None, :, None, None]
        mixed = torch.where(seen, mixed, near)
    return mixed.reshape(local.shape).to(local.dtype)
