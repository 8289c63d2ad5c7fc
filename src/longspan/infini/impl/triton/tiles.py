"""Pieces that the kernels share: loads, the feature map, products of split halves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....errors import UnsupportedError

__all__ = [
    "block_dim",
    "dot_halves",
    "full_grid",
    "halves",
    "high_half",
    "kernel_input",
    "load_rows",
    "phi",
    "rows_apart",
    "store_rows",
    "sum_rows",
    "upcasts",
]

_MOST_PROGRAMS = 2**31 - 1


@triton.jit
def load_rows(ptr, stride, rows, inside, cols, DIM: tl.constexpr, UPCAST: tl.constexpr):
    """[rows, cols] in its own dtype; zero where `inside` is False or the column is past DIM."""
    offsets = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    mask = inside[:, None]
    if cols.shape[0] != DIM:
        mask = mask & (cols < DIM)[None, :]
    x = tl.load(ptr + offsets, mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_rows(ptr, stride, rows, inside, cols, x, DIM: tl.constexpr):
    """Write a tile, in the dtype of the target."""
    offsets = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    mask = inside[:, None]
    if cols.shape[0] != DIM:
        mask = mask & (cols < DIM)[None, :]
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def phi(x, inside, cols, DIM: tl.constexpr):
    """ELU(x) + 1 in float32; zero in rows and columns that do not exist."""
    x = x.to(tl.float32)
    y = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    mask = inside[:, None]
    if cols.shape[0] != DIM:
        mask = mask & (cols < DIM)[None, :]
    return tl.where(mask, y, 0.0)


@triton.jit
def high_half(x, HALF: tl.constexpr):
    """What the matrix units get of float32 x: its bfloat16 value; x itself if not HALF."""
    if HALF:
        x = x.to(tl.bfloat16)
    return x


@triton.jit
def halves(x, HALF: tl.constexpr):
    """bfloat16 value of float32 x, and of what rounding left; twice x itself if not HALF."""
    high, low = x, x
    if HALF:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
    return high, low


@triton.jit
def dot_halves(
    a_high, a_low, b_high, b_low, acc, HALF: tl.constexpr, LOW_A: tl.constexpr,
    LOW_B: tl.constexpr,
):  # fmt: skip
    """acc + a @ b of operands from `halves`, with the low parts where they matter.

    HALF: on bfloat16 matrix units. Otherwise three TensorFloat-32 products.
    """
    if HALF:
        acc = tl.dot(a_high, b_high, acc)
        if LOW_B:
            acc = tl.dot(a_high, b_low, acc)
        if LOW_A:
            acc = tl.dot(a_low, b_high, acc)
    else:
        acc = tl.dot(a_high, b_high, acc, input_precision="tf32x3")
    return acc


@triton.jit
def sum_rows(x, APART: tl.constexpr):
    """[rows, cols] to [APART, cols]: sums that stay in a thread if APART rows are loaded at once."""
    return tl.sum(tl.reshape(x, [x.shape[0] // APART, APART, x.shape[1]]), 0)


def kernel_input(tensor: Tensor) -> Tensor:
    """`tensor`, or a contiguous copy if its last stride is not 1 or a row is not aligned."""
    aligned = all(s * tensor.element_size() % 16 == 0 for s in tensor.stride()[:-1])
    return tensor if tensor.stride(-1) == 1 and aligned else tensor.contiguous()


def full_grid(programs: int) -> tuple[int]:
    """One axis, because only the first may pass 65535."""
    if programs > _MOST_PROGRAMS:
        raise UnsupportedError(
            f'infini_attention(impl="triton"): the call needs {programs} programs; at most '
            f"{_MOST_PROGRAMS} can be launched. Split the batch, or use impl='eager'."
        )
    return (programs,)


def block_dim(dim: int) -> int:
    """Columns of a tile for a head dim: a power of two, at least 16 for the matrix units."""
    return max(16, int(triton.next_power_of_2(dim)))


def rows_apart(rows: int, block_d: int, num_warps: int) -> int:
    """How many rows of a tile the threads load at once, 16 bytes of a 16-bit dtype each."""
    return max(1, min(rows, num_warps * 32 * 8 // block_d))


def upcasts(dtype: torch.dtype, interpreted: bool) -> bool:
    """The interpreter computes half precision wrongly (bfloat16) or slowly: cast after the load."""
    return interpreted and dtype is not torch.float32
