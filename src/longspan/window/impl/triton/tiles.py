"""What the kernels of window attention share: which tiles a program visits, loads, launching.

A tile of queries sees a run of key tiles. Tiles in the middle of the run are visible in full and
take no mask; `run_bounds` separates them from the masked ones at both ends. Sinks before the run are a
tile of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...._triton.launch import interpreting
from ....errors import UnsupportedError
from ...config import WindowConfig

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

_MOST_PROGRAMS = 2**31 - 1
_MOST_TILE_ROWS = 256
_LEAST_COPIED_ROWS = 2**18  # queries of all heads: 8,192 of 32 heads
_ALIGNMENT = 16  # what Triton looks for in strides (elements) and pointers (bytes)


@triton.jit
def sequence_of(
    b, cu_q_ptr, cu_k_ptr, lengths_ptr, n_q, n_k, query_offset,
    IS_PACKED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """First row of query and of key, their lengths, and the key index of query 0, for entry b."""
    q_start = b * 0
    k_start = b * 0
    if IS_PACKED:
        q_start = tl.load(cu_q_ptr + b).to(tl.int64)
        k_start = tl.load(cu_k_ptr + b).to(tl.int64)
        n_q = (tl.load(cu_q_ptr + b + 1) - q_start).to(tl.int32)
        n_k = (tl.load(cu_k_ptr + b + 1) - k_start).to(tl.int32)
        query_offset = n_k - n_q
    if HAS_LENGTHS:
        n_k = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), n_k)
    return q_start, k_start, n_q, n_k, query_offset


@triton.jit
def load_tile(
    ptr, stride, start, length, offs_n, offs_d,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows start .. of a (length, DIM) matrix; zero outside. Upcast where kernels are interpreted."""
    # 64 bits to the tile, 32 bits inside of it: stride * 256 < 2**31 is checked at the launch.
    ptrs = ptr + tl.cast(start, tl.int64) * stride + (offs_n[:, None] * stride + offs_d[None, :])
    if MASKED:
        if DIM == BLOCK_D:
            tile = tl.load(ptrs, mask=(start + offs_n < length)[:, None], other=0.0)
        else:
            mask = (start + offs_n < length)[:, None] & (offs_d < DIM)[None, :]
            tile = tl.load(ptrs, mask=mask, other=0.0)
    elif DIM == BLOCK_D:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=(offs_d < DIM)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def copy_tile(
    desc, b, h, start, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows start .. of head h of entry b by the tensor memory accelerator; zero outside."""
    tile = desc.load([b.to(tl.int32), h.to(tl.int32), start, 0]).reshape([BLOCK_N, BLOCK_D])
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_tile(
    ptr, stride, start, length, offs_n, offs_d, tile, DIM: tl.constexpr,
):  # fmt: skip
    """Rows start .. of a (length, DIM) matrix."""
    ptrs = ptr + tl.cast(start, tl.int64) * stride + (offs_n[:, None] * stride + offs_d[None, :])
    mask = (start + offs_n < length)[:, None] & (offs_d < DIM)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def run_bounds(
    first, last, n_k, window, num_sinks, IS_CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Key tiles that queries at key indices first .. last see.

    Returns (begin, full_begin, full_end, end, sink_end): the run is begin .. end in steps of
    BLOCK_N, tiles in full_begin .. full_end take no mask, and some row sees sinks before its run,
    all of them below sink_end.
    """
    begin = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
    full_begin = (tl.maximum(last - window + 1, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    if IS_CAUSAL:
        end = tl.minimum(last + 1, n_k)
        full_end = tl.minimum(first + 1, n_k)
    else:  # rows whose window ends below num_sinks: their run is all sinks, see row_bounds
        end = tl.minimum(tl.maximum(last + window, num_sinks), n_k)
        full_end = tl.minimum(first + window, n_k)
        begin = tl.where(first + window < tl.minimum(num_sinks, n_k), 0, begin)
    full_end = tl.maximum(full_end, 0) // BLOCK_N * BLOCK_N
    full_end = tl.maximum(full_end, full_begin)
    sink_end = tl.minimum(tl.minimum(num_sinks, n_k), tl.maximum(last - window + 1, 0))
    return begin, full_begin, full_end, end, sink_end


@triton.jit
def row_bounds(p, n_k, window, num_sinks, IS_CAUSAL: tl.constexpr):
    """What the query at key index p (BLOCK_M,) sees: `count` keys from `low`, and sinks below low.

    Returns (low, count).
    """
    low = tl.maximum(p - window + 1, 0)
    if IS_CAUSAL:
        high = tl.minimum(p, n_k - 1)
    else:
        sinks = tl.minimum(num_sinks, n_k)
        high = tl.minimum(p + (window - 1), n_k - 1)
        low = tl.where(high < sinks - 1, 0, low)
        high = tl.maximum(high, sinks - 1)
    return low, tl.maximum(high - low + 1, 0)


@triton.jit
def masked_tile(t, begin, full_begin, full_end, BLOCK_N: tl.constexpr):
    """Start of the masked tile number t of a run: those before the full ones, then those after."""
    before = (full_begin - begin) // BLOCK_N
    return tl.where(t < before, begin + t * BLOCK_N, full_end + (t - before) * BLOCK_N)


@triton.jit
def masked_count(begin, full_begin, full_end, end, BLOCK_N: tl.constexpr):
    """How many tiles of a run take a mask."""
    before = tl.minimum(full_begin - begin, tl.maximum(end - begin, 0) + BLOCK_N - 1) // BLOCK_N
    after = (tl.maximum(end - full_end, 0) + BLOCK_N - 1) // BLOCK_N
    return before + after


@triton.jit
def within(low, count, start, offs_n):
    """Whether key start + offs_n is one of the `count` keys from low: [BLOCK_M, BLOCK_N].

    One subtraction and one unsigned comparison an element: a negative gap is a large number.
    """
    gap = offs_n[None, :] - (low - start)[:, None]
    return gap.to(tl.uint32) < count.to(tl.uint32)[:, None]


@triton.jit
def below(low, sink_end, start, offs_n):
    """Whether key start + offs_n is a sink before the interval of a row: [BLOCK_M, BLOCK_N]."""
    j = start + offs_n
    return (j[None, :] < low[:, None]) & (j < sink_end)[None, :]


@triton.jit
def row_parts(w, PARTS: tl.constexpr):
    """Sums of every PARTS-th column, [BLOCK_M, PARTS]: with 8 parts no lane asks another one."""
    if PARTS == 1:
        return tl.sum(w, 1)[:, None]
    return tl.sum(tl.reshape(w, [w.shape[0], w.shape[1] // PARTS, PARTS]), 1)


def kernel_input(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy that the kernels can read in 16-byte pieces.

    The last axis becomes a multiple of 16, with zeros; all strides become multiples of 16. Without
    that Triton loads element by element and cannot pipeline (and Triton 3.6 gave wrong products on
    sm_90 for a head dim of 20 with a value dim of 5).
    """
    if short := -tensor.shape[-1] % _ALIGNMENT:
        return torch.nn.functional.pad(tensor, (0, short))
    batch, head, row, column = tensor.stride()
    fits = column == 1 and row * _MOST_TILE_ROWS < 2**31
    if fits and (batch | head | row) % _ALIGNMENT == 0 and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def copies_tiles(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator can copy tiles of these results of `kernel_input`."""
    if not interpreting() and torch.cuda.get_device_capability(tensors[0].device)[0] < 9:
        return False
    return all(min(t.stride()) > 0 and t.element_size() == 2 for t in tensors)


def copies_pay(query: Tensor) -> bool:
    """Whether there is enough to do: descriptors cost the host about 70 us a call."""
    return interpreting() or query.shape[:3].numel() > _LEAST_COPIED_ROWS


def descriptors(is_tma: bool, a: Tensor, b: Tensor, rows: int) -> tuple[Any, Any]:
    """What a kernel needs to copy tiles of `rows` rows from two tensors (B, H, N, D); or nothing."""
    return (_descriptor(a, rows), _descriptor(b, rows)) if is_tma else (None, None)


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    shape, strides = list(tensor.shape), list(tensor.stride())
    return TensorDescriptor(tensor, shape, strides, [1, 1, rows, block_dim(shape[-1])])


def kernel_settings(config: WindowConfig, n_k: int) -> tuple[int, int]:
    """window and num_sinks, cut to what 32-bit arithmetic and n_k keys can tell apart."""
    return min(config.window, 2**30), min(config.num_sinks, n_k)


def grid_of(tiles: int, entries: int, heads: int) -> tuple[int]:
    """One axis, because only the first may pass 65535."""
    programs = tiles * entries * heads
    if programs > _MOST_PROGRAMS:
        raise UnsupportedError(
            f'window_attention(impl="triton"): the call needs {programs} programs; at most '
            f"{_MOST_PROGRAMS} can be launched. Split the batch, or use impl='eager'."
        )
    return (programs,)


def block_dim(dim: int) -> int:
    """Columns of a tile for a head dim: a power of two, at least 16 for the matrix units."""
    return max(16, 1 << (dim - 1).bit_length())


def tiles_of(length: int, block: int) -> int:
    """Tiles of `block` that cover `length`; triton.cdiv takes 5 us on the host."""
    return -(-length // block)


def cut(tensor: Tensor, dim: int) -> Tensor:
    """`tensor` without the columns that `kernel_input` added, contiguous."""
    return tensor if tensor.shape[-1] == dim else tensor[..., :dim].contiguous()


def upcasts(dtype: torch.dtype, interpreted: bool) -> bool:
    """The interpreter computes half precision wrongly (bfloat16) or slowly: cast after the load."""
    return interpreted and dtype is not torch.float32
