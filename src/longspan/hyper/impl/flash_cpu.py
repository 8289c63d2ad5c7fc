"""Torch's CPU attention kernel as a building block: a partial result of dense blocks."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attend", "can_attend"]

_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def can_attend(q: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes these: it wants one head dim for query and value."""
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output (E, G, n, D) and natural-log lse (E, G, n) of scaled q (E, G, n, D) over k (E, m, D).

    bias is (E, n, m), -inf where hidden; rows that see nothing give zeros and -inf.
    """
    k, v = (tensor.unsqueeze(1).expand(-1, q.shape[1], -1, -1) for tensor in (k, v))
    mask = None if bias is None else bias.unsqueeze(1)
    output, lse = _KERNEL(q, k, v, 0.0, is_causal, attn_mask=mask, scale=1.0)
    lse = lse.to(q.dtype)
    if bias is not None:
        empty = (bias == float("-inf")).all(-1).unsqueeze(1).expand(lse.shape)
        lse = lse.masked_fill(empty, float("-inf"))
        output = output.masked_fill(empty.unsqueeze(-1), 0.0)
    return output, lse
