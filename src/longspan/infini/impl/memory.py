"""The memory of plain torch: what each segment adds, and the memory before each segment.

A segment maps the memory it finds: M -> A M + B. The linear rule has A = 1, so states are prefix
sums. For the delta rules z is found first (it does not depend on M), which makes A_s = 1 - P_s,
P_s = K^^T diag(1 / K^ z_{s-1}) K^, a matrix; affine maps compose associatively, so states come from
a tree of about log2(S) batched products. No loop over segments, except over z of the corrected
rule, whose growth depends on z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import InfiniCall, wide_dtype
from ..features import features
from .gated_delta import gated_delta_maps
from .parts import split_axis

__all__ = ["States", "divide", "memory_states"]

States = tuple[Tensor, Tensor]


def memory_states(call: InfiniCall, count: int) -> States:
    """Memory (B, H_kv, count + 1, F, D_v) and normaliser (B, H_kv, count + 1, F).

    Entry r is the state before segment r (of this call); the last may be short of keys.
    """
    config, wide = call.config, wide_dtype(call.query.dtype)
    length, n_k = config.segment_length, call.key.shape[2]
    memory, normaliser = call.memory.to(wide).unsqueeze(2), call.normaliser.to(wide).unsqueeze(2)
    if count == 0:
        return memory, normaliser
    stop = min(count * length, n_k)
    valid = _valid(call, stop)
    phi = features(call.memory_key[:, :, :stop], config)
    value = call.value[:, :, :stop].to(wide)
    if valid is not None:  # padding may hold NaN
        phi, value = torch.where(valid, phi, 0.0), torch.where(valid, value, 0.0)
    phi, value = _cut(phi, count, length), _cut(value, count, length)
    if config.update == "gated_delta":
        assert call.write_gate is not None
        assert call.log_decay is not None
        write, decay = (t[:, :, :stop, None] for t in (call.write_gate, call.log_decay))
        if valid is not None:
            decay = torch.where(valid, decay, 0.0)
        write, decay = (_cut(t, count, length).squeeze(-1) for t in (write, decay))
        maps = gated_delta_maps(phi, value, write, decay)
        return _apply(*maps, memory), normaliser.expand(-1, -1, count + 1, -1)
    added = phi.transpose(-1, -2) @ value
    if config.update == "linear":
        return (
            torch.cat((memory, added), 2).cumsum(2),
            torch.cat((normaliser, phi.sum(3)), 2).cumsum(2),
        )
    if config.update == "delta":
        normalisers = torch.cat((normaliser, phi.sum(3)), 2).cumsum(2)
    else:
        normalisers = _corrected(phi, normaliser.squeeze(2))
    total = (phi @ normalisers[:, :, :-1].unsqueeze(-1)).squeeze(-1)  # (B, H_kv, S, N)
    share = divide(phi, total.unsqueeze(-1))
    eye = torch.eye(phi.shape[-1], dtype=phi.dtype, device=phi.device)
    return _apply(eye - phi.transpose(-1, -2) @ share, added, memory), normalisers


def divide(numerator: Tensor, total: Tensor) -> Tensor:
    """numerator / total, and 0 where nothing is held (total 0)."""
    held = total > 0
    return torch.where(held, numerator / torch.where(held, total, 1.0), 0.0)


def _valid(call: InfiniCall, stop: int) -> Tensor | None:
    if call.key_lengths is None:
        return None
    column = torch.arange(stop, device=call.query.device)
    return (column < call.key_lengths[:, None])[:, None, :, None]


def _cut(tensor: Tensor, count: int, length: int) -> Tensor:
    """(B, H_kv, n, X) to (B, H_kv, count, N, X), filled up with zeros."""
    missing = count * length - tensor.shape[2]
    if missing:
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, missing))
    return split_axis(tensor, 2, count, length)


def _corrected(phi: Tensor, normaliser: Tensor) -> Tensor:
    """z before each segment where a key adds only what z does not cover yet."""
    size = (phi * phi).sum(-1)  # (B, H_kv, S, N)
    size = torch.where(size > 0, size, 1.0)
    states = [normaliser]
    for s in range(phi.shape[2]):
        known = (phi[:, :, s] @ states[-1].unsqueeze(-1)).squeeze(-1)
        new = (1 - known / size[:, :, s]).clamp(0, 1).detach()
        states.append(states[-1] + (new.unsqueeze(-1) * phi[:, :, s]).sum(2))
    return torch.stack(states, 2)


def _apply(maps: Tensor, added: Tensor, memory: Tensor) -> Tensor:
    """Memory before each segment, (B, H_kv, S + 1, F, D_v), from M -> maps M + added."""
    maps, added = _scan(maps, added)
    return torch.cat((memory, maps @ memory + added), 2)


def _scan(maps: Tensor, added: Tensor) -> States:
    """Inclusive composition along axis 2: (A2, B2) after (A1, B1) is (A2 A1, A2 B1 + B2)."""
    count = maps.shape[2]
    if count == 1:
        return maps, added
    even, odd = slice(0, count - count % 2, 2), slice(1, None, 2)
    pair_maps, pair_added = _scan(
        maps[:, :, odd] @ maps[:, :, even],
        maps[:, :, odd] @ added[:, :, even] + added[:, :, odd],
    )  # inclusive at 1, 3, 5, ...
    later = slice(2, None, 2)
    before = slice(0, (count - 1) // 2)
    even_maps = maps[:, :, later] @ pair_maps[:, :, before]
    even_added = maps[:, :, later] @ pair_added[:, :, before] + added[:, :, later]
    even_maps = torch.cat((maps[:, :, :1], even_maps), 2)
    even_added = torch.cat((added[:, :, :1], even_added), 2)
    return _interleave(even_maps, pair_maps), _interleave(even_added, pair_added)


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    pairs = torch.stack((even[:, :, : odd.shape[2]], odd), 3).flatten(2, 3)
    return torch.cat((pairs, even[:, :, odd.shape[2] :]), 2)
