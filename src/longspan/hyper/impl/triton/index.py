"""Index kernels of HyperAttention: bucket of every row, then a counting sort of every node.

Three launches for each of query and key, and one for the samples:

1. `_hyper_hash_kernel`: signs of r projections, read as a number in reflected Gray code, give the
   bucket. A program takes SEGMENT rows and stores, packed, the bucket of each and its rank among
   the segment's rows of the same bucket, and how many rows each bucket has.
2. `_hyper_scan_kernel`: for each node, where the rows of (segment, bucket) begin.
3. `_hyper_scatter_kernel`: start + rank is the sorted position, for every level at once.
4. `_hyper_position_kernel`: the same sum for the sampled keys.

Segments never cross a node's end, so buckets and ranks serve all levels. The sort is stable.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import interpreting, pick
from .forward import Index
from .plan import Plan, bases
from .tiles import block_dim, grid_of, load_rows, upcasts

__all__ = ["MOST_PROJECTIONS", "bucket_order", "lsh_index"]

MOST_PROJECTIONS = 8  # beyond it the table of a segment's buckets does not fit the registers
SEGMENT = 512
_HASH_ROWS = 64
_PLANES = 16  # columns of the projection: the least that the matrix units take


@triton.jit(do_not_specialize=["segments"])
def _hyper_hash_kernel(
    x_ptr, planes_ptr, shift_ptr, packed_ptr, counts_ptr, bounds_ptr,
    stride_xb, stride_xh, stride_xn,
    heads, length, segments,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, PLANES: tl.constexpr, BUCKETS: tl.constexpr,
    ROWS: tl.constexpr, SEGMENT: tl.constexpr, HAS_SHIFT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Bucket + rank * 2**16 of the rows of one segment, and the number of rows in each bucket.

    planes is (DIM, 16) float32, zero from column r on; shift (B, H, 16) is what a projection must
    exceed (0 unless the rows are centred).
    """
    segment = tl.program_id(0) % segments
    bh = (tl.program_id(0) // segments).to(tl.int64)
    b, h = bh // heads, bh % heads
    x_ptr += b * stride_xb + h * stride_xh
    packed_ptr += bh * length
    begin, end = tl.load(bounds_ptr + segment * 2), tl.load(bounds_ptr + segment * 2 + 1)

    offs_n = tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    offs_p = tl.arange(0, 16)
    buckets = tl.arange(0, BUCKETS)
    # [BLOCK_D, 16]
    planes = tl.load(
        planes_ptr + offs_d[:, None] * 16 + offs_p[None, :],
        mask=(offs_d < DIM)[:, None], other=0.0,
    )  # fmt: skip
    least = tl.zeros([16], tl.float32)
    if HAS_SHIFT:
        least = tl.load(shift_ptr + bh * 16 + offs_p)
    earlier = (offs_n[:, None] > offs_n[None, :]).to(tl.float16)
    seen = tl.zeros([BUCKETS], tl.float32)
    for start in range(0, SEGMENT, ROWS):
        x = load_rows(x_ptr, stride_xn, begin + start, end, offs_n, offs_d, DIM, BLOCK_D, True,
                      UPCAST)  # fmt: skip
        projected = tl.dot(x.to(tl.float32), planes, input_precision="tf32x3")
        signs = (projected > least[None, :]) & (offs_p < PLANES)[None, :]
        # Plane 0 is the lowest bit of the Gray code; its position is the running xor from the top.
        code = tl.sum(tl.where(signs, 1 << offs_p[None, :], 0), 1)
        code = code ^ (code >> 4)
        code = code ^ (code >> 2)
        code = code ^ (code >> 1)
        is_row = begin + start + offs_n < end
        mine = (code[:, None] == buckets[None, :]) & is_row[:, None]  # [ROWS, BUCKETS]
        ones = mine.to(tl.float16)
        before = tl.dot(earlier, ones) + seen[None, :]  # exact: whole numbers below 2**11
        rank = tl.sum(tl.where(mine, before, 0.0), 1).to(tl.int32)
        seen += tl.sum(tl.where(mine, 1.0, 0.0), 0)
        tl.store(packed_ptr + begin + start + offs_n, code | (rank << 16), mask=is_row)
    tl.store(counts_ptr + (bh * segments + segment) * BUCKETS + buckets, seen.to(tl.int32))


@triton.jit(do_not_specialize=["segments", "nodes", "pairs"])
def _hyper_scan_kernel(
    counts_ptr, starts_ptr, nodes_ptr, segments, nodes, pairs,
    BUCKETS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Sorted position of the first row of each (segment, bucket) of one node."""
    node = tl.program_id(0) % nodes
    bh = (tl.program_id(0) // nodes).to(tl.int64)
    nodes_ptr += node * 4
    first, count = tl.load(nodes_ptr), tl.load(nodes_ptr + 1)
    pair, base = tl.load(nodes_ptr + 2), tl.load(nodes_ptr + 3)
    offs_s = tl.arange(0, BLOCK_S)
    buckets = tl.arange(0, BUCKETS)
    counts_ptr += (bh * segments + first) * BUCKETS
    starts_ptr += (bh * pairs + pair) * BUCKETS
    total = tl.zeros([BUCKETS], tl.int32)
    for start in range(0, count, BLOCK_S):
        at = (start + offs_s)[:, None] * BUCKETS + buckets[None, :]
        total += tl.sum(tl.load(counts_ptr + at, mask=(start + offs_s < count)[:, None], other=0), 0)
    run = tl.cumsum(total, 0) - total + base
    for start in range(0, count, BLOCK_S):
        at = (start + offs_s)[:, None] * BUCKETS + buckets[None, :]
        mask = (start + offs_s < count)[:, None]
        tile = tl.load(counts_ptr + at, mask=mask, other=0)
        tl.store(starts_ptr + at, tl.cumsum(tile, 0) - tile + run[None, :], mask=mask)
        run += tl.sum(tile, 0)


@triton.jit(do_not_specialize=["length", "segments", "levels", "pairs", "order_all"])
def _hyper_scatter_kernel(
    packed_ptr, starts_ptr, order_ptr, bounds_ptr, members_ptr,
    length, segments, levels, pairs, order_all,
    BUCKETS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Write the rows of one segment to their sorted positions in every node they belong to."""
    segment = tl.program_id(0) % segments
    bh = (tl.program_id(0) // segments).to(tl.int64)
    begin, end = tl.load(bounds_ptr + segment * 2), tl.load(bounds_ptr + segment * 2 + 1)
    rows = begin + tl.arange(0, SEGMENT)
    packed = tl.load(packed_ptr + bh * length + rows, mask=rows < end, other=0)
    bucket, rank = packed & 0xFFFF, packed >> 16
    starts_ptr += bh * pairs * BUCKETS
    order_ptr += bh * order_all
    for level in range(0, levels):
        pair = tl.load(members_ptr + segment * levels + level)
        if pair >= 0:
            at = tl.load(starts_ptr + pair * BUCKETS + bucket, mask=rows < end, other=0) + rank
            tl.store(order_ptr + at, rows, mask=rows < end)


@triton.jit(do_not_specialize=["length", "segments", "samples", "nodes", "pairs"])
def _hyper_position_kernel(
    packed_ptr, starts_ptr, columns_ptr, positions_ptr, nodes_ptr,
    length, segments, samples, nodes, pairs, columns_all, k_rows, leaf, leaf_segments,
    BUCKETS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sorted positions of the sampled keys of one node."""
    node = tl.program_id(0) % nodes
    bh = (tl.program_id(0) // nodes).to(tl.int64)
    first, pair = tl.load(nodes_ptr + node * 4), tl.load(nodes_ptr + node * 4 + 2)
    offs_n = tl.arange(0, BLOCK_N)
    for start in range(0, samples, BLOCK_N):
        mask = start + offs_n < samples
        at = node * samples + start + offs_n
        rows = tl.load(columns_ptr + bh * columns_all + k_rows + at, mask=mask, other=0)
        packed = tl.load(packed_ptr + bh * length + rows, mask=mask, other=0)
        segment = rows // leaf * leaf_segments + rows % leaf // SEGMENT - first
        begin = tl.load(
            starts_ptr + (bh * pairs + pair + segment) * BUCKETS + (packed & 0xFFFF),
            mask=mask, other=0,
        )  # fmt: skip
        tl.store(positions_ptr + bh * nodes * samples + at, begin + (packed >> 16), mask=mask)
