"""Stick-breaking attention as the paper writes it: dense, differentiable, float64-capable.

arXiv:2410.17980, Eqs. (1) to (3): z_ij = scale q_j.k_i + bias, b_ij = sigmoid(z_ij),
A_ij = b_ij prod_{i < k} (1 - b_kj) over the keys that query j sees, nearest key first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._validation import Call
from ..config import StickBreakingConfig
from .common import Geometry, gate_floor, wide_dtype

__all__ = ["stick_breaking_reference", "stick_breaking_weights"]


def stick_breaking_reference(
    call: Call, config: StickBreakingConfig, logit_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(output (B, H, N_q, D_v), log_rest (B, H, N_q)) before the remainder is given to anything.

    Walks all keys whatever `config.early_stop` says: the full walk meets every bound.
    O(B H N_q N_k) memory.
    """
    weights, log_rest, seen = stick_breaking_weights(call, config, logit_bias)
    groups = call.query.shape[1] // call.key.shape[1]
    value = call.value.to(weights.dtype).repeat_interleave(groups, dim=1)
    # a value that no row sees (padding) must not reach the result, not even as 0 * NaN
    value = torch.where(seen, value, 0.0)
    return (weights @ value).to(call.query.dtype), log_rest


def stick_breaking_weights(
    call: Call, config: StickBreakingConfig, logit_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights A (B, H, N_q, N_k), log_rest (B, H, N_q), and which keys some row sees."""
    wide = wide_dtype(call.query.dtype)
    groups = call.query.shape[1] // call.key.shape[1]
    n_q, n_k = call.query.shape[2], call.key.shape[2]
    geometry = Geometry(n_q, n_k, call.query_offset, config.attend_current, config.window)
    hidden = geometry.hidden((0, n_q), (0, n_k), call.key_lengths, call.query.device)
    if hidden is None:
        hidden = torch.zeros(n_q, n_k, dtype=torch.bool, device=call.query.device)
    hidden = hidden.expand(call.query.shape[0], 1, n_q, n_k)
    seen = ~hidden.all(-2).unsqueeze(-1)  # (B, 1, N_k, 1)

    key = torch.where(seen, call.key.to(wide).repeat_interleave(groups, dim=1), 0.0)
    z = call.scale * (call.query.to(wide) @ key.transpose(-1, -2))
    if logit_bias is not None:
        z = z + logit_bias.to(wide)[:, None, None]
    if config.gate_threshold is not None:
        hidden = hidden | (z < gate_floor(config.gate_threshold))
    # a key that is not seen takes nothing: gate 0, and 1 - gate = 1
    gate = torch.where(hidden, 0.0, torch.sigmoid(z))
    log_keep = torch.where(hidden, 0.0, F.logsigmoid(-z))  # log (1 - b)
    # sum over the keys nearer than i: a shifted suffix sum, as i itself is excluded
    nearer = F.pad(log_keep, (0, 1))[..., 1:].flip(-1).cumsum(-1).flip(-1)
    return gate * torch.exp(nearer), log_keep.sum(-1), seen
