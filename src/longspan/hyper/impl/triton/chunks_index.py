"""The index of "pca" on the device: a balanced tree over each chunk, level by level.

As `index.pca.balanced_order`: every node is halved at the median of its widest direction, found by
power iteration. Projections that agree to 2**-14 (relative) count as equal.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import KernelConfig, pick, triton_refusal
from ...config import HyperConfig
from ...index.chunks import shared_in_pairs
from ...plan import ChunkIndex
from .tiles import grid_of, kernel_input

__all__ = ["can_index", "triton_chunk_index"]

_POWER_STEPS = 4
_ROWS = 256  # rows that a program of the small levels holds
_WIDEST = 128
_LARGEST_CHUNK = 1024


@triton.jit(do_not_specialize=["chunks", "first_chunk"])
def _hyper_tree_kernel(
    k_ptr, order_ptr, next_ptr, stride_kb, stride_kh, stride_kn, kv_heads, chunks, first_chunk,
    DIM: tl.constexpr, CHUNK: tl.constexpr, SINKS: tl.constexpr, SIZE: tl.constexpr,
    NODES: tl.constexpr, IS_ROOT: tl.constexpr, STEPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Order NODES nodes of SIZE keys each by their projections; positions are inside of the chunk.

    Sinks weigh nothing and come last.
    """
    parts: tl.constexpr = CHUNK // (SIZE * NODES)
    part = tl.program_id(0) % parts
    group = (tl.program_id(0) // parts).to(tl.int64)
    chunk, bh = group % chunks, group // chunks
    b, h = bh // kv_heads, bh % kv_heads
    k_ptr += b * stride_kb + h * stride_kh + chunk * CHUNK * stride_kn
    node = tl.arange(0, NODES)
    slot = tl.arange(0, SIZE)
    offs_d = tl.arange(0, BLOCK_D)
    at = part * SIZE * NODES + node[:, None] * SIZE + slot[None, :]  # [NODES, SIZE]
    base = group * CHUNK
    places = at
    if not IS_ROOT:
        places = tl.load(order_ptr + base + at)
    ptrs = k_ptr + places.to(tl.int64)[:, :, None] * stride_kn + offs_d[None, None, :]
    x = tl.load(ptrs, mask=(offs_d < DIM)[None, None, :], other=0.0).to(tl.float32)
    is_valid = (chunk + first_chunk) * CHUNK + places >= SINKS
    weight = tl.where(is_valid, 1.0, 0.0)
    x = tl.where(tl.abs(x) < 1.0e18, x, 0.0)  # what is not finite may lie anywhere
    number = tl.maximum(tl.sum(weight, 1), 1.0)
    mean = tl.sum(x * weight[:, :, None], 1) / number[:, None]  # [NODES, BLOCK_D]
    x = (x - mean[:, None, :]) * weight[:, :, None]
    longest = tl.argmax(tl.sum(x * x, 2), 1)  # a start that is not orthogonal to the data
    axis = tl.sum(tl.where((slot[None, :] == longest[:, None])[:, :, None], x, 0.0), 1)
    for _ in range(STEPS):
        length = tl.sqrt(tl.sum(axis * axis, 1))
        axis = axis / tl.maximum(length, 1.0e-18)[:, None]
        along = tl.sum(x * axis[:, None, :], 2)
        axis = tl.sum(x * along[:, :, None], 1)
    length = tl.sqrt(tl.sum(axis * axis, 1))
    axis = axis / tl.maximum(length, 1.0e-18)[:, None]
    along = tl.sum(x * axis[:, None, :], 2)
    along = tl.where(is_valid, along, 1.0e30)
    bits = along.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers in the order of the numbers
    bits = tl.sort((bits & (-SIZE)) | slot[None, :], dim=1)
    source = part * SIZE * NODES + node[:, None] * SIZE + (bits & (SIZE - 1))
    found = source
    if not IS_ROOT:
        found = tl.load(order_ptr + base + source)
    tl.store(next_ptr + base + at, found)


@triton.jit(do_not_specialize=["clusters"])
def _hyper_statistics_kernel(
    k_ptr, order_ptr, counts_ptr, mean_ptr, var_ptr, stride_kb, stride_kh, stride_kn,
    kv_heads, clusters, width,
    DIM: tl.constexpr, SIZE: tl.constexpr, HAS_VARIANCE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean and variance (divided by the count) of the keys of one cluster of up to SIZE keys."""
    cluster = (tl.program_id(0) % clusters).to(tl.int64)
    bh = (tl.program_id(0) // clusters).to(tl.int64)
    b, h = bh // kv_heads, bh % kv_heads
    k_ptr += b * stride_kb + h * stride_kh
    slot = tl.arange(0, SIZE)
    offs_d = tl.arange(0, BLOCK_D)
    at = bh * clusters + cluster
    count = tl.load(counts_ptr + at)
    places = tl.load(order_ptr + at * SIZE + slot).to(tl.int64)
    mask = (slot < count)[:, None] & (offs_d < DIM)[None, :]
    x = tl.load(k_ptr + places[:, None] * stride_kn + offs_d[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    number = tl.maximum(count, 1).to(tl.float32)
    mean = tl.sum(x, 0) / number
    tl.store(mean_ptr + at * width + offs_d, mean, mask=offs_d < width)
    if HAS_VARIANCE:
        apart = tl.where(mask, x - mean[None, :], 0.0)
        tl.store(var_ptr + at * width + offs_d, tl.sum(apart * apart, 0) / number,
                 mask=offs_d < width)  # fmt: skip


def can_index(key: Tensor, config: HyperConfig) -> bool:
    """True if `triton_chunk_index` takes these keys."""
    size = config.chunk_size
    return (
        config.index == "pca"
        and config.num_globals == 0
        and config.residual in ("centroid", "none")
        and config.cluster_size > 1
        and not size & (size - 1)
        and size <= _LARGEST_CHUNK
        and key.shape[-1] <= _WIDEST
        and key.numel() > 0
        and triton_refusal(key) is None
    )


def triton_chunk_index(key: Tensor, config: HyperConfig, first_chunk: int = 0) -> ChunkIndex:
    """As `index.chunks.build_chunk_index` for keys (B, H_kv, N_k, D) that `can_index` takes."""
    width = key.shape[-1]
    key = kernel_input(key.detach())
    batch, heads, length, dim = key.shape
    size, per_chunk, leaf = config.chunk_size, config.clusters_per_chunk, config.cluster_size
    chunks = length // size
    groups = batch * heads * chunks
    device = key.device
    # Positions inside of the chunk; one buffer is read while the other is written.
    order, following = (torch.empty((groups, size), dtype=torch.int32, device=device)
                        for _ in range(2))  # fmt: skip
    block_d = max(16, triton.next_power_of_2(dim))
    pick([KernelConfig(16, 16, 4, 1)])  # makes the interpreter ready
    node, is_root = size, True
    if node == leaf:
        order.copy_(torch.arange(size, device=device, dtype=torch.int32).expand_as(order))
        if first_chunk == 0 and config.num_sinks:
            order.view(batch * heads, chunks, size)[:, 0] = order.view(
                batch * heads, chunks, size)[:, 0].roll(-config.num_sinks, -1)  # fmt: skip
    while node > leaf and groups:
        nodes = max(1, min(_ROWS, size) // node)
        _hyper_tree_kernel[grid_of(groups, size // (node * nodes))](
            key, order, following, *key.stride()[:3], heads, chunks, first_chunk,
            DIM=dim, CHUNK=size, SINKS=config.num_sinks, SIZE=node, NODES=nodes, IS_ROOT=is_root,
            STEPS=_POWER_STEPS, BLOCK_D=block_d,
            num_warps=tree_warps(node * nodes * block_d),
        )  # fmt: skip
        order, following, is_root = following, order, False
        node //= 2
    return _described(key, order, config, first_chunk, batch, heads, chunks, per_chunk, leaf, width)


def tree_warps(elements: int) -> int:
    """At most 32 elements of the tile of keys to a thread, where that is possible."""
    return min(16, max(4, elements // (32 * 32)))


def _described(
    key: Tensor, order: Tensor, config: HyperConfig, first_chunk: int, batch: int, heads: int,
    chunks: int, per_chunk: int, leaf: int, width: int,
) -> ChunkIndex:  # fmt: skip
    device, size = order.device, config.chunk_size
    whole: dict[str, Any] = {"dtype": torch.int32, "device": device}
    clusters = chunks * per_chunk
    starts = torch.arange(clusters, **whole) * leaf
    counts = torch.full((clusters,), leaf, **whole)
    cut = torch.arange(size, **whole) // leaf
    names = cut + (torch.arange(chunks, **whole) * per_chunk).unsqueeze(-1)  # (chunks, size)
    sinks = min(config.num_sinks, size) if first_chunk == 0 and chunks else 0
    if sinks:
        left = size - sinks - torch.arange(per_chunk, **whole) * leaf
        counts[:per_chunk] = left.clamp(0, leaf)
        names = names.clone()
        names[0, size - sinks :] = -1
        # Sinks lie at the end already; in order of position.
        order.view(batch * heads, chunks, size)[:, 0, size - sinks :] = torch.arange(sinks, **whole)
    labels = torch.empty_like(order).view(batch * heads, chunks, size)
    local = order.view(batch * heads, chunks, size)
    labels.scatter_(2, local.long(), names.expand_as(local))
    order = (local + (torch.arange(chunks, **whole) * size).unsqueeze(-1)).view(batch, heads, -1)
    counts = counts.expand(batch, heads, -1).contiguous()
    mean = torch.empty((batch, heads, clusters, width), dtype=torch.float32, device=device)
    spread = clusters if config.probe_spread else 0
    variance = torch.empty((batch, heads, spread, width), dtype=torch.float32, device=device)
    if mean.numel():
        _hyper_statistics_kernel[grid_of(clusters, batch, heads)](
            key, order, counts, mean, variance if spread else None, *key.stride()[:3],
            heads, clusters, width, DIM=key.shape[-1], SIZE=leaf, HAS_VARIANCE=spread > 0,
            BLOCK_D=max(16, triton.next_power_of_2(key.shape[-1])), num_warps=1,
        )  # fmt: skip
    none = torch.empty((batch, heads, 0), **whole)
    return ChunkIndex(
        order=order,
        starts=starts.expand(batch, heads, -1).contiguous(),
        counts=counts,
        labels=labels.view(batch, heads, -1),
        globals=torch.empty((batch, heads, chunks, 0), **whole),
        mean_key=mean,
        samples=none,
        sample_bias=none.float(),
        variance=shared_in_pairs(variance),
    )
