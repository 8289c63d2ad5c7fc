"""Recover: where the key segments begin. All heads in lock-step, no host synchronisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import ConvBasisConfig

__all__ = ["exact_keys", "recover_starts", "shifted_columns"]

_PROFILE_LAGS = 32  # lags at which "segment" looks at a column
_ANCHORS_PER_BASE = 8


def exact_keys(config: ConvBasisConfig) -> int:
    """Lags below this belong to the exact part."""
    return max(config.near_window, 1 if config.num_sinks else 0)


def recover_starts(query: Tensor, key: Tensor, lengths: Tensor, scale: float,
                   config: ConvBasisConfig) -> Tensor:  # fmt: skip
    """(B, H, num_bases) int64: first key of each segment, nondecreasing; N where there is none.

    Args:
        query: (B, H, N, D).
        key: (B, H_kv, N, D).
        lengths: (B,) int64, valid keys.
    """
    batch, heads, n, _ = query.shape
    first = torch.full((batch, heads), config.num_sinks, device=query.device)
    limit = lengths[:, None].expand(batch, heads)
    first = torch.where(first < limit, first, n)
    if config.recover == "means":
        return first.unsqueeze(-1)
    if config.recover == "grid":
        return _grid(first, limit, n, config.num_bases)
    if config.recover == "segment":
        return _segment(query, key, first, limit, scale, config)
    return _binary(query, key, first, limit, scale, config)


def shifted_columns(query: Tensor, key: Tensor, starts: Tensor, scale: float) -> Tensor:
    """(B, H, G, N) log-kernels: entry l of segment g is scale * q_{s_g + l} . k_{s_g}.

    -inf past the last row, and for segments that start at N (there is none). Differentiable.
    """
    n, heads = query.shape[2], query.shape[1]
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    anchors = _rows(key, starts.clamp(max=n - 1), heads).to(wide)  # (B, H, G, D)
    exists = (starts < n).unsqueeze(-1)
    anchors = torch.where(exists, anchors, 0.0)  # padding may hold NaN
    columns = (scale * anchors) @ query.to(wide).mT  # (B, H, G, N)
    row = torch.arange(n, device=query.device) + starts.unsqueeze(-1)
    shifted = torch.gather(columns, -1, row.clamp(max=n - 1))
    return torch.where(row < n, shifted, float("-inf"))


def _rows(tensor: Tensor, index: Tensor, heads: int) -> Tensor:
    """Rows `index` (B, H, ...) of (B, H or H_kv, N, D), per query head."""
    batch, own = tensor.shape[:2]
    b = torch.arange(batch, device=tensor.device).view(-1, 1, *(1,) * (index.ndim - 2))
    h = torch.arange(heads, device=tensor.device) // (heads // max(own, 1))
    return tensor[b, h.view(1, -1, *(1,) * (index.ndim - 2)), index]


class _Probe:
    """Reads T scores at the head of columns (B, H), behind the exact lags."""

    def __init__(
        self, query: Tensor, key: Tensor, limit: Tensor, scale: float, config: ConvBasisConfig
    ) -> None:
        batch, heads, n, dim = query.shape
        self.shape, self.n = (batch, heads), n
        self.wide = torch.float64 if query.dtype is torch.float64 else torch.float32
        self.query, self.key = query.reshape(-1, dim), key.reshape(-1, dim)
        self.limit, self.scale = limit.reshape(-1), scale
        self.near, self.length = exact_keys(config), config.probe_length
        self.steps = torch.arange(config.probe_length, device=query.device)
        entry = torch.arange(batch * heads, device=query.device)
        self.query_base = entry * n
        kv_heads = key.shape[1]
        own = entry // heads * kv_heads + entry % heads // (heads // kv_heads)
        self.key_base = own * n

    def __call__(self, column: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B H, T), 0 where there are none, and how many exist (B H)."""
        left = torch.where(column < self.limit, self.n - self.near - column, 0)
        left = left.clamp_(0, self.length)
        column = column.clamp(max=self.n - 1)
        some_key = self.key.index_select(0, self.key_base + column).to(self.wide)
        row = (column.unsqueeze(1) + (self.steps + self.near)).clamp_(max=self.n - 1)
        row += self.query_base.unsqueeze(1)
        some_query = self.query.index_select(0, row.flatten()).to(self.wide)
        some_query = some_query.view(len(column), self.length, -1)
        scores = torch.bmm(some_query, some_key.unsqueeze(2)).squeeze(2) * self.scale
        # where, not a product: a key of the padding may hold NaN
        return torch.where(self.steps < left.unsqueeze(1), scores, 0.0), left


def _binary(query: Tensor, key: Tensor, first: Tensor, limit: Tensor, scale: float,
            config: ConvBasisConfig) -> Tensor:  # fmt: skip
    """The paper's search: smallest j > s with |H[j : j+T, j] - u[: T]|_1 >= delta - 2 T eps.

    The running sum u of the found components is column s itself, so T entries of it suffice.
    Fewer than T entries exist in the last columns; there the threshold shrinks in proportion.
    A predicate that is not monotone (any matrix that is not k-conv) makes this find *some* border.
    """
    n = query.shape[2]
    probe = _Probe(query, key, limit, scale, config)
    each = config.threshold / config.probe_length - 2 * config.noise  # nats an entry
    rounds = max(math.ceil(math.log2(n + 1)), 1)
    last, limit = first.flatten(), limit.flatten()
    starts = [last]
    for _ in range(config.num_bases - 1):
        if query.device.type == "cpu" and bool((last >= limit).all()):  # the rest is empty
            starts += [torch.full_like(last, n)] * (config.num_bases - len(starts))
            break
        known, _ = probe(last)
        low, high = torch.minimum(last + 1, limit), limit
        for _ in range(rounds):
            middle = (low + high) >> 1
            found, count = probe(middle)
            # entries that do not exist in the column are compared with nothing
            change = torch.where(probe.steps < count.unsqueeze(1), (found - known).abs_(), 0.0)
            is_border = (change.sum(1) >= each * count) & (count > 0)
            searching = low < high
            high = torch.where(searching & is_border, middle, high)
            low = torch.where(searching & ~is_border, middle + 1, low)
        last = torch.where(low < limit, low, n)
        starts.append(last)
    return torch.stack(starts, -1).view(*probe.shape, -1)


def _grid(first: Tensor, limit: Tensor, n: int, count: int) -> Tensor:
    steps = torch.arange(count, device=first.device)
    span = (limit - first).clamp(min=0).unsqueeze(-1)
    size = (span + count - 1) // count
    starts = first.unsqueeze(-1) + steps * size.clamp(min=1)
    return torch.where(starts < limit.unsqueeze(-1), starts, n)


def _segment(query: Tensor, key: Tensor, first: Tensor, limit: Tensor, scale: float,
             config: ConvBasisConfig) -> Tensor:  # fmt: skip
    """Least-squares segmentation of columns sampled at anchors and log-spaced lags (exact DP)."""
    batch, heads, n, _ = query.shape
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    count = min(_ANCHORS_PER_BASE * config.num_bases, n)
    anchors = _grid(first, limit, n, count)  # (B, H, A)
    base = exact_keys(config)
    most = max(n - 1 - base, 1)
    lags = torch.logspace(0, math.log10(most), _PROFILE_LAGS, device=query.device).long() + base - 1
    row = anchors.unsqueeze(-1) + lags  # (B, H, A, lags)
    exists = ((row < n) & (anchors < n).unsqueeze(-1)).to(wide)
    keys = _rows(key, anchors.clamp(max=n - 1), heads).to(wide)  # (B, H, A, D)
    keys = torch.where((anchors < n).unsqueeze(-1), keys, 0.0)
    queries = _rows(query, row.clamp(max=n - 1), heads).to(wide)  # (B, H, A, lags, D)
    profile = scale * (queries @ keys.unsqueeze(-1)).squeeze(-1) * exists
    # Sums of squared distances to the segment's mean column, from prefix sums, for all i <= j.
    sums, squares, counts = (
        torch.nn.functional.pad(t.double().cumsum(2), (0, 0, 1, 0))
        for t in (profile, profile.square(), exists)
    )

    def between(t: Tensor) -> Tensor:
        return t[:, :, None, 1:] - t[:, :, :-1, None]  # (B, H, start, last, lags)

    cost = between(squares) - between(sums).square() / between(counts).clamp(min=1)
    cost = cost.clamp(min=0).sum(-1)  # (B, H, A, A)
    order = torch.arange(count, device=query.device)
    cost = torch.where(order[:, None] <= order, cost, float("inf"))
    best = cost[:, :, 0]  # (B, H, A): first j + 1 anchors in one segment
    choices = []
    for _ in range(min(config.num_bases, count) - 1):
        before = torch.nn.functional.pad(best[..., :-1], (1, 0), value=float("inf"))
        total, choice = (before.unsqueeze(-1) + cost).min(2)
        # a further border that gains nothing is not taken: choice 0 keeps the old segmentation
        gains = total < best - 1e-12 * best.abs() - 1e-300
        choices.append(torch.where(gains, choice, 0))
        best = torch.where(gains, total, best)
    at = torch.full((batch, heads, 1), count - 1, device=query.device)
    picked = []
    for choice in reversed(choices):
        start = torch.gather(choice, 2, at)
        picked.append(start)
        at = torch.where(start > 0, start - 1, at)
    spare = [torch.zeros_like(at)] * (config.num_bases - 1 - len(picked))
    where = torch.cat((*picked, *spare, torch.zeros_like(at)), -1)
    starts = torch.gather(anchors, 2, where).sort(-1).values
    again = torch.cat((torch.zeros_like(at, dtype=torch.bool), starts[..., 1:] == starts[..., :-1]),
                      -1)  # fmt: skip
    return torch.where(again, n, starts).sort(-1).values
