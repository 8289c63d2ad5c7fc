"""The delta rule of segments: M_{s+1} = M_s - P_s M_s + B_s, and what its backward needs.

P_s = F^T diag(1 / F z_s) F with F = sigma(K_s); B_s and z come from sums.py and scan.py. With
E = dM_{s+1}, summed backwards by the same scan (P is symmetric), and W = M_s E^T + E M_s^T, a row f has
dden = f W f^T / 2 den^2, dz_s = sum dden f, and dsigma(k) = v E^T - f W / den + dden z_s + dz_{s+1};
sums.py writes the last, and dv = f E.

dtypes float16 and bfloat16 (float32 where interpreted); head dims up to 128; sm_80 and later;
deterministic: one program owns a segment of a key head, or some columns of its memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import KernelConfig, interpreting, pick
from .configs import affine_config, major_of, maps_config, turns_config
from .scan import scan_states
from .sums import Delta, key_constants, segment_sums, segment_sums_backward
from .tiles import (
    block_dim,
    dot_halves,
    full_grid,
    halves,
    high_half,
    kernel_input,
    load_rows,
    phi,
    store_rows,
    sum_rows,
)

__all__ = ["affine_scan", "delta_states", "delta_states_backward", "segment_maps", "segment_turns"]


@triton.jit(do_not_specialize=["n_k", "segments"])
def _infini_maps_kernel(
    k_ptr, lengths_ptr, z_ptr, p_ptr, stride_kb, stride_kh, stride_kn,
    heads, n_k, segments, length,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """P of one segment of one key head."""
    s = (tl.program_id(0) % segments).to(tl.int64)
    b = (tl.program_id(0) // segments // heads).to(tl.int64)
    h = (tl.program_id(0) // segments % heads).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    k_ptr += b * stride_kb + h * stride_kh + s * length * stride_kn
    end = n_k
    if HAS_LENGTHS:
        end = tl.minimum(end, tl.load(lengths_ptr + b))
    rows_here = tl.minimum(end - s * length, length).to(tl.int32)
    slot = (b * heads + h) * (segments + 1) + s
    z = tl.load(z_ptr + slot * DIM + cols, mask=cols < DIM, other=0.0)
    acc = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for start in range(0, rows_here, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        inside = rows < rows_here
        k = load_rows(k_ptr, stride_kn, rows, inside, cols, DIM, UPCAST)
        f = phi(k, inside, cols, DIM)
        den = tl.sum(f * z[None, :], 1)
        inverse = tl.where(den > 0, 1.0 / tl.where(den > 0, den, 1.0), 0.0)
        high, low = halves(f, HALF)
        g_high, g_low = halves(f * inverse[:, None], HALF)
        acc = dot_halves(tl.trans(high), tl.trans(low), g_high, g_low, acc, HALF, True, True)
    p_ptr += ((b * heads + h) * segments + s) * DIM * DIM
    store_rows(p_ptr, DIM, cols, cols < DIM, cols, acc, DIM)


@triton.jit(do_not_specialize=["segments"])
def _infini_affine_kernel(
    x_ptr, p_ptr, segments,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    REVERSE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """x[s + 1] += x[s] - P[s] x[s], or x[s] += x[s + 1] - P[s] x[s + 1] (P is symmetric), for BLOCK_V columns."""
    chunks = tl.cdiv(VALUE_DIM, BLOCK_V)
    g = (tl.program_id(0) // chunks).to(tl.int64)
    cols = tl.program_id(0) % chunks * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = tl.arange(0, BLOCK_D)
    x_ptr += g * (segments + 1) * DIM * VALUE_DIM + rows[:, None] * VALUE_DIM + cols[None, :]
    p_ptr += g * segments * DIM * DIM
    inside = (rows < DIM)[:, None] & (cols < VALUE_DIM)[None, :]
    step = 1
    if REVERSE:
        step = -1
        x_ptr += (g * 0 + segments) * DIM * VALUE_DIM
        p_ptr += (g * 0 + segments - 1) * DIM * DIM
    state = tl.load(x_ptr, mask=inside, other=0.0)
    for _ in range(0, segments):
        x_ptr += step * DIM * VALUE_DIM
        p = load_rows(p_ptr, DIM, rows, rows < DIM, rows, DIM, False)
        p_ptr += step * DIM * DIM
        added = tl.load(x_ptr, mask=inside, other=0.0)
        p_high, p_low = halves(-p, HALF)
        high, low = halves(state, HALF)
        state = dot_halves(p_high, p_low, high, low, state + added, HALF, True, True)
        tl.store(x_ptr, state, mask=inside)


@triton.jit(do_not_specialize=["n_k", "segments"])
def _infini_turns_kernel(
    k_ptr, lengths_ptr, z_ptr, w_ptr, dz_ptr, stride_kb, stride_kh, stride_kn,
    heads, n_k, segments, length,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, APART: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dz through the denominators of one segment of one key head: sum dden f."""
    s = (tl.program_id(0) % segments).to(tl.int64)
    b = (tl.program_id(0) // segments // heads).to(tl.int64)
    h = (tl.program_id(0) // segments % heads).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    k_ptr += b * stride_kb + h * stride_kh + s * length * stride_kn
    end = n_k
    if HAS_LENGTHS:
        end = tl.minimum(end, tl.load(lengths_ptr + b))
    rows_here = tl.minimum(end - s * length, length).to(tl.int32)
    slot = (b * heads + h) * (segments + 1) + s
    z = tl.load(z_ptr + slot * DIM + cols, mask=cols < DIM, other=0.0)
    at = (b * heads + h) * segments + s
    w = load_rows(w_ptr + at * DIM * DIM, DIM, cols, cols < DIM, cols, DIM, False)
    w_high, w_low = halves(w, HALF)
    total = tl.zeros([APART, BLOCK_D], tl.float32)
    for start in range(0, rows_here, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        inside = rows < rows_here
        k = load_rows(k_ptr, stride_kn, rows, inside, cols, DIM, UPCAST)
        f = phi(k, inside, cols, DIM)
        den = tl.sum(f * z[None, :], 1)
        inverse = tl.where(den > 0, 1.0 / tl.where(den > 0, den, 1.0), 0.0)
        high = high_half(f, HALF)
        fw = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        fw = dot_halves(high, high, w_high, w_low, fw, HALF, False, True)
        dden = 0.5 * tl.sum(fw * f, 1) * inverse * inverse
        total += sum_rows(f * dden[:, None], APART)
    tl.store(dz_ptr + at * DIM + cols, tl.sum(total, 0), mask=cols < DIM)


def segment_maps(
    key: Tensor, totals: Tensor, key_lengths: Tensor | None, length: int, segments: int,
    kernel: KernelConfig | None = None,
) -> Tensor:  # fmt: skip
    """P (B, H_kv, S, D, D) float32, of states' normalisers (B, H_kv, S + 1, D)."""
    key = kernel_input(key)
    batch, heads, n_k, dim = key.shape
    maps = totals.new_empty((batch, heads, segments, dim, dim))
    if maps.numel() == 0:
        return maps
    sizes = kernel or pick([maps_config(dim, major_of(key.device))])
    constants = key_constants(key, key_lengths, sizes)
    del constants["APART"]
    _infini_maps_kernel[full_grid(batch * heads * segments)](
        key, key_lengths, totals, maps, *key.stride()[:3], heads, n_k, segments, length,
        **constants, **sizes.options(),
    )  # fmt: skip
    return maps


def affine_scan(
    states: Tensor, maps: Tensor, reverse: bool = False, kernel: KernelConfig | None = None
) -> Tensor:
    """States (B, H_kv, S + 1, D, D_v) from what segments add, in place; returns them."""
    batch, heads, slots, dim, value_dim = states.shape
    if states.numel() == 0 or slots == 1:
        return states
    sizes = kernel or pick([affine_config(dim, major_of(states.device))])
    chunks = triton.cdiv(value_dim, sizes.block_n)
    _infini_affine_kernel[full_grid(batch * heads * chunks)](
        states, maps, slots - 1, DIM=dim, VALUE_DIM=value_dim, BLOCK_D=block_dim(dim),
        BLOCK_V=sizes.block_n, REVERSE=reverse, HALF=not interpreting(), **sizes.options(),
    )  # fmt: skip
    return states


def segment_turns(
    key: Tensor, totals: Tensor, weights: Tensor, key_lengths: Tensor | None, length: int,
    kernel: KernelConfig | None = None,
) -> Tensor:  # fmt: skip
    """Gradient (B, H_kv, S, D) of the normaliser before each segment, by its denominators."""
    key = kernel_input(key)
    batch, heads, n_k, dim = key.shape
    segments = weights.shape[2]
    turns = totals.new_empty((batch, heads, segments, dim))
    if turns.numel() == 0:
        return turns
    sizes = kernel or pick([turns_config(dim, major_of(key.device))])
    _infini_turns_kernel[full_grid(batch * heads * segments)](
        key, key_lengths, totals, weights, turns, *key.stride()[:3], heads, n_k, segments, length,
        **key_constants(key, key_lengths, sizes), **sizes.options(),
    )  # fmt: skip
    return turns


def delta_states(
    key: Tensor, value: Tensor, memory: Tensor, normaliser: Tensor, key_lengths: Tensor | None,
    length: int, segments: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """States and normalisers before each segment, and P of each."""
    states, totals = segment_sums(key, value, key_lengths, length, segments)
    states[:, :, 0], totals[:, :, 0] = memory, normaliser
    scan_states(totals)
    maps = segment_maps(key, totals, key_lengths, length, segments)
    return affine_scan(states, maps), totals, maps


def delta_states_backward(
    grad_states: Tensor, grad_totals: Tensor, key: Tensor, value: Tensor,
    key_lengths: Tensor | None, states: Tensor, totals: Tensor, maps: Tensor, length: int,
    more_key: Tensor | None, more_value: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of key, value, memory and normaliser."""
    segments = maps.shape[2]
    form = torch.contiguous_format
    upper = affine_scan(grad_states.clone(memory_format=form), maps, reverse=True)
    weights = states[:, :, :segments] @ upper[:, :, 1:].transpose(-1, -2)
    weights = weights + weights.transpose(-1, -2)
    below = grad_totals.clone(memory_format=form)
    below[:, :, :segments] += segment_turns(key, totals, weights, key_lengths, length)
    scan_states(below, reverse=True)
    dk, dv = segment_sums_backward(
        upper, below, key, value, key_lengths, length, segments, more_key=more_key,
        more_value=more_value, delta=Delta(totals, weights),
    )  # fmt: skip
    return dk, dv, upper[:, :, 0].clone(), below[:, :, 0].clone()
