"""The blocked engine for half precision values: float16 spectra on tensor cores, fused.

| | |
|---|---|
| dtypes | values float16, bfloat16; log-kernels float32 |
| value dim | 1 to 128; padded to a power of two |
| architectures | sm_80 and later |
| causal, N_q = N_k, no query offset; grouped heads, strides | yes |

Blocks of rows see their own block of keys and the one before weight by weight, as flash attention
does, and all earlier ones through spectra in float16 with float32 sums. Denominators stay in
float32. Nothing but V, its spectra, those of the rows and the output crosses memory.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...._triton.interpreter import repair_interpreter
from ...._triton.launch import interpreting, triton_refusal, unit_last_stride
from ..layout import Layout, Runs, make_layout, make_runs
from .back import PAIR_TILE, SUM_TILE, group_sum_kernel, pair_kernel
from .keys import BACK_ROW_TILE, key_kernel
from .mix import MIX_TILE, mix_kernel
from .rows import ROW_TILE, row_kernel
from .spectra import (
    KERNEL_TILE,
    VALUE_TILE,
    kernel_spectra_kernel,
    transform,
    value_spectra_kernel,
)
from .upstream import UPSTREAM_TILE, upstream_kernel
from .weights import WEIGHT_TILE, weight_kernel

__all__ = [
    "BACK_ROW_TILE",
    "BLOCK",
    "MIN_LENGTH",
    "PAIR_TILE",
    "SUM_TILE",
    "UPSTREAM_TILE",
    "Spectra",
    "group_sum_kernel",
    "half_forward",
    "key_kernel",
    "make_spectra",
    "mix",
    "padded",
    "pair_kernel",
    "problems_at_once",
    "takes",
    "transposed",
    "upstream_kernel",
]

BLOCK = 256
MIN_LENGTH = 2048  # below it float32 is as fast
_WORK_BYTES = 8 * 2**30
_NOISE = 0.25


class Spectra(NamedTuple):
    """What one chunk of R problems holds between its kernels."""

    layout: Layout
    runs: Runs
    block: Tensor  # (R, U) int32
    group: Tensor  # (R, U) int32
    kernel: Tensor  # (R, 2 B, G, P) float32
    factor: Tensor  # (R, A, U): exp(scale of piece and run - top); 0 within two blocks
    top: Tensor  # (R, A)
    value: Tensor  # (R, U, 2 B, C) float16
    value_scale: Tensor  # (R, U): largest |weight * value|
    far_scale: Tensor  # (R, A): largest factor * value_scale
    unit: Tensor  # (R, A): largest |value| in the two near blocks
    weight: Tensor  # (R, U, B): exp(beta - scale of the run)
    noise: Tensor  # (R, A): estimated rounding error of a denominator in units of exp(top)
    log_pair: Tensor  # (R, A, U): log-scale of piece and run, -inf after the row block
    scale: Tensor  # (R, G, P): of the pieces
    starts: Tensor  # (R, G)


def takes(
    log_kernel: Tensor, value: Tensor, n_q: int, is_causal: bool, query_offset: int, block: int
) -> bool:
    """Whether `half_forward` computes this problem."""
    return (
        value.dtype in (torch.float16, torch.bfloat16)
        and log_kernel.dtype is not torch.float64
        and is_causal
        and query_offset == 0
        and block in (0, BLOCK)
        and n_q == value.shape[2] >= MIN_LENGTH
        and value.shape[-1] <= 128
        and triton_refusal(value) is None
    )


def half_forward(
    log_kernel: Tensor, starts: Tensor, key_offset: Tensor | None, value: Tensor,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output (R, N, D_v) in the dtype of `value`, lse (R, N) float32, noise-to-signal (R, A).

    log_kernel (R, G, L) float32 and starts (R, G) int64, the first 0; key_offset (R, N) float32;
    value (B, H_kv, N, D_v), R = B H; hidden (B, N) bool: rows that see no key (-inf in kernels
    leaves rounding errors there). No device synchronisation.
    """
    if interpreting():
        repair_interpreter()
    value = unit_last_stride(value)
    count, n, dim = log_kernel.shape[0], value.shape[2], value.shape[3]
    output = value.new_empty((count, n, dim))
    lse = log_kernel.new_empty((count, n))
    blocks = -(-n // BLOCK)
    scale = log_kernel.new_empty((2, count, blocks))  # noise, and the log of its unit
    step = problems_at_once(log_kernel, value)
    for first in range(0, count, step):
        part = slice(first, min(first + step, count))
        offset = None if key_offset is None else key_offset[part].contiguous()
        _forward(log_kernel[part].contiguous(), starts[part].contiguous(), offset, value, hidden,
                 first, count, output[part], lse[part], scale[:, part])  # fmt: skip
    padded_lse = torch.nn.functional.pad(lse, (0, blocks * BLOCK - n), value=float("-inf"))
    least = padded_lse.view(count, blocks, BLOCK)
    least = torch.where(least == float("-inf"), float("inf"), least).amin(-1)
    noise, unit = scale
    return output, lse, torch.where(noise > 0, noise * torch.exp(unit - least), 0.0 * noise)


def problems_at_once(log_kernel: Tensor, value: Tensor, is_backward: bool = False) -> int:
    """How many problems fit into the work memory together."""
    n, channels = value.shape[2], padded(value.shape[-1])
    blocks = -(-n // BLOCK)
    runs = blocks + log_kernel.shape[1] - 1
    each = 2 * BLOCK * (2 * channels * (runs + blocks) + 4 * log_kernel.shape[1] * blocks)
    each += 16 * blocks * runs + 4 * BLOCK * blocks * (runs + 64)
    if is_backward:
        each = 2 * each + 8 * BLOCK * blocks * runs
    return max(1, _WORK_BYTES // max(each, 1))


def padded(dim: int) -> int:
    """Channels that the kernels work on."""
    return max(16, triton.next_power_of_2(dim))


def make_spectra(log_kernel: Tensor, starts: Tensor, key_offset: Tensor | None, value: Tensor,
                 first: int, count: int) -> Spectra:  # fmt: skip
    """Transforms of kernels and values, and the scales that join them."""
    rows, groups, length = log_kernel.shape
    n, dim = value.shape[2:]
    device, channels = value.device, padded(dim)
    layout = make_layout(BLOCK, n, n, True, 0, length)
    runs = make_runs(layout, starts)
    block, group = runs.block.to(torch.int32), runs.group.to(torch.int32)
    pieces, total = layout.row_blocks, block.shape[1]
    high, low, _ = transform(BLOCK, device)

    wide = pieces * BLOCK
    whole = log_kernel[..., :wide]
    if length < wide:
        whole = torch.nn.functional.pad(whole, (0, wide - length), value=float("-inf"))
    block_max = whole.reshape(rows, groups, pieces, BLOCK).amax(-1)
    before = torch.nn.functional.pad(block_max[..., :-1], (1, 0), value=float("-inf"))
    scale = torch.maximum(block_max, before)
    kernel = log_kernel.new_empty((rows, 2 * BLOCK, groups, pieces))
    norm = log_kernel.new_zeros((rows, groups, pieces))
    tile = KERNEL_TILE
    block_f, block_p = min(tile.block_m, 2 * BLOCK), tile.block_n
    grid = (rows * groups * triton.cdiv(pieces, block_p) * (2 * BLOCK // block_f),)
    kernel_spectra_kernel[grid](
        log_kernel, block_max, starts, high, low, kernel, norm, length, pieces, pieces, groups,
        BLOCK=BLOCK, BLOCK_F=block_f, BLOCK_P=block_p, BLOCK_K=min(64, BLOCK),
        **tile.options(),
    )  # fmt: skip

    spectra = torch.empty((rows, total, 2 * BLOCK, channels), dtype=torch.float16, device=device)
    weight = log_kernel.new_empty((rows, total, BLOCK))
    run_scale, value_scale, bound = (log_kernel.new_empty((rows, total)) for _ in range(3))
    tile = VALUE_TILE
    heads = count // value.shape[0]
    value_spectra_kernel[(rows * total,)](
        value, log_kernel if key_offset is None else key_offset, high, block, runs.start, runs.end,
        spectra, weight, run_scale, value_scale, bound, *value.stride()[:3], n, total, heads, first,
        GROUP=heads // value.shape[1], DIM=dim, BLOCK=BLOCK, BLOCK_C=channels,
        BLOCK_F=min(tile.block_m, 2 * BLOCK), HAS_OFFSET=key_offset is not None,
        **tile.options(),
    )  # fmt: skip

    piece = torch.arange(pieces, device=device).unsqueeze(-1) - runs.block.unsqueeze(1)
    pair = runs.group.unsqueeze(1) * pieces + piece.clamp(min=0)  # (R, A, U)
    log_pair = torch.gather(scale.flatten(1), 1, pair.flatten(1)).view(pair.shape)
    log_pair = torch.where(piece >= 0, log_pair + run_scale.unsqueeze(1), float("-inf"))
    far = torch.where(piece >= 2, log_pair, float("-inf"))
    top = far.amax(-1)
    factor = torch.exp(far - torch.where(top == float("-inf"), 0.0, top).unsqueeze(-1))
    norms = torch.gather(norm.flatten(1), 1, pair.flatten(1)).view(pair.shape)
    noise = (factor * norms * weight.square().sum(-1).sqrt().unsqueeze(1)).sum(-1)
    far_scale = (factor * value_scale.unsqueeze(1)).amax(-1)
    far_scale = torch.where(far_scale > 0, far_scale, 1.0)
    unit = torch.zeros_like(far_scale).scatter_reduce_(1, runs.block, bound, "amax")
    unit = torch.maximum(unit, torch.nn.functional.pad(unit[:, :-1], (1, 0)))
    unit = torch.where(unit > 0, torch.maximum(unit, 1e-30 * far_scale), far_scale)
    noise *= _NOISE * torch.finfo(torch.float16).eps
    return Spectra(layout, runs, block, group, kernel, factor, top, spectra, value_scale,
                   far_scale, unit, weight, noise, log_pair, scale, starts)  # fmt: skip


def _forward(log_kernel: Tensor, starts: Tensor, key_offset: Tensor | None, value: Tensor,
             hidden: Tensor | None, first: int, count: int, output: Tensor, lse: Tensor,
             scale: Tensor) -> None:  # fmt: skip
    spectra = make_spectra(log_kernel, starts, key_offset, value, first, count)
    rows, groups, length = log_kernel.shape
    n, dim = value.shape[2:]
    device, channels = value.device, padded(dim)
    blocks, total = spectra.layout.row_blocks, spectra.block.shape[1]
    _, _, matrix = transform(BLOCK, device)
    # (R, 2 B, U): frequency first, as the products read it
    weight_hat = (matrix[:, :BLOCK] @ spectra.weight.mT).contiguous()
    store_scale = 8.0 / triton.next_power_of_2(max(total, 8))  # sums over runs stay in range
    mixed, far_hat = mix(spectra, spectra.factor, spectra.value, spectra.value_scale,
                         spectra.far_scale, weight_hat, store_scale, False)  # fmt: skip
    far = (far_hat @ (matrix[:, BLOCK:] / BLOCK)).clamp_(min=0.0)  # (R, A, B)
    begin = torch.arange(n, device=device, dtype=torch.int64).expand(rows, -1).contiguous()
    of_key = (torch.searchsorted(starts, begin, right=True) - 1).clamp_(min=0).to(torch.int32)
    tile = ROW_TILE
    block_m = min(tile.block_m, BLOCK)
    heads = count // value.shape[0]
    far_value = transposed(BLOCK, device)[BLOCK:] @ mixed.flatten(0, 1)  # (R A, B, C) float16
    row_kernel[(rows * blocks * (BLOCK // block_m),)](
        far_value, far, spectra.top, spectra.far_scale, spectra.unit, log_kernel,
        log_kernel if key_offset is None else key_offset, of_key,
        of_key if hidden is None else hidden.contiguous().view(torch.uint8), value, output, lse,
        *value.stride()[:3], n, blocks, length, heads, groups, first, 1.0 / store_scale,
        GROUP=heads // value.shape[1], DIM=dim, BLOCK=BLOCK, BLOCK_C=channels, BLOCK_M=block_m,
        BLOCK_N=min(tile.block_n, BLOCK), HAS_OFFSET=key_offset is not None,
        HAS_HIDDEN=hidden is not None, **tile.options(),
    )  # fmt: skip
    torch.stack((spectra.noise, spectra.top), out=scale)


def mix(spectra: Spectra, factor: Tensor, source: Tensor, in_scale: Tensor, out_scale: Tensor,
        vector: Tensor, store_scale: float, is_back: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Spectra (R, outputs, 2 B, C) float16 of row blocks from runs, or of runs from row blocks.

    And the product with `vector` (R, 2 B, inputs), (R, outputs, 2 B), in float32.
    """
    rows, _, groups, pieces = spectra.kernel.shape
    blocks, total = spectra.layout.row_blocks, spectra.block.shape[1]
    outputs, inputs = (total, blocks) if is_back else (blocks, total)
    tile = MIX_TILE
    width = triton.cdiv(inputs, max(tile.block_n, 16)) * max(tile.block_n, 16)
    half = {"dtype": torch.float16, "device": source.device}
    weight = torch.empty((rows, BLOCK, 2, outputs, width), **half)
    result = torch.empty((rows, outputs, 2 * BLOCK, source.shape[-1]), **half)
    sums = factor.new_empty((rows, outputs, 2 * BLOCK))
    small = min(WEIGHT_TILE.block_m, tile.block_m)
    weight_kernel[(rows * BLOCK * triton.cdiv(outputs, small),)](
        spectra.kernel, factor, in_scale, out_scale, vector, spectra.block, spectra.group, weight,
        sums, total, blocks, pieces, total - blocks, groups, outputs, inputs, width, BLOCK=BLOCK,
        BLOCK_O=small, BLOCK_K=tile.block_n, BLOCK_T=tile.block_m, IS_BACK=is_back,
        **WEIGHT_TILE.options(),
    )  # fmt: skip
    mix_kernel[(rows * BLOCK * triton.cdiv(outputs, tile.block_m),)](
        weight, source, spectra.block, result, blocks, total, total - blocks, outputs, inputs,
        width, store_scale, BLOCK=BLOCK, BLOCK_C=source.shape[-1], BLOCK_O=tile.block_m,
        BLOCK_K=tile.block_n, IS_BACK=is_back, **tile.options(),
    )  # fmt: skip
    return result, sums


@functools.lru_cache(maxsize=8)
def transposed(block: int, device: torch.device) -> Tensor:
    """W (2 B, 2 B) in float16, one row for each place in time."""
    return transform(block, device)[0].T.contiguous()
