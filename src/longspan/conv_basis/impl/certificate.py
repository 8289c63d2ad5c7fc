"""Compare exact and modelled weights on sampled rows."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from ..._random import uniform
from ..._triton.launch import triton_refusal
from ...errors import LongspanWarning, UnsupportedError

__all__ = ["act_on_violations", "sample_distances", "sample_rows", "spread_bound"]

_WORK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
_QUANTILE = 0.95


def sample_rows(lengths: Tensor, count: int, seed: int) -> Tensor:
    """(B, count) int64, sorted: half of them uniform, half in the later half of each sequence."""
    rows = (_draws(int(seed), count, lengths.device) * lengths[:, None]).long()
    return torch.minimum(rows, (lengths[:, None] - 1).clamp(min=0)).sort(-1).values


@functools.lru_cache(maxsize=8)
def _draws(seed: int, count: int, device: torch.device) -> Tensor:
    """(count,) in [0, 1): a few dozen launches, so the last ones are kept."""
    draws = uniform(seed, "conv_basis/rows", (count,), device=device, dtype=torch.float64)
    late = torch.arange(count, device=device) % 2 == 1
    return torch.where(late, 0.5 + 0.5 * draws, draws)


def sample_distances(
    query: Tensor, key: Tensor, lengths: Tensor, log_kernel: Tensor, starts: Tensor,
    key_offset: Tensor | None, row_offset: Tensor | None, lse: Tensor, scale: float, near: int,
    num_sinks: int, count: int, seed: int, with_residual: bool = True, impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows (B, r); total variation (B, H, r); largest score error over them (B, H), in nats.

    The model weight of a key is exp(score - lse): the exact score where lag < near or key <
    num_sinks, the segment's column (plus offsets) elsewhere.
    """
    batch, heads, n, _ = query.shape
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    rows = sample_rows(lengths, count, seed)
    distances = lse.new_zeros((batch, heads, count))
    residual = lse.new_zeros((batch, heads))
    if batch * heads * n == 0:
        return rows, distances, residual
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    if impl != "eager" and is_half and count > 0 and triton_refusal(query) is None:
        from .triton.distances import row_distances

        found = row_distances(query, key, rows, lengths, log_kernel, starts, key_offset,
                              row_offset, lse, scale, near, num_sinks)  # fmt: skip
        return rows, *found
    group = heads // key.shape[1]
    step = max(1, _WORK_ELEMENTS.get(query.device.type, 2**22) // max(count * n, 1))
    cuts = _column_cuts(rows, n)
    for b in range(batch):
        for some, width in cuts:
            keys = torch.arange(width, device=query.device)
            valid = keys < lengths[b]
            lag = rows[b, some][:, None] - keys  # (r, width)
            unseen = (lag < 0) | ~valid
            is_exact = (lag < near) | (keys < num_sinks)
            for first in range(0, heads, step):
                part = slice(first, min(first + step, heads))
                own = torch.arange(part.start, part.stop, device=query.device) // group
                k = key[b, own, :width]
                k = torch.where(valid[:, None], k, 0.0).to(wide)  # padding may hold NaN
                exact = scale * query[b, part, rows[b, some]].to(wide) @ k.mT  # (h, r, width)
                begin = starts[b, part].clone()
                begin[:, 0] = 0
                where = keys.expand(begin.shape[0], -1).contiguous()
                segment = (torch.searchsorted(begin, where, right=True) - 1).clamp(min=0)
                place = (segment * n).unsqueeze(1) + lag.clamp(min=0)
                flat = log_kernel[b, part].flatten(1)
                model = torch.gather(flat, 1, place.flatten(1)).view(place.shape)
                if key_offset is not None:
                    model = model + key_offset[b, part, :width].unsqueeze(1)
                if row_offset is not None:
                    model = model + row_offset[b, part][:, rows[b, some]].unsqueeze(-1)
                if near or num_sinks:
                    model = torch.where(is_exact, exact, model)
                if with_residual:
                    gap = torch.where(unseen, 0.0, (exact - model).abs()).amax((-1, -2))
                    residual[b, part] = torch.maximum(residual[b, part], gap)
                own_lse = lse[b, part][:, rows[b, some]].unsqueeze(-1)
                own_lse = torch.where(own_lse.isinf(), 0.0, own_lse)
                modelled = (model - own_lse).masked_fill_(unseen, float("-inf")).exp_()
                weights = torch.softmax(exact.masked_fill_(unseen, float("-inf")), -1)
                difference = modelled.sub_(weights).abs_().sum(-1)
                sees = ~unseen.all(-1)
                distances[b, part, some] = 0.5 * torch.where(sees, difference, 0.0)
    return rows, distances, residual


def _column_cuts(rows: Tensor, n: int) -> list[tuple[slice, int]]:
    """Groups of the sorted rows, and how many columns they can see; on CUDA, where looking at the
    rows would synchronise, one group."""
    count = rows.shape[1]
    if rows.device.type != "cpu" or count < 8 or n < 1024:
        return [(slice(0, count), n)]
    step = -(-count // 4)
    groups = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    return [(some, min(int(rows[:, some].max()) + 1, n)) for some in groups]


def act_on_violations(distances: Tensor, max_tv: float, on_violation: str) -> Tensor:
    """(B, H) bool; warns or raises if asked to."""
    if distances.shape[-1] == 0 or distances.numel() == 0:
        return torch.zeros(distances.shape[:2], dtype=torch.bool, device=distances.device)
    worst = torch.quantile(distances, _QUANTILE, dim=-1)
    violated = ~(worst <= max_tv)
    if on_violation in ("warn", "raise") and bool(violated.any()):
        text = (
            f"conv_basis_attention: in {int(violated.sum())} of {violated.numel()} heads the 95 % "
            f"quantile of the total variation distance is above max_tv = {max_tv} (worst: "
            f"{float(worst.max()):.3g}): their scores are not convolution-like. Use "
            "on_violation='exact' to compute such heads exactly, or a near_window and num_sinks."
        )
        if on_violation == "raise":
            raise UnsupportedError(text)
        warnings.warn(text, LongspanWarning, stacklevel=2)
    return violated if on_violation == "exact" else torch.zeros_like(violated)


def spread_bound(distances: Tensor, confidence: float) -> Tensor:
    """Empirical Bernstein bound (Maurer and Pontil 2009) on the mean of values in [0, 1].

    Holds with probability `confidence` for independent rows of one distribution.
    """
    count = distances.shape[-1]
    if count < 2:
        return torch.ones_like(distances[..., 0]) if count else distances.new_ones(
            distances.shape[:-1]
        )  # fmt: skip
    log_term = torch.log(distances.new_tensor(2.0 / (1.0 - confidence)))
    spread = distances.var(-1)
    bound = (2.0 * spread * log_term / count).sqrt() + 7.0 * log_term / (3.0 * (count - 1))
    return (distances.mean(-1) + bound).clamp(max=1.0)
