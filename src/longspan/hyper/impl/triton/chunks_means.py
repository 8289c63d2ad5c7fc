"""Mean key and mean value of every cluster: what clusters are chosen by, and the centroid columns."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import KernelConfig, interpreting, pick
from ...plan import ChunkIndex
from .tiles import block_dim, gather_rows, grid_of, upcasts

__all__ = ["Means", "cluster_means"]

_SIZES = KernelConfig(16, 16, 1, 1)


class Means(NamedTuple):
    """Of all clusters, contiguous, in the dtype of key and value."""

    key: Tensor  # (B, H_kv, M, D)
    value: Tensor  # (B, H_kv, M, D_v)
    bias: Tensor  # (B, H_kv, M) float32: log2 of the number of keys, -inf for an empty cluster


@triton.jit(do_not_specialize=["clusters", "ordered"])
def _hyper_mean_kernel(
    k_ptr, v_ptr, order_ptr, starts_ptr, counts_ptr, mean_k_ptr, mean_v_ptr, bias_ptr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    kv_heads, clusters, ordered,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One cluster: mean over its keys, BLOCK_N at a time, summed in float32."""
    cluster = tl.program_id(0) % clusters
    kv = (tl.program_id(0) // clusters).to(tl.int64)
    b, h = kv // kv_heads, kv % kv_heads
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    at = kv * clusters + cluster
    start = tl.load(starts_ptr + at)
    count = tl.load(counts_ptr + at)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    total_k = tl.zeros([BLOCK_D], tl.float32)
    total_v = tl.zeros([BLOCK_DV], tl.float32)
    for i in range(0, count, BLOCK_N):
        exists = i + offs_n < count
        keys = tl.load(order_ptr + kv * ordered + start + i + offs_n, mask=exists, other=0)
        k = gather_rows(k_ptr, stride_kn, keys, exists, offs_d, DIM, BLOCK_D, UPCAST)
        v = gather_rows(v_ptr, stride_vn, keys, exists, offs_dv, VALUE_DIM, BLOCK_DV, UPCAST)
        total_k += tl.sum(k.to(tl.float32), 0)
        total_v += tl.sum(v.to(tl.float32), 0)
    number = count.to(tl.float32)
    share = 1.0 / tl.maximum(number, 1.0)
    tl.store(mean_k_ptr + at * DIM + offs_d, (total_k * share).to(mean_k_ptr.dtype.element_ty),
             mask=offs_d < DIM)  # fmt: skip
    tl.store(mean_v_ptr + at * VALUE_DIM + offs_dv,
             (total_v * share).to(mean_v_ptr.dtype.element_ty), mask=offs_dv < VALUE_DIM)  # fmt: skip
    bias = tl.where(count > 0, tl.math.log2(tl.maximum(number, 1.0)), float("-inf"))
    tl.store(bias_ptr + at, bias)


def cluster_means(key: Tensor, value: Tensor, index: ChunkIndex) -> Means:
    """Means of key and value, both made ready by `kernel_input`."""
    batch, kv_heads, clusters = index.counts.shape
    dim, value_dim = key.shape[-1], value.shape[-1]
    means = Means(
        key.new_empty((batch, kv_heads, clusters, dim)),
        value.new_empty((batch, kv_heads, clusters, value_dim)),
        key.new_empty((batch, kv_heads, clusters), dtype=torch.float32),
    )
    if means.bias.numel():
        width = block_dim(dim, value_dim)
        sizes = pick([_SIZES])
        _hyper_mean_kernel[grid_of(clusters, batch, kv_heads)](
            key, value, index.order.contiguous(), index.starts.contiguous(),
            index.counts.contiguous(), *means,
            *key.stride()[:3], *value.stride()[:3], kv_heads, clusters, index.order.shape[2],
            DIM=dim, VALUE_DIM=value_dim, BLOCK_N=sizes.block_n, BLOCK_D=width, BLOCK_DV=width,
            UPCAST=upcasts(key.dtype, interpreting()), num_warps=1,
        )  # fmt: skip
    return means
