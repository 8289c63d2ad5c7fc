"""Conv-Basis attention by dense matrices: the definition, and the paper's form with differences."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._validation import Call
from ...types import AttentionOutput
from ..basis import ConvBasis
from ..config import ConvBasisConfig

__all__ = ["conv_basis_reference", "difference_form", "modelled_scores", "recover_one_head"]


def modelled_scores(basis: ConvBasis) -> Tensor:
    """(B, H, N, N): row_offset_i + key_offset_j + c_g(j)(i - j); -inf above the diagonal."""
    kernels = basis.log_kernels
    n = kernels.shape[-1]
    index = torch.arange(n, device=kernels.device)
    begin = basis.starts.clone()
    begin[..., 0] = 0
    # segment of key j: the last one that starts at or before j
    segment = (begin.unsqueeze(-1) <= index).sum(-2) - 1  # (B, H, N)
    lag = index[:, None] - index
    columns = torch.gather(kernels, 2, segment.unsqueeze(-1).expand(-1, -1, -1, n))  # (B,H,j,lag)
    scores = torch.gather(columns, 3, lag.clamp(min=0).T.expand(*columns.shape[:2], -1, -1)).mT
    if basis.key_offset is not None:
        scores = scores + basis.key_offset.unsqueeze(-2)
    if basis.row_offset is not None:
        scores = scores + basis.row_offset.unsqueeze(-1)
    return torch.where(lag >= 0, scores, float("-inf"))


def conv_basis_reference(call: Call, basis: ConvBasis) -> AttentionOutput:
    """Softmax over the modelled scores, exact scores near the diagonal and at the sinks."""
    heads, n = call.query.shape[1:3]
    wide = torch.float64 if call.query.dtype is torch.float64 else torch.float32
    index = torch.arange(n, device=call.query.device)
    lag = index[:, None] - index
    valid = (index < basis.lengths[:, None])[:, None]  # (B, 1, N)
    group = heads // call.key.shape[1]
    key, value = (
        torch.where(valid.unsqueeze(-1), t, 0.0).to(wide).repeat_interleave(group, 1)
        for t in (call.key, call.value)
    )
    exact = call.scale * call.query.to(wide) @ key.mT
    is_exact = (lag < basis.near) | (index < basis.num_sinks)
    scores = torch.where(is_exact, exact, modelled_scores(basis))
    scores = torch.where((lag >= 0) & valid.unsqueeze(2), scores, float("-inf"))
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    weights = torch.softmax(torch.where(empty, 0.0, scores), -1)
    output = torch.where(empty, 0.0, weights @ value)
    lse = torch.logsumexp(torch.where(empty, 0.0, scores), -1)
    lse = torch.where(empty.squeeze(-1), float("-inf"), lse)
    return AttentionOutput(output.to(call.query.dtype), lse)


def difference_form(basis: ConvBasis, value: Tensor) -> AttentionOutput:
    """The paper's evaluation: exponentiated differences as signed sub-convolutions [1, Lemma 3.7].

    e_1 = exp(b_1), e_r = exp(b_1 + .. + b_r) - exp(b_1 + .. + b_{r-1}); numerator and denominator
    are sum_r conv(e_r, n - s_r) applied to V and to 1. Overflows and cancels in finite precision:
    for comparison only. Without offsets and exact parts.
    """
    kernels = basis.log_kernels
    n = kernels.shape[-1]
    index = torch.arange(n, device=kernels.device)
    lag = index[:, None] - index
    total = torch.zeros(*kernels.shape[:2], n, n, dtype=kernels.dtype, device=kernels.device)
    before = torch.zeros_like(kernels[:, :, 0])
    for r in range(kernels.shape[2]):
        start = basis.starts[:, :, r]
        now = torch.exp(kernels[:, :, r])
        spread = lag.clamp(min=0).flatten().expand(*start.shape, -1)
        change = torch.gather(now - before, -1, spread).view(*start.shape, n, n)
        # conv(e, m): the bottom-right m x m block, m = n - s
        inside = (lag >= 0) & (index >= start.unsqueeze(-1)).unsqueeze(-2)
        exists = (start < n)[..., None, None]
        total = total + torch.where(inside & exists, change, 0.0)
        before = torch.where((start < n).unsqueeze(-1), now, before)
    group = kernels.shape[1] // value.shape[1]
    wide = value.to(kernels.dtype).repeat_interleave(group, 1)
    denominator = total.sum(-1, keepdim=True)
    return AttentionOutput(
        ((total @ wide) / denominator).to(value.dtype), torch.log(denominator).squeeze(-1)
    )


def recover_one_head(scores: Tensor, config: ConvBasisConfig, length: int) -> list[int]:
    """The paper's Recover on one dense lower-triangular matrix (N, N): the starts it finds."""
    n, t = scores.shape[0], config.probe_length
    starts = [config.num_sinks] if config.num_sinks < length else []

    def is_border(column: int, known: int) -> bool:
        steps = min(t, n - column)
        head = torch.arange(steps)
        change = (scores[column + head, column] - scores[known + head, known]).abs().sum()
        enough = config.threshold - 2 * t * config.noise
        return bool(change >= enough * steps / t)

    while starts and len(starts) < config.num_bases:
        low, high = starts[-1] + 1, length
        while low < high:
            middle = (low + high) // 2
            if is_border(middle, starts[-1]):
                high = middle
            else:
                low = middle + 1
        if low >= length:
            break
        starts.append(low)
    return starts
