"""Packed calls in plain torch: one sequence after the other through the dense code."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .common import Settings, wide_dtype
from .eager import EagerForward, EagerGradients, eager_backward, eager_forward
from .walk import QUERY_BLOCK

__all__ = ["packed_backward", "packed_forward"]


def packed_forward(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> EagerForward:
    """As `eager_forward`, for (total, H, D): log_rest and total (total_q, H), visited (S, H, .)."""
    total_q, heads, _ = query.shape
    count = _offsets(settings.cu_seqlens_q)
    wide = wide_dtype(query.dtype)
    output = query.new_zeros((total_q, heads, value.shape[-1]))
    log_rest = query.new_zeros((total_q, heads), dtype=wide)
    total = query.new_zeros((total_q, heads), dtype=torch.float64)
    blocks = -(-settings.max_seqlen_q // QUERY_BLOCK)
    visited = query.new_zeros((len(count) - 1, heads, blocks), dtype=torch.int32)
    for index, q_span, k_span, one in _sequences(settings):
        part = eager_forward(_dense(query, q_span), _dense(key, k_span), _dense(value, k_span), one)
        output[q_span] = part.output[0].transpose(0, 1)
        log_rest[q_span] = part.log_rest[0].t()
        total[q_span] = part.total[0].t()
        visited[index, :, : part.visited.shape[-1]] = part.visited[0]
    return EagerForward(output, log_rest, total, visited)


def packed_backward(
    grad_output: Tensor,
    grad_log_rest: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    total: Tensor,
    visited: Tensor,
    settings: Settings,
) -> EagerGradients:
    """As `eager_backward`, for (total, H, D)."""
    dq, dk, dv = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    dbias = torch.zeros(query.shape[1], dtype=torch.float64, device=query.device)
    for index, q_span, k_span, one in _sequences(settings):
        blocks = -(-(q_span.stop - q_span.start) // QUERY_BLOCK)
        part = eager_backward(
            _dense(grad_output, q_span),
            grad_log_rest[q_span].t()[None],
            _dense(query, q_span),
            _dense(key, k_span),
            _dense(value, k_span),
            total[q_span].t()[None],
            visited[index : index + 1, :, :blocks],
            one,
        )
        dq[q_span] = part.query[0].transpose(0, 1)
        dk[k_span] = part.key[0].transpose(0, 1)
        dv[k_span] = part.value[0].transpose(0, 1)
        dbias += part.logit_bias
    return EagerGradients(dq, dk, dv, dbias)


def _sequences(settings: Settings) -> Iterator[tuple[int, slice, slice, Settings]]:
    """(index, its queries, its keys, settings of the dense call) of every non-empty sequence."""
    q_at, k_at = _offsets(settings.cu_seqlens_q), _offsets(settings.cu_seqlens_k)
    for index in range(len(q_at) - 1):
        q_span, k_span = slice(*q_at[index : index + 2]), slice(*k_at[index : index + 2])
        n_q, n_k = q_span.stop - q_span.start, k_span.stop - k_span.start
        if n_q > 0:
            one = settings._replace(cu_seqlens_q=None, cu_seqlens_k=None, query_offset=n_k - n_q)
            yield index, q_span, k_span, one


def _offsets(cu_seqlens: Tensor | None) -> list[int]:
    assert cu_seqlens is not None, "packed calls have cu_seqlens"
    return [int(n) for n in cu_seqlens.tolist()]


def _dense(packed: Tensor, span: slice) -> Tensor:
    """(total, H, D) to (1, H, n, D)."""
    return packed[span].transpose(0, 1)[None]
