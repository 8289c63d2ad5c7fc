"""float64 oracles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._dense import causal_visible, dense_attention
from .._validation import validate
from ..types import AttentionOutput

__all__ = ["in_float64", "softmax_oracle"]


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
