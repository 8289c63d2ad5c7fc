"""Cut a call at segment bounds: runs of rows that can be computed as one batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...exact.api import exact_attention
from ..call import InfiniCall

__all__ = ["Part", "local_attention", "needed_states", "plan", "split_axis"]


class Part(NamedTuple):
    """Rows start .. stop of the query: whole segments from `segment` on, or a piece of one.

    whole: the rows and their local keys are complete segments, so they are a batch.
    """

    start: int
    stop: int
    segment: int
    segments: int
    whole: bool


def plan(call: InfiniCall) -> list[Part]:
    """Parts in order; rows before the first key belong to none."""
    length, lag = call.config.segment_length, call.config.lag
    n_q, n_k, offset = call.query.shape[2], call.key.shape[2], call.query_offset
    parts: list[Part] = []
    row = max(0, -offset)
    while row < n_q:
        position = row + offset
        segment = position // length
        if position % length == 0 and segment >= lag:
            count = min((n_q - row) // length, n_k // length - segment)
            if count > 0:
                parts.append(Part(row, row + count * length, segment, count, True))
                row += count * length
                continue
        stop = min((segment + 1) * length - offset, n_q)
        parts.append(Part(row, stop, segment, 1, False))
        row = stop
    return parts


def needed_states(call: InfiniCall, parts: list[Part]) -> int:
    """How many segments are to be summed: those that a row or the final state reads."""
    length, lag = call.config.segment_length, call.config.lag
    n_k = call.key.shape[2]
    needed = max(n_k // length - lag, 0)
    if parts:
        needed = max(needed, parts[-1].segment + parts[-1].segments - 1 - lag)
    return min(needed, -(-n_k // length))


def local_attention(call: InfiniCall, part: Part) -> Tensor:
    """(B, H, rows, D_v): softmax attention of a part inside its segments."""
    length, lag = call.config.segment_length, call.config.lag
    query = call.query[:, :, part.start : part.stop]
    first = max(part.segment - lag, 0) * length
    if not part.whole:
        keys = slice(first, (part.segment + 1) * length)
        lengths = None
        if call.key_lengths is not None:
            lengths = (call.key_lengths - first).clamp(0, call.key[:, :, keys].shape[2])
        return exact_attention(
            query, call.key[:, :, keys], call.value[:, :, keys], is_causal=True, scale=call.scale,
            enable_gqa=True, query_offset=part.start + call.query_offset - first,
            key_lengths=lengths,
        )  # fmt: skip
    batch, count = query.shape[0], part.segments
    grouped = query.shape[1] != call.key.shape[1]
    # with as many key heads as query heads, the segments may go into the heads' axis instead
    into_heads = (
        not grouped and lag == 0 and call.key_lengths is None and batch > 1
        and all(t.stride(2) * t.shape[2] == t.stride(1) for t in (query, call.key, call.value))
    )  # fmt: skip

    def cut(tensor: Tensor) -> Tensor:
        segments = split_axis(tensor, 2, count, length)
        merged: Tensor = (
            segments.flatten(1, 2) if into_heads else segments.transpose(1, 2).flatten(0, 1)
        )
        return merged

    def cut_keys(tensor: Tensor) -> Tensor:
        tensor = tensor[:, :, first : (part.segment + count) * length]
        if lag == 0:
            return cut(tensor)
        windows = tensor.unfold(2, (lag + 1) * length, length)  # (B, H_kv, count, D, 2 N)
        merged: Tensor = windows.permute(0, 2, 1, 4, 3).flatten(0, 1)
        return merged

    lengths = None
    if call.key_lengths is not None:
        starts = first + length * torch.arange(count, device=query.device)
        lengths = call.key_lengths[:, None] - starts
        lengths = lengths.clamp(0, (lag + 1) * length).flatten().to(torch.int32)
    output = exact_attention(
        cut(query), cut_keys(call.key), cut_keys(call.value), is_causal=True, scale=call.scale,
        enable_gqa=True, query_offset=lag * length, key_lengths=lengths,
    )  # fmt: skip
    if into_heads:
        joined: Tensor = split_axis(output, 1, query.shape[1], count).flatten(2, 3)
    else:
        joined = split_axis(output, 0, batch, count).transpose(1, 2).flatten(2, 3)
    return joined


def split_axis(tensor: Tensor, axis: int, outer: int, inner: int) -> Tensor:
    """One axis of size outer * inner as two; never a copy."""
    return tensor.reshape(*tensor.shape[:axis], outer, inner, *tensor.shape[axis + 1 :])
