"""What Recover found: an object to look at, and to apply to values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._merge import merge
from ..types import AttentionOutput
from ..window.api import window_attention_with_lse
from ..window.config import WindowConfig
from .impl.certificate import spread_bound

__all__ = ["ConvBasis", "ConvBasisStats"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ConvBasis:
    """k Toeplitz pieces in place of a causal score matrix.

    Key j of segment g (starts[g] <= j < starts[g + 1]) has, for the row i >= j, the score
    row_offset_i + key_offset_j + log_kernels[g, i - j].

    starts: (B, H, k) int64, first key of each segment; N where there is none.
    log_kernels: (B, H, k, N), nats, by lag; -inf where no row is left. Differentiable.
    key_offset, row_offset: (B, H, N) or None.
    lengths: (B,) int64, valid keys; is_padded: some may be below N.
    near: lags below it are exact; num_sinks: so are the first keys. If either is above 0, `query`
        and `key` are kept for the exact part.
    scale: multiplies the scores.
    """

    starts: Tensor
    log_kernels: Tensor
    key_offset: Tensor | None
    row_offset: Tensor | None
    lengths: Tensor
    is_padded: bool
    near: int
    num_sinks: int
    scale: float
    query: Tensor | None = None
    key: Tensor | None = None

    @property
    def num_bases(self) -> Tensor:
        """(B, H) int64: segments that were found."""
        return (self.starts < self.log_kernels.shape[-1]).sum(-1)

    def components(self) -> Tensor:
        """(B, H, k, N): the paper's b_r = c_r - c_{r-1}, zero past n - s_r.

        scores = sum_r conv(b_r, n - s_r), each b_r placed from row and column s_r on.
        """
        finite = torch.where(self.log_kernels == float("-inf"), 0.0, self.log_kernels)
        before = torch.cat((torch.zeros_like(finite[..., :1, :]), finite[..., :-1, :]), -2)
        exists = self.log_kernels > float("-inf")
        return torch.where(exists, finite - before, 0.0)

    def apply(self, value: Tensor, impl: str = "auto") -> AttentionOutput:
        """Output (B, H, N, D_v) and lse (B, H, N) for `value` (B, H_kv, N, D_v).

        impl: "eager" keeps to torch; "auto" uses Triton for half precision values where it runs.
        """
        parts = [self.tail(value, impl)]
        if self.near and self.query is not None and self.key is not None:
            key, exact_value = self.key, value
            if key.shape[1] != value.shape[1]:  # values of another grouping: one key head each
                heads = self.query.shape[1]
                key = key.repeat_interleave(heads // key.shape[1], 1)
                exact_value = value.repeat_interleave(heads // value.shape[1], 1)
            lengths32 = self.lengths.to(torch.int32) if self.is_padded else None
            parts.append(
                window_attention_with_lse(
                    self.query, key, exact_value, is_causal=True, scale=self.scale,
                    enable_gqa=True, key_lengths=lengths32,
                    config=WindowConfig(window=self.near, num_sinks=self.num_sinks),
                )
            )  # fmt: skip
        if len(parts) == 1:
            return parts[0]
        output, lse = merge([AttentionOutput(o.to(lse.dtype), lse) for o, lse in parts])
        return AttentionOutput(output.to(value.dtype), lse)

    def tail(self, value: Tensor, impl: str = "auto") -> AttentionOutput:
        """The Toeplitz part alone: keys from num_sinks on, at lags from `near` on."""
        from .ops import toeplitz_fwd

        n = self.log_kernels.shape[-1]
        device = self.log_kernels.device
        lengths = self.lengths[:, None]
        row = torch.arange(n, device=device)
        if self.near or self.num_sinks or self.is_padded:
            hidden = (row - self.near < self.num_sinks) | (lengths <= self.num_sinks)  # (B, N)
        else:
            hidden = torch.zeros((len(lengths), n), dtype=torch.bool, device=device)
        kernels = self.log_kernels
        if self.near:
            kernels = torch.where(row < self.near, float("-inf"), kernels)
        offset = self.key_offset
        if self.is_padded or self.num_sinks:
            valid = (row >= self.num_sinks) & (row < lengths)
            value = torch.where(valid[:, None, :, None], value, 0.0)  # 0 * NaN is NaN
            base = kernels.new_zeros(()) if offset is None else offset
            offset = torch.where(valid[:, None], base, float("-inf"))
            offset = offset.expand(*kernels.shape[:2], n)
        output, lse, _ = toeplitz_fwd(
            kernels, self.starts, offset, value, hidden, n, True, 0, 0, impl
        )
        if self.row_offset is not None:
            lse = lse + self.row_offset
        return AttentionOutput(output, lse)


@dataclass(frozen=True, kw_only=True, eq=False)
class ConvBasisStats:
    """How far the modelled weights are from the exact ones, on sampled rows.

    rows: (B, r) int64.
    distances: (B, H, r): total variation, half the sum over keys of |exact - modelled| weights.
        The output of the row is off by at most 2 * distance * (radius of the values around any
        centre).
    residual: (B, H): largest error of a score over these rows, nats.
    num_bases: (B, H): segments in use.
    """

    rows: Tensor
    distances: Tensor
    residual: Tensor
    num_bases: Tensor

    @property
    def mean(self) -> Tensor:
        """(B, H)."""
        return self.distances.mean(-1)

    @property
    def p95(self) -> Tensor:
        """(B, H): 95 % quantile over the sampled rows; what `max_tv` is compared with."""
        return torch.quantile(self.distances, 0.95, dim=-1)

    def upper_bound(self, confidence: float = 0.95) -> Tensor:
        """(B, H): above the mean over the distribution the rows were drawn from.

        It says nothing about a single rare row (a retrieval, for example).
        """
        return spread_bound(self.distances, confidence)
