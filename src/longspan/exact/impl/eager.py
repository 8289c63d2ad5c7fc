"""Exact attention from torch's kernels: plan the parts, run each, join them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._merge import merge
from ..._validation import Call
from ...types import AttentionOutput
from . import vendor as vendors
from .chunked import chunked_backward, chunked_forward
from .plan import Part, plan, split_square

_VENDORS = {"cpu": vendors.CPU, "flash": vendors.FLASH, "cudnn": vendors.CUDNN}


def eager_forward(call: Call, attn_mask: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """Output (B, H, N_q, D_v), lse (B, H, N_q); `backend`: "cpu", "flash", "cudnn", "chunked"."""
    if backend == "chunked":
        return chunked_forward(call, attn_mask)
    vendor = _VENDORS[backend]
    batch, heads, n_q, _ = call.query.shape
    wide = torch.float64 if call.query.dtype is torch.float64 else torch.float32
    output = call.query.new_zeros((batch, heads, n_q, call.value.shape[-1]))
    lse = call.query.new_full((batch, heads, n_q), float("-inf"), dtype=wide)
    for entries, part in _parts(call):
        pieces = []
        for piece in [part] if vendor.aligns_at_end else split_square(part):
            q, k, v = _slices(call, entries, piece)
            pieces.append(
                AttentionOutput(*vendors.run_forward(vendor, q, k, v, piece.is_causal, call.scale))
            )
        joined = merge(pieces)
        rows = slice(part.q_start, part.q_end)
        output[entries, :, rows] = joined.output
        lse[entries, :, rows] = joined.lse.to(wide)
    return output, lse


def eager_backward(
    call: Call,
    attn_mask: Tensor | None,
    backend: str,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; parts use the lse of the whole row, so that their gradients simply add up."""
    if backend == "chunked":
        return chunked_backward(call, attn_mask, grad_output, grad_lse, output, lse)
    vendor = _VENDORS[backend]
    if vendor is vendors.CUDNN and grad_lse is not None:  # its largest head dim is in the way
        vendor = vendors.FLASH
    wide = torch.float64 if call.query.dtype is torch.float64 else torch.float32
    inputs = (call.query, call.key, call.value)
    sums = [torch.zeros_like(tensor, dtype=wide) for tensor in inputs]
    for entries, part in _parts(call):
        rows = slice(part.q_start, part.q_end)
        for piece in [part] if vendor.aligns_at_end else split_square(part):
            q, k, v = _slices(call, entries, piece)
            keys = slice(piece.k_start, piece.k_end)
            grads = vendors.run_backward(
                vendor,
                grad_output[entries, :, rows],
                None if grad_lse is None else grad_lse[entries, :, rows],
                q,
                k,
                v,
                output[entries, :, rows],
                lse[entries, :, rows],
                piece.is_causal,
                call.scale,
            )
            for total, grad, span in zip(sums, grads, (rows, keys, keys), strict=True):
                total[entries, :, span] += grad
    dq, dk, dv = (s.to(t.dtype) for s, t in zip(sums, inputs, strict=True))
    return dq, dk, dv


def _parts(call: Call) -> list[tuple[slice, Part]]:
    """Parts with the batch entries they cover; reading key_lengths costs one synchronisation."""
    batch, _, n_q, _ = call.query.shape
    n_k = call.key.shape[2]
    if call.query.numel() == 0 or call.value.numel() == 0:
        return []
    if call.key_lengths is None:
        spans = [(slice(None), n_k)]
    else:
        lengths = [max(0, min(length, n_k)) for length in call.key_lengths.tolist()]
        spans = [(slice(b, b + 1), lengths[b]) for b in range(batch)]
    return [
        (entries, part)
        for entries, length in spans
        for part in plan(n_q, length, call.is_causal, call.query_offset)
    ]


def _slices(call: Call, entries: slice, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    keys = slice(part.k_start, part.k_end)
    return (
        call.query[entries, :, part.q_start : part.q_end],
        call.key[entries, :, keys],
        call.value[entries, :, keys],
    )
