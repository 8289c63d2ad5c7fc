"""The definition: a loop over segments that reads as the paper's equations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._dense import dense_attention
from ..._validation import Call
from ..call import InfiniCall, wide_dtype
from ..features import features

__all__ = ["infini_reference"]


def infini_reference(call: InfiniCall) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, H, N_q, D_v), and memory and normaliser after the last segment to be folded.

    For each segment s: read M_{s-1}, attend locally, mix; then write the segment. float32, or
    float64 for float64 inputs. O(N_q segment) memory.
    """
    config, wide = call.config, wide_dtype(call.query.dtype)
    length, lag = config.segment_length, config.lag
    batch, heads, n_q, _ = call.query.shape
    n_k = call.key.shape[2]
    groups = heads // max(call.key.shape[1], 1)
    gate = torch.sigmoid(call.gate)[None, :, None, None]
    output = torch.zeros(batch, heads, n_q, call.value.shape[-1], dtype=wide,
                         device=call.query.device)  # fmt: skip
    memory, normaliser = call.memory.to(wide), call.normaliser.to(wide)
    final = memory, normaliser
    last_query = call.query_offset + n_q - 1
    segments = max(-(-n_k // length), last_query // length + 1 if n_q else 0)
    pieces = []
    covered = max(0, -call.query_offset)  # rows before the first key see nothing
    for s in range(segments + 1):
        # memory and normaliser hold the segments before s - lag
        if s - lag == max(n_k // length - lag, 0):
            final = memory, normaliser
        first = max(s * length - call.query_offset, 0)
        stop = min((s + 1) * length - call.query_offset, n_q)
        if s < segments and first < stop:
            rows = slice(first, stop)
            keys = slice(max(s - lag, 0) * length, (s + 1) * length)
            pieces.append(_mix(call, rows, keys, s, memory, normaliser, gate, groups))
        if s >= lag:
            memory, normaliser = _write(call, s - lag, memory, normaliser)
    if pieces:
        blank = output[:, :, :covered]
        output = torch.cat((blank, *pieces), 2)
    return output.to(call.query.dtype), *final


def _mix(
    call: InfiniCall, rows: slice, keys: slice, segment: int, memory: Tensor, normaliser: Tensor,
    gate: Tensor, groups: int,
) -> Tensor:  # fmt: skip
    config, wide = call.config, memory.dtype
    offset = rows.start + call.query_offset - keys.start
    local_call = Call(
        call.query[:, :, rows].to(wide), call.key[:, :, keys].to(wide),
        call.value[:, :, keys].to(wide), None, True, call.scale, offset,
    )  # fmt: skip
    n_rows, n_keys = local_call.query.shape[2], local_call.key.shape[2]
    device = call.query.device
    position = torch.arange(n_rows, device=device)[:, None] + offset
    column = torch.arange(n_keys, device=device)[None, :]
    seen = (column <= position)[None, None]
    if call.key_lengths is not None:
        valid = column + keys.start < call.key_lengths[:, None]
        seen = seen & valid[:, None, None, :]
    local = dense_attention(local_call, seen).output
    sq = features(call.memory_query[:, :, rows], config)
    read = sq @ memory.repeat_interleave(groups, 1)
    if config.has_normaliser:
        total = (sq * normaliser.repeat_interleave(groups, 1).unsqueeze(2)).sum(-1, keepdim=True)
        read = torch.where(total > 0, read / torch.where(total > 0, total, 1.0), 0.0)
    mixed = gate * read + (1 - gate) * local
    if config.first_segment == "gated":
        return mixed
    before = max(segment - config.lag, 0) * config.segment_length
    held = torch.full((call.query.shape[0],), before, device=device)
    if call.key_lengths is not None:
        held = torch.minimum(held, call.key_lengths)
    has_memory = (held.clamp(max=call.key.shape[2]) + call.written) > 0
    return torch.where(has_memory[:, None, None, None], mixed, local)


def _write(
    call: InfiniCall, segment: int, memory: Tensor, normaliser: Tensor
) -> tuple[Tensor, Tensor]:
    config, wide = call.config, memory.dtype
    keys = slice(segment * config.segment_length, (segment + 1) * config.segment_length)
    value = call.value[:, :, keys].to(wide)
    sk = features(call.memory_key[:, :, keys], config)
    if call.key_lengths is not None:
        column = torch.arange(value.shape[2], device=value.device) + keys.start
        valid = (column < call.key_lengths[:, None])[:, None, :, None]
        sk, value = torch.where(valid, sk, 0.0), torch.where(valid, value, 0.0)
    if config.update == "gated_delta":
        assert call.write_gate is not None
        assert call.log_decay is not None
        beta, decay = call.write_gate[:, :, keys], call.log_decay[:, :, keys].exp()
        for t in range(value.shape[2]):
            k = sk[:, :, t, :, None]
            step = beta[:, :, t, None, None]
            keep = decay[:, :, t, None, None]
            if call.key_lengths is not None:
                keep = torch.where(valid[:, :, t, :, None], keep, 1.0)
            memory = keep * memory
            error = value[:, :, t, None, :] - k.transpose(-1, -2) @ memory
            memory = memory + step * k @ error
        return memory, normaliser
    added = sk
    if config.update != "linear":
        total = (sk * normaliser.unsqueeze(2)).sum(-1, keepdim=True)
        known = sk @ memory
        known = torch.where(total > 0, known / torch.where(total > 0, total, 1.0), 0.0)
        value = value - known
        if config.update == "delta_corrected":
            size = (sk * sk).sum(-1, keepdim=True)
            new = 1 - total / torch.where(size > 0, size, 1.0)
            added = new.clamp(0, 1).detach() * sk
    return memory + sk.transpose(-1, -2) @ value, normaliser + added.sum(2)
