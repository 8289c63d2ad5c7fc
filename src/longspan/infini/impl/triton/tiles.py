"""Pieces that the kernels share: loads, the feature map, products of split halves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....errors import UnsupportedError

__all__ = [
    "block_dim",
    "full_grid",
    "kernel_input",
    "load_rows",
    "phi",
    "split_dot",
    "store_rows",
    "upcasts",
]

_MOST_PROGRAMS = 2**31 - 1


@triton.jit
def load_rows(ptr, stride, rows, inside, cols, DIM: tl.constexpr, UPCAST: tl.constexpr):
    """[rows, cols] in its own dtype; zero where `inside` is False or the column is past DIM."""
    offsets = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    x = tl.load(ptr + offsets, mask=inside[:, None] & (cols < DIM)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_rows(ptr, stride, rows, inside, cols, x, DIM: tl.constexpr):
    """Write a tile, in the dtype of the target."""
    offsets = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    mask = inside[:, None] & (cols < DIM)[None, :]
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def phi(x, inside, cols, DIM: tl.constexpr):
    """ELU(x) + 1 in float32; zero in rows and columns that do not exist."""
    x = x.to(tl.float32)
    y = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    return tl.where(inside[:, None] & (cols < DIM)[None, :], y, 0.0)


@triton.jit
def split_dot(a, b, acc, HALF: tl.constexpr, LOW_A: tl.constexpr, LOW_B: tl.constexpr):
    """acc + a @ b for float32 a and b.

    HALF: on bfloat16 matrix units, each operand as its rounded value, plus what the rounding
    left (LOW_A, LOW_B) where that matters. Otherwise three TensorFloat-32 products.
    """
    if HALF:
        a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
        acc = tl.dot(a_high, b_high, acc)
        if LOW_B:
            acc = tl.dot(a_high, (b - b_high.to(tl.float32)).to(tl.bfloat16), acc)
        if LOW_A:
            acc = tl.dot((a - a_high.to(tl.float32)).to(tl.bfloat16), b_high, acc)
    else:
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    return acc


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


def upcasts(dtype: torch.dtype, interpreted: bool) -> bool:
    """The interpreter computes half precision wrongly (bfloat16) or slowly: cast after the load."""
    return interpreted and dtype is not torch.float32
