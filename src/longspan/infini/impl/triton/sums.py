"""What each segment adds to the memory, sigma(K)^T V and the sum of sigma(K), and its backward.

One program per segment of a key head. dtypes float16 and bfloat16 (float32 where
interpreted); head dims up to 128; sm_80 and later; sums in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import KernelConfig, interpreting, pick
from .configs import delta_bwd_config, major_of, sums_bwd_config, sums_config
from .tiles import (
    block_dim,
    dot_halves,
    full_grid,
    halves,
    kernel_input,
    load_rows,
    phi,
    rows_apart,
    store_rows,
    sum_rows,
    upcasts,
)

__all__ = ["Delta", "key_constants", "segment_sums", "segment_sums_backward"]


class Delta(NamedTuple):
    """What the backward of the delta rule needs besides: see delta.py."""

    normaliser: Tensor  # (B, H_kv, S + 1, D), before each segment
    weights: Tensor  # (B, H_kv, S, D, D), W


@triton.jit(do_not_specialize=["n_k", "segments"])
def _infini_sums_kernel(
    k_ptr, v_ptr, lengths_ptr, m_ptr, z_ptr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    heads, n_k, segments, length,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, APART: tl.constexpr, HAS_LENGTHS: tl.constexpr, HALF: tl.constexpr,
    LOW_V: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """m[b, h, s + 1] = sigma(K_s)^T V_s, z[b, h, s + 1] = sum sigma(k)."""
    s = (tl.program_id(0) % segments).to(tl.int64)
    b = (tl.program_id(0) // segments // heads).to(tl.int64)
    h = (tl.program_id(0) // segments % heads).to(tl.int64)
    cols_d, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k_ptr += b * stride_kb + h * stride_kh + s * length * stride_kn
    v_ptr += b * stride_vb + h * stride_vh + s * length * stride_vn
    end = n_k
    if HAS_LENGTHS:
        end = tl.minimum(end, tl.load(lengths_ptr + b))
    rows_here = tl.minimum(end - s * length, length).to(tl.int32)
    acc = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    total = tl.zeros([APART, BLOCK_D], tl.float32)
    for start in range(0, rows_here, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        inside = rows < rows_here
        k = load_rows(k_ptr, stride_kn, rows, inside, cols_d, DIM, UPCAST)
        v = load_rows(v_ptr, stride_vn, rows, inside, cols_v, VALUE_DIM, UPCAST)
        f = phi(k, inside, cols_d, DIM)
        total += sum_rows(f, APART)
        high, low = halves(f, HALF)
        if LOW_V:
            v_high, v_low = halves(v.to(tl.float32), HALF)
        else:
            v_high, v_low = v, v
        acc = dot_halves(tl.trans(high), tl.trans(low), v_high, v_low, acc, HALF, True, LOW_V)
    slot = (b * heads + h) * (segments + 1) + s + 1
    inside_d = cols_d < DIM
    store_rows(m_ptr + slot * DIM * VALUE_DIM, VALUE_DIM, cols_d, inside_d, cols_v, acc, VALUE_DIM)
    tl.store(z_ptr + slot * DIM + cols_d, tl.sum(total, 0), mask=inside_d)


@triton.jit(do_not_specialize=["n_k", "segments", "runs"])
def _infini_sums_bwd_kernel(
    k_ptr, v_ptr, lengths_ptr, dm_ptr, dz_ptr, z_ptr, weights_ptr, more_k_ptr, more_v_ptr,
    dk_ptr, dv_ptr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_mkb, stride_mkh, stride_mkn, stride_mvb, stride_mvh, stride_mvn,
    heads, n_k, segments, runs, length,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, TILES: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    MORE_K: tl.constexpr, MORE_V: tl.constexpr, DELTA: tl.constexpr, LOW_W: tl.constexpr,
    HALF: tl.constexpr, LOW_V: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dsigma(K) = V dB^T + db, dV = sigma(K) dB, with dB the gradient of what the segment adds.

    TILES tiles of a segment. MORE_K, MORE_V: other gradients of the same keys and values are added.
    DELTA: also what the delta rule subtracts, as delta.py explains; LOW_W: with both halves of W,
    which an A100 has no room for.
    """
    run = tl.program_id(0) % runs
    s = (tl.program_id(0) // runs % segments).to(tl.int64)
    b = (tl.program_id(0) // runs // segments // heads).to(tl.int64)
    h = (tl.program_id(0) // runs // segments % heads).to(tl.int64)
    cols_d, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k_ptr += b * stride_kb + h * stride_kh + s * length * stride_kn
    v_ptr += b * stride_vb + h * stride_vh + s * length * stride_vn
    more_k_ptr += b * stride_mkb + h * stride_mkh + s * length * stride_mkn
    more_v_ptr += b * stride_mvb + h * stride_mvh + s * length * stride_mvn
    first = (b * heads + h) * n_k + s * length
    dk_ptr += first * DIM
    dv_ptr += first * VALUE_DIM
    end = n_k
    if HAS_LENGTHS:
        end = tl.minimum(end, tl.load(lengths_ptr + b))
    held = tl.minimum(n_k - s * length, length).to(tl.int32)
    rows_here = tl.minimum(end - s * length, length).to(tl.int32)
    slot = (b * heads + h) * (segments + 1) + s + 1
    inside_d = cols_d < DIM
    dm = load_rows(dm_ptr + slot * DIM * VALUE_DIM, VALUE_DIM, cols_d, inside_d, cols_v, VALUE_DIM,
                   False)  # fmt: skip
    m_high, m_low = halves(dm, HALF)
    dz = tl.load(dz_ptr + slot * DIM + cols_d, mask=inside_d, other=0.0)
    if DELTA:
        z = tl.load(z_ptr + (slot - 1) * DIM + cols_d, mask=inside_d, other=0.0)
        at = (b * heads + h) * segments + s
        weights = load_rows(weights_ptr + at * DIM * DIM, DIM, cols_d, inside_d, cols_d, DIM, False)
        w_high, w_low = halves(weights, HALF)
    begin = run * (BLOCK_N * TILES)
    for start in range(begin, tl.minimum(begin + BLOCK_N * TILES, held), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        inside = rows < rows_here
        exists = rows < held
        k = load_rows(k_ptr, stride_kn, rows, inside, cols_d, DIM, UPCAST)
        v = load_rows(v_ptr, stride_vn, rows, inside, cols_v, VALUE_DIM, UPCAST)
        f = phi(k, inside, cols_d, DIM)
        f_high, f_low = halves(f, HALF)
        if LOW_V:
            v_high, v_low = halves(v.to(tl.float32), HALF)
        else:
            v_high, v_low = v, v
        dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        # float16 is finer than bfloat16 and keeps both halves
        dv = dot_halves(f_high, f_low, m_high, m_low, dv, HALF, LOW_V, LOW_V)
        if MORE_V:
            dv += load_rows(more_v_ptr, stride_mvn, rows, exists, cols_v, VALUE_DIM,
                            UPCAST).to(tl.float32)  # fmt: skip
        store_rows(dv_ptr, VALUE_DIM, rows, exists, cols_v, dv, VALUE_DIM)
        # V dB^T and db nearly cancel: dB keeps both halves
        df = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        if DELTA:
            den = tl.sum(f * z[None, :], 1)
            inverse = tl.where(den > 0, 1.0 / tl.where(den > 0, den, 1.0), 0.0)
            df = dot_halves(f_high, f_low, w_high, w_low, df, HALF, False, LOW_W)
            dden = 0.5 * tl.sum(df * f, 1) * inverse * inverse
            df = dden[:, None] * z[None, :] - df * inverse[:, None]
        df = dot_halves(v_high, v_low, tl.trans(m_high), tl.trans(m_low), df, HALF, LOW_V, True)
        dk = (df + dz[None, :]) * tl.minimum(f, 1.0)  # f > 1 where k > 0; no row, no f
        if MORE_K:
            dk += load_rows(more_k_ptr, stride_mkn, rows, exists, cols_d, DIM,
                            UPCAST).to(tl.float32)  # fmt: skip
        store_rows(dk_ptr, DIM, rows, exists, cols_d, dk, DIM)


def segment_sums(
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    length: int,
    segments: int,
    kernel: KernelConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """(B, H_kv, S + 1, D, D_v) and (B, H_kv, S + 1, D), float32; slot s + 1 holds segment s.

    Slot 0 is not written: it is the place of the state before the first segment.
    """
    key, value = kernel_input(key), kernel_input(value)
    batch, heads, n_k, dim = key.shape
    value_dim = value.shape[-1]
    memory = key.new_empty((batch, heads, segments + 1, dim, value_dim), dtype=torch.float32)
    total = key.new_empty((batch, heads, segments + 1, dim), dtype=torch.float32)
    programs = batch * heads * segments
    if programs == 0:
        return memory, total
    sizes = kernel or pick([sums_config(dim, value_dim, key.dtype, major_of(key.device))])
    _infini_sums_kernel[full_grid(programs)](
        key, value, key_lengths, memory, total, *key.stride()[:3], *value.stride()[:3],
        heads, n_k, segments, length, **_constants(key, value, key_lengths, sizes),
        **sizes.options(),
    )  # fmt: skip
    return memory, total


def segment_sums_backward(
    grad_memory: Tensor,
    grad_total: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    length: int,
    segments: int,
    kernel: KernelConfig | None = None,
    more_key: Tensor | None = None,
    more_value: Tensor | None = None,
    delta: Delta | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of key and value, contiguous; zero past the last segment.

    delta: of the delta rule; the linear rule's without. more_key, more_value: other gradients of the same tensors, added in the same pass.
    """
    key, value = kernel_input(key), kernel_input(value)
    more_key = None if more_key is None else kernel_input(more_key)
    more_value = None if more_value is None else kernel_input(more_value)
    batch, heads, n_k, dim = key.shape
    value_dim = value.shape[-1]
    dk, dv = key.new_empty(key.shape), value.new_empty(value.shape)
    reached = min(segments * length, n_k)
    for grad, more in ((dk, more_key), (dv, more_value)):
        grad[:, :, reached:] = 0 if more is None else more[:, :, reached:]
    programs = batch * heads * segments
    if programs == 0:
        return dk, dv
    major = major_of(key.device)
    chosen = sums_bwd_config if delta is None else delta_bwd_config
    sizes = kernel or pick([chosen(dim, value_dim, key.dtype, major)])
    runs = triton.cdiv(length, sizes.block_n * sizes.block_m)
    constants = _constants(key, value, key_lengths, sizes)
    del constants["APART"]
    _infini_sums_bwd_kernel[full_grid(programs * runs)](
        key, value, key_lengths, grad_memory.contiguous(), grad_total.contiguous(),
        *((grad_total, grad_memory) if delta is None else delta),
        dk if more_key is None else more_key, dv if more_value is None else more_value, dk, dv,
        *key.stride()[:3], *value.stride()[:3],
        *(dk if more_key is None else more_key).stride()[:3],
        *(dv if more_value is None else more_value).stride()[:3],
        heads, n_k, segments, runs, length, TILES=sizes.block_m, MORE_K=more_key is not None,
        MORE_V=more_value is not None, DELTA=delta is not None,
        LOW_W=major >= 9, **constants, **sizes.options(),
    )  # fmt: skip
    return dk, dv


def key_constants(
    key: Tensor, key_lengths: Tensor | None, sizes: KernelConfig
) -> dict[str, int | bool]:
    """Compile-time arguments of kernels that read keys."""
    dim = key.shape[-1]
    upcast = upcasts(key.dtype, interpreting())
    return {
        "DIM": dim, "BLOCK_D": block_dim(dim), "BLOCK_N": sizes.block_n,
        "APART": rows_apart(sizes.block_n, block_dim(dim), sizes.num_warps),
        "HAS_LENGTHS": key_lengths is not None,
        "HALF": key.dtype is not torch.float32 and not upcast, "UPCAST": upcast,
    }  # fmt: skip


def _constants(
    key: Tensor, value: Tensor, key_lengths: Tensor | None, sizes: KernelConfig
) -> dict[str, int | bool]:
    value_dim = value.shape[-1]
    return {
        **key_constants(key, key_lengths, sizes), "VALUE_DIM": value_dim,
        "BLOCK_DV": block_dim(value_dim), "LOW_V": key.dtype is torch.float16,
    }  # fmt: skip
