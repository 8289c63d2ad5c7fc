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
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr = True,
):  # fmt: skip
    """The rows `rows` (int32); zero where not `is_row`, unless all of them are rows (not MASKED)."""
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if MASKED:
        mask = is_row[:, None]
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
def scatter_rows(ptr, stride, rows, is_row, offs_d, tile, DIM: tl.constexpr):
    """Write the rows `rows` (int32) where `is_row`."""
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    mask = is_row[:, None] & (offs_d < DIM)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def sample_columns(
    samples_ptr, bias_ptr, owner_ptr, first, start, block, offs_n, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Sampled columns start + offs_n of a node, whose samples begin at `first`.

    Returns the keys' rows, which of them exist, and what is added to their logits in base 2: the log
    of the weight, -inf for a sample that does not exist or that the block already holds.
    """
    i = start + offs_n
    exists = i < SAMPLES
    rows = tl.load(samples_ptr + first + i, mask=exists, other=0)
    bias = tl.load(bias_ptr + first + i, mask=exists, other=0.0) * LOG2E
    owner = tl.load(owner_ptr + first + i, mask=exists, other=block)
    return rows, exists, tl.where(owner != block, bias, float("-inf"))


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


def block_dim(*dims: int) -> int:
    """Columns of the tiles for head dim and value dim: a power of two, at least 32.

    One width for all tiles of a kernel: with 32 columns of keys and 16 of values Triton 3.6 read
    shared memory out of bounds on sm_90.
    """
    return max(32, int(triton.next_power_of_2(max(dims))))


def upcasts(dtype: torch.dtype, interpreted: bool) -> bool:
    """The interpreter computes half precision wrongly (bfloat16) or slowly: cast after the load."""
    return interpreted and dtype is not torch.float32
