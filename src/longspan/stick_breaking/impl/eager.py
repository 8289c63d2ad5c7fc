"""Stick-breaking attention in plain torch: chunked, O(N * chunk) memory, forward and backward.

The forward walks key chunks from the query's end backwards and carries the accumulator and the log
of the stick. The backward walks the same chunks from the far end: it recovers the stick entering
a chunk from the one leaving it (the total is kept in float64, so that nothing drifts), and carries
the sum of everything farther, which is what the gradient of a gate needs (README, "Gradients").
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .common import Settings, wide_dtype
from .tiles import exclusive_cumsum, log_sticks, times, times_transposed, weights_of
from .walk import Walk

__all__ = [
    "EagerForward",
    "EagerGradients",
    "eager_backward",
    "eager_forward",
]


class EagerForward(NamedTuple):
    """Result of `eager_forward`.

    output: (B, H, N_q, D_v) in the dtype of query.
    log_rest: (B, H, N_q), float32 (float64 for float64 inputs).
    total: (B, H, N_q), float64: log_rest before rounding.
    visited: (B, H, query blocks), int32: key chunks that were walked.
    """

    output: Tensor
    log_rest: Tensor
    total: Tensor
    visited: Tensor


class EagerGradients(NamedTuple):
    """Gradients of query, key, value in their dtypes, and of the logit bias (H,), float64."""

    query: Tensor
    key: Tensor
    value: Tensor
    logit_bias: Tensor


def eager_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: Settings,
) -> EagerForward:
    """Output and log of the rest, with what the backward needs."""
    walk = Walk(query, key, value, settings)
    stop = None if settings.early_stop is None else math.log(settings.early_stop)
    output = walk.like_query(value.shape[-1], dtype=query.dtype)
    total = walk.like_query(dtype=torch.float64)
    visited = query.new_zeros((*total.shape[:2], len(walk.blocks)), dtype=torch.int32)
    for unit in walk.units(alone=stop is not None):
        for block, rows in enumerate(walk.blocks):
            q = walk.load_queries(unit, rows)
            acc = q.new_zeros((*q.shape[:3], value.shape[-1]))
            log_rest = q.new_zeros(q.shape[:3], dtype=torch.float64)
            for keys in walk.chunks(unit, rows):
                k, v = walk.load_keys(unit, keys)
                z = walk.logits(unit, q, k, rows, keys)
                nearer, taken = log_sticks(z)
                acc += times(weights_of(torch.sigmoid(z), nearer, log_rest), v)
                log_rest += taken
                visited[*unit, block] += walk.sees(unit, keys)
                if stop is not None and bool(log_rest.amax() < stop):
                    break
            output[*unit, slice(*rows)] = acc.to(output.dtype)
            total[*unit, slice(*rows)] = log_rest
    heads = query.shape[:3]
    return EagerForward(
        output.reshape(*heads, value.shape[-1]),
        total.reshape(heads).to(wide_dtype(query.dtype), copy=True),
        total.reshape(heads),
        visited.reshape(*query.shape[:2], len(walk.blocks)),
    )


def eager_backward(
    grad_output: Tensor,
    grad_log_rest: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    total: Tensor,
    visited: Tensor,
    settings: Settings,
) -> EagerGradients:
    """Gradients over exactly the chunks that the forward walked."""
    walk = Walk(query, key, value, settings)
    grad_output, total = walk.fold(grad_output), walk.fold(total)
    grad_log_rest, visited = walk.fold(grad_log_rest), walk.fold(visited)
    dq = walk.like_query(query.shape[-1], dtype=walk.wide)
    dk, dv = torch.zeros_like(walk.k, dtype=walk.wide), torch.zeros_like(walk.v, dtype=walk.wide)
    dbias = torch.zeros(walk.q.shape[:2], dtype=torch.float64, device=query.device)
    stops = settings.early_stop is not None
    for unit in walk.units(alone=stops):
        for block, rows in enumerate(walk.blocks):
            q = walk.load_queries(unit, rows)
            do = grad_output[*unit, slice(*rows)].to(walk.wide)
            log_rest = total[*unit, slice(*rows)].clone()
            # sum over all farther keys of weight * (do . v), plus the gradient of log_rest
            farther = grad_log_rest[*unit, slice(*rows)].to(torch.float64, copy=True)
            dq_rows = torch.zeros_like(q)
            chunks = walk.chunks(unit, rows)
            if stops:
                chunks = chunks[: int(visited[*unit, block].item())]
            for keys in reversed(chunks):
                k, v = walk.load_keys(unit, keys)
                z = walk.logits(unit, q, k, rows, keys)
                nearer, taken = log_sticks(z)
                log_rest -= taken
                gate = torch.sigmoid(z)
                weights = weights_of(gate, nearer, log_rest)
                a = times(do, v.mT).mul_(weights)
                before, whole = exclusive_cumsum(a)  # keys ascend: from the far end
                before += farther.to(walk.wide).unsqueeze(-1)
                farther += whole
                # (1 - b) a - b S; 1 - b as sigmoid(-z), which keeps its digits as b nears 1
                dz = torch.sigmoid(-z).mul_(a).addcmul_(gate, before, value=-1.0)
                dq_rows += times(dz, k)
                dbias[unit] += dz.sum((-1, -2), dtype=torch.float64)
                span = slice(*keys)
                dk[unit[0], span] += times_transposed(dz, q)
                dv[unit[0], span] += times_transposed(weights, do)
            dq[*unit, slice(*rows)] = dq_rows
    return EagerGradients(
        dq.mul_(settings.scale).reshape(query.shape).to(query.dtype),
        dk.reshape(key.shape).to(key.dtype),
        dv.reshape(value.shape).to(value.dtype),
        dbias.reshape(query.shape[0], query.shape[1]).sum(0),
    )
