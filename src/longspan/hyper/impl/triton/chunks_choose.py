"""Each query's choice of clusters, row by row: the best by

    scale * q . mean_key + log(count) + probe_spread * |scale| * sqrt(sum_d q_d^2 variance_d)

A program holds BLOCK_M queries and streams over the mean keys of their far clusters, the nearest
first. A cluster enters the list of a row if it beats the least of the list; since few do after the
first tiles, the loop over entering clusters is short. In the scores that compete the low bits of
the mantissa name the column inside of the tile, so that a maximum also says which one it is: scores
that differ by less than 2**-16 (relative) count as equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import KernelConfig, interpreting, pick
from ...._validation import Call
from ...config import HyperConfig
from .chunks_configs import chunks_config
from .chunks_means import Means
from .configs import shared_class
from .tiles import LOG2E, block_dim, grid_of, load_rows, upcasts

__all__ = ["far_rows", "triton_choose"]

_NONE = tl.constexpr(-1.0e30)  # less than any score; -inf would not survive the column's bits
_MOST = tl.constexpr(3.0e38)


@triton.jit
def far_rows(p, full, window, CHUNK: tl.constexpr):
    """Chunks wholly before the windows of the queries at key indices p (`geometry.far_before`)."""
    return tl.minimum(tl.maximum(p - window + 1, 0) // CHUNK, full)


@triton.jit
def _choose_step(
    top, names, q, square, mean_ptr, var_ptr, bias_ptr, start, end, limit, offs_n, offs_d, offs_p,
    scale, spread,
    SPREAD: tl.constexpr, DIM: tl.constexpr, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Let the clusters start .. start + BLOCK_N compete; where MASKED, those before `limit`."""
    mean = load_rows(mean_ptr, DIM, start, end, offs_n, offs_d, DIM, BLOCK_D, MASKED, UPCAST)
    bias = tl.load(bias_ptr + start + offs_n, mask=start + offs_n < end, other=0.0)
    s = tl.dot(q, tl.trans(mean), input_precision="ieee") * scale + bias[None, :]
    if SPREAD:
        var = load_rows(var_ptr, DIM, start, end, offs_n, offs_d, DIM, BLOCK_D, MASKED, UPCAST)
        s += tl.sqrt(tl.dot(square, tl.trans(var), input_precision="ieee")) * spread
    if MASKED:
        s = tl.where((start + offs_n)[None, :] < limit[:, None], s, _NONE)
    s = tl.minimum(tl.maximum(s, _NONE), _MOST)
    bits = s.to(tl.int32, bitcast=True) & (-BLOCK_N) | offs_n[None, :]
    s = bits.to(tl.float32, bitcast=True)
    best = tl.max(s, 1)
    least = tl.min(top, 1)
    enters = (best > least) & (best > 0.5 * _NONE)
    more = tl.max(enters.to(tl.int32), 0)
    while more > 0:
        place = tl.min(tl.where(top == least[:, None], offs_p[None, :], SLOTS), 1)
        taken = enters[:, None] & (offs_p[None, :] == place[:, None])
        name = start + (best.to(tl.int32, bitcast=True) & (BLOCK_N - 1))
        top = tl.where(taken, best[:, None], top)
        names = tl.where(taken, name[:, None], names)
        s = tl.where(s == best[:, None], _NONE, s)
        best = tl.max(s, 1)
        least = tl.min(top, 1)
        enters = (best > least) & (best > 0.5 * _NONE)
        more = tl.max(enters.to(tl.int32), 0)
    return top, names


@triton.jit(do_not_specialize=["n_q", "tiles", "clusters", "query_offset", "full", "window"])
def _hyper_choose_kernel(
    q_ptr, mean_k_ptr, var_ptr, bias_ptr, chosen_ptr, stride_qb, stride_qh, stride_qn,
    scale, spread, heads, n_q, tiles, clusters, query_offset, full, window,
    GROUP: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
    SPREAD: tl.constexpr, PER_CHUNK: tl.constexpr, PROBES: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """chosen (B, H, N_q, PROBES), contiguous, of BLOCK_M queries; SLOTS: power of two."""
    entry = tiles - 1 - tl.program_id(0) % tiles  # longest first
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    kv = b * (heads // GROUP) + h // GROUP
    q_ptr += b * stride_qb + h * stride_qh
    mean_k_ptr += kv * clusters * DIM
    if SPREAD:
        var_ptr += kv * clusters * DIM
    bias_ptr += kv * clusters
    start_m = entry * BLOCK_M
    end_m = tl.minimum(start_m + BLOCK_M, n_q)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_p = tl.arange(0, SLOTS)
    q = load_rows(q_ptr, stride_qn, start_m, end_m, offs_m, offs_d, DIM, BLOCK_D, True, UPCAST)
    square = q
    if SPREAD:
        wide = q.to(tl.float32)
        square = (wide * wide).to(var_ptr.dtype.element_ty)
        if UPCAST:
            square = square.to(tl.float32)
    limit = far_rows(start_m + offs_m + query_offset, full, window, CHUNK) * PER_CHUNK
    first = far_rows(start_m + query_offset, full, window, CHUNK) * PER_CHUNK
    last = far_rows(end_m - 1 + query_offset, full, window, CHUNK) * PER_CHUNK
    # Slots beyond PROBES are never the least; the others begin empty.
    empty = tl.where(offs_p < PROBES, 2.0 * _NONE, float("inf"))
    top = tl.zeros([BLOCK_M, SLOTS], tl.float32) + empty[None, :]
    names = tl.full([BLOCK_M, SLOTS], -1, tl.int32)

    whole = first // BLOCK_N * BLOCK_N
    for start in range(whole, last, BLOCK_N):
        top, names = _choose_step(
            top, names, q, square, mean_k_ptr, var_ptr, bias_ptr, start, last, limit, offs_n,
            offs_d, offs_p, scale * LOG2E, spread * LOG2E, SPREAD, DIM, SLOTS, BLOCK_N, BLOCK_D, True, UPCAST)  # fmt: skip
    for back in range(BLOCK_N, whole + 1, BLOCK_N):
        top, names = _choose_step(
            top, names, q, square, mean_k_ptr, var_ptr, bias_ptr, whole - back, last, limit, offs_n,
            offs_d, offs_p, scale * LOG2E, spread * LOG2E, SPREAD, DIM, SLOTS, BLOCK_N, BLOCK_D, False, UPCAST)  # fmt: skip
    rows = bh * n_q + start_m + offs_m
    mask = (start_m + offs_m < end_m)[:, None] & (offs_p < PROBES)[None, :]
    tl.store(chosen_ptr + rows[:, None] * PROBES + offs_p[None, :], names, mask=mask)


def triton_choose(
    call: Call,
    config: HyperConfig,
    means: Means,
    variance: Tensor,
    sizes: KernelConfig | None = None,
) -> Tensor:
    """As `impl.common.choose`, in any order; mean keys are rounded to the dtype of the call.

    variance is that of the index; it and the squares of the query are rounded to bfloat16, unless
    the call is in float32.
    """
    query = call.query
    batch, heads, n_q, dim = query.shape
    kv_heads, clusters = means.bias.shape[1:]
    probes = min(config.num_probes, clusters)
    chosen = torch.empty((batch, heads, n_q, probes), dtype=torch.int32, device=query.device)
    if chosen.numel() == 0:
        return chosen
    shared = shared_class(query.device)
    sizes = sizes or pick([chunks_config("choose", dim, dim, query.dtype, shared)])
    tiles = triton.cdiv(n_q, sizes.block_m)
    if config.probe_spread:
        narrow = torch.float32 if query.dtype is torch.float32 else torch.bfloat16
        variance = torch.nn.functional.pad(variance.to(narrow), (0, dim - variance.shape[-1]))
        variance = variance.contiguous()
    _hyper_choose_kernel[grid_of(tiles, batch, heads)](
        query, means.key, variance if config.probe_spread else None, means.bias, chosen,
        *query.stride()[:3], call.scale, config.probe_spread * abs(call.scale), heads, n_q, tiles,
        clusters, call.query_offset, call.key.shape[2] // config.chunk_size, config.window,
        GROUP=heads // kv_heads, DIM=dim, CHUNK=config.chunk_size,
        SPREAD=config.probe_spread > 0, PER_CHUNK=config.clusters_per_chunk, PROBES=probes,
        SLOTS=max(16, triton.next_power_of_2(probes)), BLOCK_M=sizes.block_m,
        BLOCK_N=sizes.block_n, BLOCK_D=block_dim(dim), UPCAST=upcasts(query.dtype, interpreting()),
        **sizes.options(),
    )  # fmt: skip
    return chosen
