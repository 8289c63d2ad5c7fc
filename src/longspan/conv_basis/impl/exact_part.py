"""Single heads by torch's exact kernels: the fallback, and the exact gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..._validation import Call
from ...exact.impl.eager import eager_backward, eager_forward

__all__ = ["exact_row_gradients", "exact_rows"]


def exact_rows(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, chosen: Tensor,
    scale: float,
) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:  # fmt: skip
    """((entry, head), output (N, D_v), lse (N,)) of each chosen head; one synchronisation."""
    for b, h in chosen.nonzero().tolist():
        call = _one_head(query, key, value, key_lengths, b, h, scale)
        output, lse = eager_forward(call, None, _backend(query))
        yield (b, h), output[0, 0], lse[0, 0]


def exact_row_gradients(
    grad_output: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    key_lengths: Tensor | None, chosen: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv of the chosen heads, from their recomputed output and lse."""
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    dq = torch.zeros_like(query, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (key, value))
    group = query.shape[1] // max(key.shape[1], 1)
    for b, h in chosen.nonzero().tolist():
        call = _one_head(query, key, value, key_lengths, b, h, scale)
        output, lse = eager_forward(call, None, _backend(query))
        own_lse = None if grad_lse is None else grad_lse[b : b + 1, h : h + 1]
        if own_lse is not None:
            own_lse = torch.where(lse == float("-inf"), 0.0, own_lse)
        one_q, one_k, one_v = eager_backward(
            call, None, _backend(query), grad_output[b : b + 1, h : h + 1], own_lse, output, lse
        )
        dq[b, h] = one_q[0, 0]
        dk[b, h // group] += one_k[0, 0]
        dv[b, h // group] += one_v[0, 0]
    return dq, dk.to(key.dtype), dv.to(value.dtype)


def _one_head(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, b: int, h: int,
    scale: float,
) -> Call:  # fmt: skip
    own = h // (query.shape[1] // key.shape[1])
    lengths = None if key_lengths is None else key_lengths[b : b + 1]
    q = query[b : b + 1, h : h + 1]
    return Call(q, key[b : b + 1, own : own + 1], value[b : b + 1, own : own + 1], lengths, True,
                scale, 0)  # fmt: skip


def _backend(query: Tensor) -> str:
    if query.device.type == "cpu":
        return "cpu"
    return "flash" if query.dtype in (torch.float16, torch.bfloat16) else "chunked"
