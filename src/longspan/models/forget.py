"""Forgetting attention (FoX, arXiv:2503.02130): softmax with a learned decay of each key."""

from __future__ import annotations

import torch
from torch import Tensor

from ..exact.config import ExactConfig
from ..types import Impl
from .key_bias import PackedBounds, key_bias_attention, key_bias_attention_packed

__all__ = ["decay_totals", "forget_attention", "forget_attention_packed", "log_gates"]


def decay_totals(log_forget: Tensor, before: Tensor | None = None) -> Tensor:
    """F_j = log f_1 + ... + log f_j along the last axis, (B, H_kv, N), in float64.

    Args:
        log_forget: (B, H_kv, n), logs of forget gates, at most 0.
        before: (B, H_kv), total of the tokens before these.
    """
    totals = log_forget.double().cumsum(-1)
    return totals if before is None else totals + before.unsqueeze(-1)


def forget_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    totals: Tensor,
    *,
    query_offset: int = 0,
    config: ExactConfig = ExactConfig(),
    impl: Impl | str = "auto",
) -> Tensor:
    """Causal softmax(scale * q_i . k_j + F_i - F_j) v, where F_i - F_j sums log f over j+1 .. i.

    F_i is the same for all keys of a row, so softmax drops it; -F_j is a bias of the key.

    Args:
        query: (B, H, N_q, D).
        key, value: (B, H_kv, N_k, D).
        totals: (B, H_kv, N_k), of `decay_totals`; differentiable.
        query_offset: index, in keys, of the first query.
        config, impl: as in `exact_attention`.

    Returns:
        Like `query`, in its dtype.

    Differs from the paper:
        Gates belong to key heads, so that grouped heads share them; without grouping they are the
        paper's. The Pro block of the paper (norms, output gates, shifted keys) is not part of it.

    Example:
        >>> q = torch.randn(1, 2, 16, 8)
        >>> totals = decay_totals(torch.nn.functional.logsigmoid(torch.randn(1, 2, 16)))
        >>> forget_attention(q, q, q, totals).shape
        torch.Size([1, 2, 16, 8])
    """
    return key_bias_attention(
        query, key, value, -totals, query_offset=query_offset, config=config, impl=impl
    )


def forget_attention_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_forget: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    config: ExactConfig = ExactConfig(),
    impl: Impl | str = "auto",
) -> Tensor:
    """The same for packed sequences: (total, H, D), and log_forget (total, H_kv)."""
    totals = decay_totals(log_forget.mT).mT
    bounds = PackedBounds(cu_seqlens, max_seqlen)
    return key_bias_attention_packed(query, key, value, -totals, bounds, config=config, impl=impl)


def log_gates(logits: Tensor) -> Tensor:
    """Logs of sigmoid gates, (..., N, H) to (..., H, N), in float32 or float64."""
    wide = logits if logits.dtype is torch.float64 else logits.float()
    return torch.nn.functional.logsigmoid(wide).mT
