"""The search for segment borders, one program for each head: no launch for each probe.

| | |
|---|---|
| dtypes | float16, bfloat16, float32 (products in float32) |
| head dim | 1 to 256; padded to a power of two |
| architectures | sm_80 and later |
| key_lengths, grouped heads, strides | yes |
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.interpreter import repair_interpreter
from ...._triton.launch import KernelConfig, interpreting, unit_last_stride
from ...config import ConvBasisConfig
from ..recover import exact_keys

__all__ = ["SIZES", "search_starts"]

SIZES = KernelConfig(0, 0, 4, 1)


@triton.jit
def _probe(
    q_ptr, k_ptr, stride_qn, stride_kn, column, n, near, scale,
    PROBES: tl.constexpr, DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of the rows column + near .. at the key `column`, 0 past the last row."""
    offs_t = tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    row = column + near + offs_t
    exists = (offs_t < PROBES) & (row < n)
    in_dim = offs_d < DIM
    k = tl.load(k_ptr + column.to(tl.int64) * stride_kn + offs_d, mask=in_dim, other=0.0)
    q = tl.load(
        q_ptr + row[:, None].to(tl.int64) * stride_qn + offs_d[None, :],
        mask=exists[:, None] & in_dim[None, :],
        other=0.0,
    )
    return tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale


@triton.jit(do_not_specialize=["n", "near", "num_sinks", "rounds"])
def _conv_basis_search_kernel(
    q_ptr, k_ptr, lengths_ptr, starts_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    n, near, num_sinks, rounds, heads, scale, each,
    GROUP: tl.constexpr, NUM_BASES: tl.constexpr, PROBES: tl.constexpr, DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    entry = program // heads
    head = program % heads
    q_ptr += entry.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    k_ptr += entry.to(tl.int64) * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    starts_ptr += program.to(tl.int64) * NUM_BASES
    limit = tl.load(lengths_ptr + entry).to(tl.int32)
    last = tl.where(num_sinks < limit, num_sinks, n)
    tl.store(starts_ptr, last.to(tl.int64))
    offs_t = tl.arange(0, BLOCK_T)
    for g in range(1, NUM_BASES):
        known = _probe(q_ptr, k_ptr, stride_qn, stride_kn, tl.minimum(last, n - 1), n, near, scale,
                       PROBES, DIM, BLOCK_T, BLOCK_D)  # fmt: skip
        low = tl.minimum(last + 1, limit)
        high = limit
        for _ in range(rounds):
            middle = (low + high) // 2
            column = tl.minimum(middle, n - 1)
            found = _probe(q_ptr, k_ptr, stride_qn, stride_kn, column, n, near, scale,
                           PROBES, DIM, BLOCK_T, BLOCK_D)  # fmt: skip
            count = tl.where(
                middle < limit, tl.minimum(tl.maximum(n - near - middle, 0), PROBES), 0
            )
            change = tl.sum(tl.where(offs_t < count, tl.abs(found - known), 0.0), 0)
            is_border = (change >= each * count) & (count > 0)
            searching = low < high
            high = tl.where(searching & is_border, middle, high)
            low = tl.where(searching & (is_border == 0), middle + 1, low)
        last = tl.where(low < limit, low, n)
        tl.store(starts_ptr + g, last.to(tl.int64))


def search_starts(
    query: Tensor, key: Tensor, lengths: Tensor, scale: float, config: ConvBasisConfig
) -> Tensor:
    """(B, H, num_bases) int64, as `impl.recover.recover_starts` with recover="binary"."""
    batch, heads, n, dim = query.shape
    query, key = unit_last_stride(query), unit_last_stride(key)
    starts = torch.empty((batch, heads, config.num_bases), dtype=torch.int64, device=query.device)
    if starts.numel() == 0 or n == 0:
        return starts.fill_(n)
    if interpreting():
        repair_interpreter()
    _conv_basis_search_kernel[(batch * heads,)](
        query, key, lengths, starts,
        *query.stride()[:3], *key.stride()[:3],
        n, exact_keys(config), config.num_sinks, max(math.ceil(math.log2(n + 1)), 1), heads, scale,
        config.threshold / config.probe_length - 2 * config.noise,
        GROUP=heads // key.shape[1], NUM_BASES=config.num_bases, PROBES=config.probe_length,
        DIM=dim, BLOCK_T=triton.next_power_of_2(config.probe_length),
        BLOCK_D=triton.next_power_of_2(dim), num_warps=SIZES.num_warps,
        num_stages=SIZES.num_stages,
    )  # fmt: skip
    return starts
