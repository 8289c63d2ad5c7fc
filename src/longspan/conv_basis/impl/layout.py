"""How rows, keys and lags are cut into blocks, and keys into runs of one block and one group."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Layout", "Runs", "make_layout", "make_runs"]


class Layout(NamedTuple):
    """Blocks of `block` rows and keys; piece d holds the lags around offset + (first + d) block."""

    block: int
    n_q: int
    n_k: int
    row_blocks: int
    key_blocks: int
    first_piece: int  # smallest row block - key block whose lags can count
    pieces: int
    is_causal: bool
    query_offset: int
    zero: int  # index of lag 0 in a log-kernel


class Runs(NamedTuple):
    """The keys as runs that lie in one block and one group; several to a block at group borders."""

    block: Tensor  # (R, U) int64: the block of the run
    group: Tensor  # (R, U) int64
    start: Tensor  # (R, U) int64, first key
    end: Tensor  # (R, U) int64, past the last key; start == end: empty


def make_layout(
    block: int, n_q: int, n_k: int, is_causal: bool, query_offset: int, kernel_length: int
) -> Layout:
    """The layout for log-kernels of `kernel_length` entries (lag 0 first when causal)."""
    row_blocks, key_blocks = -(-n_q // block), -(-n_k // block)
    first = 1 - key_blocks
    if is_causal:  # the largest lag of a piece is offset + d block + block - 1
        first = max(first, -((query_offset + block - 1) // block))
    pieces = max(row_blocks - first, 1)
    zero = 0 if is_causal else (kernel_length - 1) // 2
    return Layout(
        block, n_q, n_k, row_blocks, key_blocks, first, pieces, is_causal, query_offset, zero
    )


def make_runs(layout: Layout, starts: Tensor) -> Runs:
    """Cut the keys at block borders and group starts (R, G), nondecreasing, the first 0."""
    rows, groups = starts.shape
    total = layout.key_blocks * layout.block
    borders = torch.arange(0, total, layout.block, device=starts.device).expand(rows, -1)
    if groups > 1:
        inner = starts[:, 1:].clamp(0, total)
        borders = torch.cat((borders, inner), 1).sort(1).values
    start = borders.contiguous()
    end = torch.cat((start[:, 1:], start.new_full((rows, 1), total)), 1)
    group = torch.searchsorted(starts.contiguous(), start, right=True) - 1
    block = (start // layout.block).clamp(max=layout.key_blocks - 1)
    return Runs(block, group.clamp(min=0), start, end)
