"""Inputs whose scores are k-conv by construction."""

from __future__ import annotations

import torch

from longspan.conv_basis.impl.means import rotate


def rotated(vector, base=100.0):
    """(..., N, D) turned by position: scores of constant content depend on the lag only."""
    n, dim = vector.shape[-2:]
    speed = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(n, dtype=torch.float64)[:, None] * speed
    return rotate(vector.double(), angle)


def planted(n, starts, heads=1, dim=16, size=2.0, batch=1, kv_heads=None, seed=0, dtype=None):
    """query, key, value: content constant in each segment of keys, the rest is rotation."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads = kv_heads or heads

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query = normal(batch, heads, 1, dim).expand(-1, -1, n, -1) * size
    segment = (torch.arange(n)[:, None] >= torch.tensor(starts)).sum(-1) - 1
    key = normal(batch, kv_heads, len(starts), dim)[:, :, segment]
    value = normal(batch, kv_heads, n, 8)
    out = rotated(query), rotated(key), value
    return out if dtype is None else tuple(t.to(dtype) for t in out)


def as_scores(scores):
    """query, key (R, 1, N, N) whose product with scale 1 is `scores` (R, N, N)."""
    n = scores.shape[-1]
    return scores.unsqueeze(1), torch.eye(n, dtype=scores.dtype).expand(len(scores), 1, n, n)


def dense_toeplitz(log_kernel, value, groups, key_offset, n_q, is_causal, query_offset):
    """Output and lse of Toeplitz weights by their definition, (B, H, ...) in float64."""
    heads, length = log_kernel.shape[1], log_kernel.shape[-1]
    n_k = value.shape[2]
    keys = torch.arange(n_k, device=value.device)
    lag = torch.arange(n_q, device=value.device)[:, None] + query_offset - keys
    index = lag if is_causal else lag + (length - 1) // 2
    exists = (index >= 0) & (index < length)
    begin = groups.clone()
    begin[..., 0] = 0
    segment = (begin.unsqueeze(-1) <= keys).sum(-2) - 1  # (B, H, N_k)
    scores = torch.full((*log_kernel.shape[:2], n_q, n_k), float("-inf"), dtype=torch.float64,
                        device=value.device)  # fmt: skip
    for g in range(groups.shape[-1]):
        one = log_kernel.double()[:, :, g][..., index.clamp(0, length - 1)]
        mine = (segment == g).unsqueeze(-2) & exists
        scores = torch.where(mine, one, scores)
    if key_offset is not None:
        scores = scores + key_offset.double().unsqueeze(-2)
    empty = (scores == float("-inf")).all(-1)
    safe = torch.where(empty.unsqueeze(-1), 0.0, scores)
    value = value.double().repeat_interleave(heads // value.shape[1], 1)
    output = torch.where(empty.unsqueeze(-1), 0.0, torch.softmax(safe, -1) @ value)
    return output, torch.where(empty, float("-inf"), torch.logsumexp(safe, -1))
