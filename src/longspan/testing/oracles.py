"""float64 oracles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._dense import causal_visible, dense_attention
from .._validation import validate
from ..types import AttentionOutput

__all__ = ["in_float64", "softmax_oracle", "stick_breaking_oracle"]


def softmax_oracle(
    query: Tensor, key: Tensor, value: Tensor, *, visible: Tensor | None = None, **common: Any
) -> AttentionOutput:
    """Dense softmax attention in float64.

    Args:
        query, key, value: any float dtype; computed after a cast to float64.
        visible: boolean, broadcasts to (B, H, N_q, N_k), further restricts what a row sees.
        **common: is_causal, scale, query_offset, key_lengths as in the public functions.
    """
    call = validate(
        "softmax_oracle",
        query.double(),
        key.double(),
        value.double(),
        enable_gqa=True,
        **common,
    )
    seen = causal_visible(call)
    return dense_attention(call, seen if visible is None else seen & visible)


def in_float64(function: Callable[..., Any], *tensors: Tensor, **kwargs: Any) -> Any:
    """`function` on float64 copies of `tensors`, outside of any autocast region."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        return function(*(tensor.double() for tensor in tensors), **kwargs)


def stick_breaking_oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    query_offset: int = 0,
    key_lengths: Tensor | None = None,
    logit_bias: Tensor | None = None,
    attend_current: bool = False,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Stick-breaking as the loop that defines it, in float64, differentiable: key by key.

    Returns (output (B, H, N_q, D_v), log_rest (B, H, N_q)). O(B N_q N_k) Python steps: tiny inputs.
    """
    query, key, value = query.double(), key.double(), value.double()
    batch, heads, n_q, head_dim = query.shape
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = head_dim**-0.5 if scale is None else scale
    bias = query.new_zeros(heads) if logit_bias is None else logit_bias.double()
    outputs, log_rests = [], []
    for b in range(batch):
        length = key.shape[2] if key_lengths is None else int(key_lengths[b])
        for row in range(n_q):
            output = query.new_zeros(heads, value.shape[3])
            log_rest = query.new_zeros(heads)
            nearest = row + query_offset - (0 if attend_current else 1)
            farthest = 0 if window is None else max(nearest - window + 1, 0)
            for column in range(nearest, farthest - 1, -1):
                if column >= length:
                    continue
                z = scale * (query[b, :, row] * key[b, :, column]).sum(-1) + bias
                weight = torch.sigmoid(z) * torch.exp(log_rest)
                output = output + weight.unsqueeze(-1) * value[b, :, column]
                log_rest = log_rest + torch.nn.functional.logsigmoid(-z)
            outputs.append(output)
            log_rests.append(log_rest)
    shape = (batch, n_q, heads)
    output = torch.stack(outputs).reshape(*shape, value.shape[3])
    return output.transpose(1, 2), torch.stack(log_rests).reshape(shape).transpose(1, 2)
