"""Dense window attention: the definition, in float64 for float64 inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._dense import causal_visible, dense_attention
from ..._validation import Call
from ...types import AttentionOutput
from ..config import WindowConfig

__all__ = ["window_reference", "window_visible"]


def window_visible(call: Call, config: WindowConfig) -> Tensor:
    """(B or 1, 1, N_q, N_k) bool: |p - j| < window or j < num_sinks, and causality, and lengths."""
    n_q, n_k = call.query.shape[2], call.key.shape[2]
    p = torch.arange(n_q, device=call.query.device)[:, None] + call.query_offset
    j = torch.arange(n_k, device=call.query.device)[None, :]
    near = (p - j).abs() < config.window
    return causal_visible(call) & (near | (j < config.num_sinks))


def window_reference(call: Call, config: WindowConfig) -> AttentionOutput:
    """Softmax attention over the visible keys; O(N_q N_k) time and memory."""
    return dense_attention(call, window_visible(call, config))
