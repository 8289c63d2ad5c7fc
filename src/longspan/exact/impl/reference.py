"""Dense softmax attention: the definition, in float64 for float64 inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._dense import causal_visible, dense_attention
from ..._validation import Call
from ...types import AttentionOutput


def exact_reference(call: Call, attn_mask: Tensor | None = None) -> AttentionOutput:
    """output_i = sum_j softmax_j(scale q_i k_j + mask_ij) v_j over the visible keys j."""
    visible = causal_visible(call)
    if attn_mask is None:
        return dense_attention(call, visible)
    if attn_mask.dtype is torch.bool:
        return dense_attention(call, visible & attn_mask)
    return dense_attention(call, visible, bias=attn_mask)
