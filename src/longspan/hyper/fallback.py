"""How wrong each head is, measured on some of its rows, and exact attention where too wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dense import causal_visible, dense_attention
from .._validation import Call
from ..types import AttentionOutput, Impl
from .config import HyperConfig

__all__ = ["ROWS", "error_of_heads", "exact_where_needed"]

ROWS = 64  # queries of each head that are computed exactly to see how wrong the estimate is


def error_of_heads(call: Call, output: Tensor) -> Tensor:
    """(B, H) float32: mean over ROWS evenly spaced rows of |output - exact| / |exact|."""
    n_q = call.query.shape[2]
    errors = []
    rows = torch.arange(min(ROWS, n_q), device=output.device) * n_q // max(1, min(ROWS, n_q))
    for row in rows.tolist():
        one = call._replace(
            query=call.query[:, :, row : row + 1], query_offset=call.query_offset + row
        )
        exact = dense_attention(one, causal_visible(one)).output.float()
        apart = (output[:, :, row : row + 1].float() - exact).norm(dim=-1)
        errors.append(apart / exact.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny))
    if not errors:
        return torch.zeros(call.query.shape[:2], device=output.device)
    return torch.cat(errors, -1).mean(-1)


def exact_where_needed(
    call: Call, config: HyperConfig, result: AttentionOutput, max_error: float, chosen: Impl
) -> AttentionOutput:
    """`result`, with the heads whose measured error is larger than max_error computed exactly."""
    from .api import estimate_exactly

    with torch.no_grad():
        wrong = ~(error_of_heads(call, result.output) <= max_error)
    if not bool(wrong.any()):
        return result
    entry, head = wrong.nonzero(as_tuple=True)
    groups = call.query.shape[1] // call.key.shape[1]
    single = call._replace(
        query=call.query[entry, head].unsqueeze(1),
        key=call.key[entry, head // groups].unsqueeze(1),
        value=call.value[entry, head // groups].unsqueeze(1),
        key_lengths=None if call.key_lengths is None else call.key_lengths[entry],
    )
    exact = estimate_exactly(single, config, chosen)
    output = result.output.index_put((entry, head), exact.output.squeeze(1))
    lse = result.lse.index_put((entry, head), exact.lse.squeeze(1))
    return AttentionOutput(output, lse)
