"""Index kernels of HyperAttention's recursion: bucket of every row, counting sort, samples.

Three launches for each of query and key, and one for the samples:

1. `_hyper_hash_kernel`: signs of the projections, read as a number in reflected Gray code, give the
   bucket. A program takes a segment of rows and stores, packed, the bucket of each and its rank
   among the segment's rows of the same bucket, and how many rows each bucket has.
2. `_hyper_scan_kernel`: for each node, where the rows of (segment, bucket) begin.
3. `_hyper_scatter_kernel`: start + rank is the sorted position, for all levels at once.
4. `_hyper_sample_kernel`: the draws of `index.samples.draw_uniforms`, as positions in the order.

No node cuts a segment, so buckets and ranks serve all levels. The sort is stable: the orders are
those of `index.sorted.build_sorted_index`, but for rows whose projection is 0 up to rounding.
"""

from __future__ import annotations

import zlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import KernelConfig, interpreting, pick
from ...._validation import Call
from ...config import HyperConfig
from ...plan import SortedIndex
from ..recursion import recursion_index
from .configs import hash_config
from .plan import Plan, make_plan, node_sizes, segments
from .tiles import block_dim, grid_of, kernel_input, load_rows, upcasts

__all__ = ["triton_index"]

MOST_PROJECTIONS = 8  # beyond it the table of a segment's buckets does not fit the registers
SCAN_SEGMENTS = 32
PLANES = 16  # columns of the projection: the least that the matrix units take


@triton.jit(do_not_specialize=["segments"])
def _hyper_hash_kernel(
    x_ptr, planes_ptr, shift_ptr, packed_ptr, counts_ptr, bounds_ptr,
    stride_xb, stride_xh, stride_xn,
    heads, length, segments,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, PLANES: tl.constexpr, BUCKETS: tl.constexpr,
    ROWS: tl.constexpr, SEGMENT: tl.constexpr, HAS_SHIFT: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Bucket + rank * 2**16 of the rows of one segment, and the number of rows in each bucket.

    planes is (H_kv, DIM, 16) float32, zero from column r on; shift (B, H, 16) is what a projection must
    exceed (0 unless the rows are centred).
    """
    segment = tl.program_id(0) % segments
    bh = (tl.program_id(0) // segments).to(tl.int64)
    b, h = bh // heads, bh % heads
    x_ptr += b * stride_xb + h * stride_xh
    planes_ptr += h // GROUP * DIM * 16
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
    # Three parts in half precision hold the 24 bits of float32: their products are exact.
    if x_ptr.dtype.element_ty != tl.float32:
        high = planes.to(x_ptr.dtype.element_ty)
        rest = planes - high.to(tl.float32)
        middle = rest.to(x_ptr.dtype.element_ty)
        low = (rest - middle.to(tl.float32)).to(x_ptr.dtype.element_ty)
    least = tl.zeros([16], tl.float32)
    if HAS_SHIFT:
        least = tl.load(shift_ptr + bh * 16 + offs_p)
    earlier = (offs_n[:, None] > offs_n[None, :]).to(tl.float16)
    seen = tl.zeros([BUCKETS], tl.float32)
    for start in range(0, SEGMENT, ROWS):
        x = load_rows(x_ptr, stride_xn, begin + start, end, offs_n, offs_d, DIM, BLOCK_D, True,
                      UPCAST)  # fmt: skip
        if x.dtype == tl.float32:
            projected = tl.dot(x, planes, input_precision="tf32x3")
        else:
            projected = tl.dot(x, low)
            projected = tl.dot(x, middle, projected)
            projected = tl.dot(x, high, projected)
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
        total += tl.sum(
            tl.load(counts_ptr + at, mask=(start + offs_s < count)[:, None], other=0), 0
        )
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


@triton.jit
def _mix(bits):
    """The 32-bit mixer of `longspan._random`."""
    bits = bits ^ (bits >> 16)
    bits = bits * 0x7FEB352D
    bits = bits ^ (bits >> 15)
    bits = bits * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit(do_not_specialize=["k_rows", "nodes", "seed_low", "seed_high"])
def _hyper_sample_kernel(
    order_ptr, samples_ptr, bias_ptr, owner_ptr, sizes_ptr, heads, k_rows, nodes, seed_low, seed_high,
    STREAM: tl.constexpr, SAMPLES: tl.constexpr, BLOCK_N: tl.constexpr, STRATIFIED: tl.constexpr,
):  # fmt: skip
    """Sampled keys of one node: position, log weight, and block."""
    node = tl.program_id(0) % nodes
    bh = tl.program_id(0) // nodes
    size = tl.load(sizes_ptr + node * 3)
    base, block = tl.load(sizes_ptr + node * 3 + 1), tl.load(sizes_ptr + node * 3 + 2)
    i = tl.arange(0, BLOCK_N)
    bits = _mix((node * SAMPLES + i).to(tl.uint32))
    # The index of a draw has the head from bit 40 on.
    bits = _mix(bits ^ ((bh % heads) << 8).to(tl.uint32) ^ tl.full([BLOCK_N], STREAM, tl.uint32))
    bits = _mix(bits ^ seed_low.to(tl.uint32))
    bits = _mix(bits ^ seed_high.to(tl.uint32))
    # In the roundings of `uniform`: to float32 below 1, then float64.
    place = (bits.to(tl.float64) + 0.5) * 2.0**-32
    place = tl.minimum(place, 1.0 - 2.0**-23).to(tl.float32).to(tl.float64)
    if STRATIFIED:
        place = (i + place) / SAMPLES
    rank = tl.minimum((place * size).to(tl.int32), size - 1)
    mask = i < SAMPLES
    rows = tl.load(order_ptr + bh.to(tl.int64) * k_rows + base + rank, mask=mask, other=0)
    at = (bh.to(tl.int64) * nodes + node) * SAMPLES + i
    tl.store(samples_ptr + at, rows, mask=mask)
    tl.store(owner_ptr + at, rank // block, mask=mask)
    weight = tl.log(size.to(tl.float32) / SAMPLES)
    tl.store(bias_ptr + at, tl.zeros([BLOCK_N], tl.float32) + weight, mask=mask)


def triton_index(
    call: Call,
    config: HyperConfig,
    projections: Tensor | None,
    seed: int,
    hash_kernel: KernelConfig | None = None,
) -> SortedIndex:
    """Sorted index of a call without key_lengths; k-means, importance sampling and more than
    MOST_PROJECTIONS planes are left to plain torch. `hash_kernel` overrides rows and warps."""
    fast = config.index == "lsh" and config.num_projections <= MOST_PROJECTIONS
    if config.residual == "value_norm" or not fast or call.query.dtype is torch.float64:
        return recursion_index(call, config, projections, seed)
    assert projections is not None
    plan = make_plan(call, config)
    query, key = kernel_input(call.query), kernel_input(call.key)
    planes = projections.new_zeros((key.shape[1], key.shape[3], PLANES), dtype=torch.float32)
    planes[:, : projections.shape[1], : projections.shape[2]] = projections
    shift = None
    if config.center_keys:  # what x . g must exceed so that (x - mean) . g exceeds 0
        mean = key.float().mean(2)  # (B, H_kv, D)
        shift = torch.einsum("bhd,hdr->bhr", mean, planes).contiguous()
    q_order = _sorted(query, plan, planes, None, config.num_projections, hash_kernel, of_keys=False)
    k_order = _sorted(key, plan, planes, shift, config.num_projections, hash_kernel, of_keys=True)
    batch, heads = key.shape[:2]
    nodes = len(plan.nodes)
    count = config.num_samples if config.residual in ("uniform", "stratified") else 0
    samples = k_order.new_empty((batch, heads, nodes, count))
    bias = torch.empty_like(samples, dtype=torch.float32)
    owner = torch.empty_like(samples)
    if samples.numel():
        _hyper_sample_kernel[grid_of(nodes, batch, heads)](
            k_order, samples, bias, owner, node_sizes(plan, key.device), heads,
            k_order.shape[-1], nodes, _signed(seed), _signed(seed >> 32),
            STREAM=zlib.crc32(b"hyper/node-samples"), SAMPLES=count,
            BLOCK_N=int(triton.next_power_of_2(count)),
            STRATIFIED=config.residual == "stratified", num_warps=4,
        )  # fmt: skip
    return SortedIndex(q_order, k_order, samples, bias, owner)


def _sorted(
    x: Tensor, plan: Plan, planes: Tensor, shift: Tensor | None, count: int,
    hash_kernel: KernelConfig | None, *, of_keys: bool,
) -> Tensor:  # fmt: skip
    """(B, H, rows) int32: rows of every node by bucket, then by position."""
    batch, heads, length, dim = x.shape
    sizes = hash_kernel or pick([hash_config(dim, x.dtype)])
    rows, size = sizes.block_m, 2 * sizes.block_n if interpreting() else sizes.block_n
    cut = segments(plan, size, of_keys, x.device)
    bases = plan.key_bases if of_keys else plan.query_bases
    order = torch.empty((batch, heads, bases[-1]), dtype=torch.int32, device=x.device)
    parts, buckets = len(cut.bounds), max(16, 1 << count)  # 16: the least of the matrix units
    if order.numel() == 0:
        return order
    packed = torch.empty((batch, heads, length), dtype=torch.int32, device=x.device)
    counts = torch.empty((batch, heads, parts, buckets), dtype=torch.int32, device=x.device)
    starts = torch.empty((batch, heads, cut.pairs, buckets), dtype=torch.int32, device=x.device)
    _hyper_hash_kernel[grid_of(parts, batch, heads)](
        x, planes, shift, packed, counts, cut.bounds, *x.stride()[:3], heads, length, parts,
        GROUP=heads // planes.shape[0], DIM=dim, BLOCK_D=block_dim(dim), PLANES=count,
        BUCKETS=buckets, ROWS=rows, SEGMENT=size, HAS_SHIFT=shift is not None,
        UPCAST=upcasts(x.dtype, interpreting()), num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
    )  # fmt: skip
    _hyper_scan_kernel[grid_of(len(plan.nodes), batch, heads)](
        counts, starts, cut.nodes, parts, len(plan.nodes), cut.pairs,
        BUCKETS=buckets, BLOCK_S=4 if interpreting() else SCAN_SEGMENTS, num_warps=4,
    )  # fmt: skip
    _hyper_scatter_kernel[grid_of(parts, batch, heads)](
        packed, starts, order, cut.bounds, cut.members, length, parts, cut.members.shape[1],
        cut.pairs, bases[-1], BUCKETS=buckets, SEGMENT=size, num_warps=4,
    )  # fmt: skip
    return order


def _signed(bits: int) -> int:
    """The low 32 bits, as the signed number with the same bits."""
    bits &= 0xFFFFFFFF
    return bits - (1 << 32) if bits >> 31 else bits
