"""Dense softmax attention over a boolean visibility mask: the shared core of the references."""

from __future__ import annotations

import torch
from torch import Tensor

from ._validation import Call
from .types import AttentionOutput


def causal_visible(call: Call) -> Tensor:
    """(B or 1, 1, N_q, N_k) bool: what causality and key_lengths let each query see."""
    n_q, n_k = call.query.shape[2], call.key.shape[2]
    device = call.query.device
    rows = torch.arange(n_q, device=device)[:, None] + call.query_offset
    cols = torch.arange(n_k, device=device)[None, :]
    visible = cols <= rows if call.is_causal else torch.ones_like(cols <= rows)
    visible = visible[None, None]
    if call.key_lengths is not None:
        visible = visible & (cols < call.key_lengths[:, None, None])[:, None]
    return visible


def dense_attention(call: Call, visible: Tensor, bias: Tensor | None = None) -> AttentionOutput:
    """softmax(scale q k^T + bias) v over the keys marked in `visible`; O(N_q N_k) memory.

    Computed in float64 for float64 inputs, else in float32. A key or value that no row sees
    (padding) cannot reach the result, also when it holds NaN or infinity.
    """
    wide = torch.float64 if call.query.dtype is torch.float64 else torch.float32
    groups = call.query.shape[1] // max(call.key.shape[1], 1)
    q = call.query.to(wide)
    k = call.key.to(wide).repeat_interleave(groups, dim=1)
    v = call.value.to(wide).repeat_interleave(groups, dim=1)
    seen = visible.expand(q.shape[0], q.shape[1], -1, -1).any(-2)  # (B, H, N_k)
    k, v = (torch.where(seen.unsqueeze(-1), t, 0.0) for t in (k, v))
    scores = call.scale * (q @ k.transpose(-1, -2))
    if bias is not None:
        scores = scores + bias.to(wide)
    scores = torch.where(visible, scores, float("-inf"))
    empty = ~visible.any(-1, keepdim=True)
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.sum(-1, True)
    top = torch.where(empty | (top == float("-inf")), 0.0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    output = (weights / safe) @ v
    lse = torch.where(empty, float("-inf"), top + torch.log(safe)).squeeze(-1)
    return AttentionOutput(output.to(call.query.dtype), lse)
