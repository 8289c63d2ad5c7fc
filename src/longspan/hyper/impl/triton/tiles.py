"""What the kernels of HyperAttention share: loads of runs of rows and of scattered rows, launching."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....errors import UnsupportedError

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

_MOST_PROGRAMS = 2**31 - 1
_ALIGNMENT = 16  # what Triton looks for in strides (elements) and pointers (bytes)


@triton.jit
def load_rows(
    ptr, stride, start, end, offs_n, offs_d,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows start + offs_n, zero from `end` on. Upcast where kernels are interpreted."""
    # 64 bits to the tile, 32 bits inside of it: stride * 256 < 2**31 is checked at the launch.
    ptrs = ptr + tl.cast(start, tl.int64) * stride + (offs_n[:, None] * stride + offs_d[None, :])
    if MASKED:
        mask = (start + offs_n < end)[:, None]
        if DIM != BLOCK_D:
            mask = mask & (offs_d < DIM)[None, :]
        tile = tl.load(ptrs, mask=mask, other=0.0)
    elif DIM == BLOCK_D:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=(offs_d < DIM)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def gather_rows(
    ptr, stride, rows, is_row, offs_d,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The rows `rows` (int32); zero where not `is_row`."""
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    mask = is_row[:, None]
    if DIM != BLOCK_D:
        mask = mask & (offs_d < DIM)[None, :]
    tile = tl.load(ptrs, mask=mask, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def scatter_rows(ptr, stride, rows, is_row, offs_d, tile, DIM: tl.constexpr):
    """Write the rows `rows` (int32) where `is_row`."""
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    mask = is_row[:, None] & (offs_d < DIM)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def column_tile(
    order_ptr, samples_ptr, bias_ptr, owner_ptr, t, block_tiles, k_begin, k_end, sample_start,
    block, offs_n, SAMPLES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile number t of the columns that a block of queries meets.

    First the keys of its block (sorted keys k_begin .. k_end), then the sampled keys of its node
    (sample_start .. sample_start + SAMPLES). Returns the keys' rows, which of them exist, and what
    is added to their logits in base 2: 0 for a key of the block, the log of the weight for a
    sample, -inf for a sample that the block already holds.
    """
    in_block = (t < block_tiles) & (k_begin + t * BLOCK_N + offs_n < k_end)
    rows = tl.load(order_ptr + k_begin + t * BLOCK_N + offs_n, mask=in_block, other=0)
    if SAMPLES == 0:
        return rows, in_block, tl.where(in_block, 0.0, float("-inf"))
    i = (t - block_tiles) * BLOCK_N + offs_n
    is_sample = (i >= 0) & (i < SAMPLES)
    rows += tl.load(samples_ptr + sample_start + i, mask=is_sample, other=0)
    bias = tl.load(bias_ptr + sample_start + i, mask=is_sample, other=0.0) * LOG2E
    owner = tl.load(owner_ptr + sample_start + i, mask=is_sample, other=-1)
    exists = in_block | is_sample
    return rows, exists, tl.where(exists & (owner != block), bias, float("-inf"))


def kernel_input(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy that the kernels can read in 16-byte pieces.

    The last axis becomes a multiple of 16, with zeros; all strides become multiples of 16. Without
    that Triton loads element by element and cannot pipeline.
    """
    if short := -tensor.shape[-1] % _ALIGNMENT:
        return torch.nn.functional.pad(tensor, (0, short))
    strides = tensor.stride()
    fits = strides[3] == 1 and strides[2] * 256 < 2**31
    if fits and not any(s % _ALIGNMENT for s in strides[:3]) and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def grid_of(*counts: int) -> tuple[int]:
    """One axis, because only the first may pass 65535."""
    programs = 1
    for count in counts:
        programs *= count
    if programs > _MOST_PROGRAMS:
        raise UnsupportedError(
            f'hyper_attention(impl="triton"): the call needs {programs} programs; at most '
            f"{_MOST_PROGRAMS} can be launched. Split the batch, or use impl='eager'."
        )
    return (programs,)


def block_dim(dim: int) -> int:
    """Columns of a tile for a head dim: a power of two, at least 16 for the matrix units."""
    return max(16, int(triton.next_power_of_2(dim)))


def upcasts(dtype: torch.dtype, interpreted: bool) -> bool:
    """The interpreter computes half precision wrongly (bfloat16) or slowly: cast after the load."""
    return interpreted and dtype is not torch.float32
