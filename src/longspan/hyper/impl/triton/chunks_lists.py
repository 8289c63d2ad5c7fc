"""Inverted lists: for every cluster the (query, probe) pairs that opened it, in order. Plain torch.

An entry is a number g N_q P + row P + probe, g the query head inside of its group: the place of the
pair in `chosen`. Lists are cut in tiles of as many entries as one program takes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Lists", "make_lists"]


class Lists(NamedTuple):
    """Of H key/value heads with M clusters and E entries each; c = h M + cluster."""

    entries: Tensor  # (H, E) int32: sorted by cluster, then by number; those of no cluster first
    begins: Tensor  # (H * M,) int32: list c is entries[h, begins[c] : ends[c]]
    ends: Tensor  # (H * M,) int32
    tile_list: Tensor  # (tiles,) int32: the list of each tile; H * M beyond the last tile
    tile_ends: Tensor  # (H * M,) int32: tiles up to and with list c


def make_lists(chosen: Tensor, clusters: int, rows: int) -> Lists:
    """Lists of chosen (H, E) int32, values -1 .. clusters - 1, in tiles of `rows` entries."""
    heads, number = chosen.shape
    keys = chosen.to(torch.int16) if clusters < 2**15 else chosen
    ordered, entries = keys.sort(dim=1, stable=True)
    entries = entries.to(torch.int32)
    names = torch.arange(clusters + 1, device=chosen.device, dtype=keys.dtype)
    edges = torch.searchsorted(ordered, names.expand(heads, -1).contiguous(), out_int32=True)
    begins, ends = edges[:, :-1].flatten(), edges[:, 1:].flatten()
    tile_ends = ((ends - begins + (rows - 1)) // rows).cumsum(0).to(torch.int32)
    most = heads * (number // rows + min(clusters, number))  # the true number stays on the device
    tile_list = torch.searchsorted(
        tile_ends, torch.arange(most, device=chosen.device, dtype=torch.int32), right=True,
        out_int32=True,
    )  # fmt: skip
    return Lists(entries, begins, ends, tile_list, tile_ends)
