"""A segment of the gated delta rule as one affine map of the memory.

Token by token S_t = a_t (1 - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, a_t = exp(log_decay). With
c_t = sum_{u<=t} log a_u and the unit lower triangular T = 1 + tril(b_t e^{c_t - c_u} k_t.k_u, -1),
the rank-one corrections solve T U = diag(b) V - diag(b e^{c}) K S_0, so a run of tokens maps
S_0 -> (e^{c_C} - K'^T W) S_0 + K'^T U_0, where K'_t = e^{c_C - c_t} k_t.
Runs of 64 tokens are solved at once and composed to segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .parts import split_axis

__all__ = ["gated_delta_maps"]

_RUN = 64


def gated_delta_maps(
    key: Tensor, value: Tensor, write_gate: Tensor, log_decay: Tensor
) -> tuple[Tensor, Tensor]:
    """A (B, H, S, D, D) and B (B, H, S, D, D_v) of each segment.

    key (B, H, S, N, D), value (B, H, S, N, D_v), write_gate and log_decay (B, H, S, N).
    """
    length = key.shape[3]
    run = min(_RUN, length)
    missing = -length % run
    if missing:  # keys of zero change nothing
        pad = torch.nn.functional.pad
        key, value = pad(key, (0, 0, 0, missing)), pad(value, (0, 0, 0, missing))
        write_gate, log_decay = pad(write_gate, (0, missing)), pad(log_decay, (0, missing))
    runs = key.shape[3] // run
    key, value, write_gate, log_decay = (
        split_axis(t, 3, runs, run) for t in (key, value, write_gate, log_decay)
    )
    maps, added = _run_maps(key, value, write_gate, log_decay)
    while maps.shape[3] > 1:  # (B, H, S, runs, D, D): compose neighbours
        count = maps.shape[3]
        even, odd = slice(0, count - count % 2, 2), slice(1, None, 2)
        pair_added = maps[:, :, :, odd] @ added[:, :, :, even] + added[:, :, :, odd]
        pair_maps = maps[:, :, :, odd] @ maps[:, :, :, even]
        rest = slice(count - count % 2, None)
        maps = torch.cat((pair_maps, maps[:, :, :, rest]), 3)
        added = torch.cat((pair_added, added[:, :, :, rest]), 3)
    return maps.squeeze(3), added.squeeze(3)


def _run_maps(
    key: Tensor, value: Tensor, write_gate: Tensor, log_decay: Tensor
) -> tuple[Tensor, Tensor]:
    decay = log_decay.cumsum(-1)  # (..., C)
    gaps = decay.unsqueeze(-1) - decay.unsqueeze(-2)
    lower = torch.ones(gaps.shape[-2:], dtype=torch.bool, device=gaps.device).tril(-1)
    ratio = torch.where(lower, gaps, 0.0).exp()
    products = key @ key.transpose(-1, -2)
    system = torch.where(lower, write_gate.unsqueeze(-1) * ratio * products, 0.0)
    right = torch.cat(
        (write_gate.unsqueeze(-1) * value, (write_gate * decay.exp()).unsqueeze(-1) * key), -1
    )
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    update, correction = solved.split((value.shape[-1], key.shape[-1]), -1)
    last = decay[..., -1:]
    to_end = ((last - decay).exp().unsqueeze(-1) * key).transpose(-1, -2)  # (..., D, C)
    eye = torch.eye(key.shape[-1], dtype=key.dtype, device=key.device)
    return last.unsqueeze(-1).exp() * eye - to_end @ correction, to_end @ update
