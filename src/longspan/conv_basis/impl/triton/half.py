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
from ...._triton.launch import (
    KernelConfig,
    capability,
    interpreting,
    triton_refusal,
    unit_last_stride,
)
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
from .tables import TABLE_TILE, table_kernel
from .upstream import UPSTREAM_TILE, upstream_kernel
from .weights import WEIGHT_TILE, weight_kernel

__all__ = [
    "AMPERE",
    "BACK_ROW_TILE",
    "BLOCK",
    "KERNEL_TILE",
    "MIN_LENGTH",
    "MIX_TILE",
    "PAIR_TILE",
    "SUM_TILE",
    "UPSTREAM_TILE",
    "Spectra",
    "block_of",
    "group_sum_kernel",
    "half_forward",
    "key_kernel",
    "make_spectra",
    "mix",
    "padded",
    "pair_kernel",
    "problems_at_once",
    "takes",
    "tile_of",
    "transposed",
    "upstream_kernel",
]

BLOCK: int | None = None  # None: by the length
_SHORT = 49152  # up to this many tokens blocks of 128, beyond it of 256
MIN_LENGTH = 2048  # below it float32 is as fast
AMPERE = {  # where the tiles for Hopper spill registers
    "KERNEL_TILE": KernelConfig(64, 32, 8, 1),
    "MIX_TILE": KernelConfig(64, 32, 8, 2),
}
_WORK_BYTES = 8 * 2**30
_NOISE = 0.25
ONE_PASS = (torch.bfloat16,)  # values whose near weights are multiplied in their own dtype


class Spectra(NamedTuple):
    """What one chunk of R problems holds between its kernels."""

    layout: Layout
    runs: Runs
    block: Tensor  # (R, U) int32
    group: Tensor  # (R, U) int32
    kernel: Tensor  # (R, 2 B, G, P) float32
    factor: Tensor  # (R, A, U): exp(scale of piece and run - top) for runs two blocks before
    top: Tensor  # (R, A): largest scale of a far run
    near_top: Tensor  # (R, A): of the near ones
    value: Tensor  # (R, U, 2 B, C) float16
    value_scale: Tensor  # (R, U): largest |weight * value|
    far_scale: Tensor  # (R, A): largest factor * value_scale
    unit: Tensor  # (R, A): largest |value| in the two near blocks
    weight: Tensor  # (R, U, B): exp(beta - scale of the run)
    noise: Tensor  # (R, A): estimated rounding error of a denominator in units of exp(top)
    log_pair: Tensor | None  # (R, A, U): log-scale of piece and run, -inf after the row block
    block_max: Tensor  # (R, G, P): largest log-weight of a block of lags
    starts: Tensor  # (R, G)
    of_key: Tensor  # (R, N) int32: the group of each key


def tile_of(name: str, device: torch.device) -> KernelConfig:
    """The tile `name` of this module, or Ampere's."""
    if name in AMPERE and device.type == "cuda" and capability(device.index or 0) < (9, 0):
        return AMPERE[name]
    tile: KernelConfig = globals()[name]
    return tile


def block_of(n: int) -> int:
    """Rows and keys of a block: short sequences have many blocks of few rows."""
    return BLOCK or (128 if n <= _SHORT else 256)


def takes(
    log_kernel: Tensor, value: Tensor, n_q: int, is_causal: bool, query_offset: int, block: int
) -> bool:
    """Whether `half_forward` computes this problem."""
    return (
        value.dtype in (torch.float16, torch.bfloat16)
        and log_kernel.dtype is not torch.float64
        and is_causal
        and query_offset == 0
        and block in (0, block_of(n_q))
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
    blocks = -(-n // block_of(n))
    scale = log_kernel.new_empty((3, count, blocks))  # noise, the log of its unit, least lse
    step = problems_at_once(log_kernel, value)
    for first in range(0, count, step):
        part = slice(first, min(first + step, count))
        offset = None if key_offset is None else key_offset[part].contiguous()
        _forward(log_kernel[part].contiguous(), starts[part].contiguous(), offset, value, hidden,
                 first, count, output[part], lse[part], scale[:, part])  # fmt: skip
    noise, unit, least = scale
    return output, lse, noise * torch.exp(unit - least)


def problems_at_once(log_kernel: Tensor, value: Tensor, is_backward: bool = False) -> int:
    """How many problems fit into the work memory together."""
    n, channels = value.shape[2], padded(value.shape[-1])
    size = block_of(n)
    blocks = -(-n // size)
    runs = blocks + log_kernel.shape[1] - 1
    each = 2 * size * (2 * channels * (runs + blocks) + 4 * log_kernel.shape[1] * blocks)
    each += 16 * blocks * runs + 4 * size * blocks * (runs + 64)
    if is_backward:
        each = 2 * each + 8 * size * blocks * runs
    return max(1, _WORK_BYTES // max(each, 1))


def padded(dim: int) -> int:
    """Channels that the kernels work on."""
    return max(16, triton.next_power_of_2(dim))


def make_spectra(log_kernel: Tensor, starts: Tensor, key_offset: Tensor | None, value: Tensor,
                 first: int, count: int, has_logs: bool = False) -> Spectra:  # fmt: skip
    """Transforms of kernels and values, and the scales that join them."""
    rows, groups, length = log_kernel.shape
    n, dim = value.shape[2:]
    device, channels, size = value.device, padded(dim), block_of(value.shape[2])
    layout = make_layout(size, n, n, True, 0, length)
    pieces = layout.row_blocks
    high, low, _ = transform(size, device)

    wide = pieces * size
    whole = log_kernel[..., :wide]
    if length < wide:
        whole = torch.nn.functional.pad(whole, (0, wide - length), value=float("-inf"))
    block_max = whole.reshape(rows, groups, pieces, size).amax(-1)
    kernel = log_kernel.new_empty((rows, 2 * size, groups, pieces))
    norm = log_kernel.new_empty((rows, groups, pieces))
    tile = tile_of("KERNEL_TILE", device)
    block_f, block_p = min(tile.block_m, 2 * size), tile.block_n
    grid = (rows * groups * triton.cdiv(pieces, block_p) * (2 * size // block_f),)
    kernel_spectra_kernel[grid](
        log_kernel, block_max, starts, high, low, kernel, norm, length, pieces, pieces, groups,
        BLOCK=size, BLOCK_F=block_f, BLOCK_P=block_p, BLOCK_K=min(64, size), **tile.options(),
    )  # fmt: skip

    runs = make_runs(layout, starts)
    block, group = runs.block.to(torch.int32), runs.group.to(torch.int32)
    total = block.shape[1]
    spectra = torch.empty((rows, total, 2 * size, channels), dtype=torch.float16, device=device)
    weight = log_kernel.new_empty((rows, total, size))
    of_key = group.new_empty((rows, n))
    run_facts = log_kernel.new_empty((4, rows, total))
    run_scale, value_scale, bound, run_norm = run_facts
    tile = VALUE_TILE
    heads = count // value.shape[0]
    value_spectra_kernel[(rows * total,)](
        value, log_kernel if key_offset is None else key_offset, high, block, runs.start, runs.end,
        spectra, weight, run_scale, value_scale, bound, run_norm, group, of_key,
        *value.stride()[:3], n, total, heads, first, GROUP=heads // value.shape[1], DIM=dim,
        BLOCK=size, BLOCK_C=channels, BLOCK_F=min(tile.block_m, 2 * size),
        HAS_OFFSET=key_offset is not None, **tile.options(),
    )  # fmt: skip

    factor = log_kernel.new_empty((rows, pieces, total))
    log_pair = torch.empty_like(factor) if has_logs else None
    facts = log_kernel.new_empty((5, rows, pieces))
    tile = TABLE_TILE
    table_kernel[(rows * pieces,)](
        block_max, norm, run_scale, run_norm, value_scale, bound, block, group, factor,
        factor if log_pair is None else log_pair, facts, total, pieces, total - pieces, groups,
        rows, _NOISE * torch.finfo(torch.float16).eps,
        BLOCK_U=min(tile.block_n, triton.next_power_of_2(total)), HAS_LOGS=has_logs,
        **tile.options(),
    )  # fmt: skip
    top, near_top, noise, far_scale, unit = facts
    return Spectra(layout, runs, block, group, kernel, factor, top, near_top, spectra, value_scale,
                   far_scale, unit, weight, noise, log_pair, block_max, starts, of_key)  # fmt: skip


def _forward(log_kernel: Tensor, starts: Tensor, key_offset: Tensor | None, value: Tensor,
             hidden: Tensor | None, first: int, count: int, output: Tensor, lse: Tensor,
             scale: Tensor) -> None:  # fmt: skip
    spectra = make_spectra(log_kernel, starts, key_offset, value, first, count)
    rows, groups, length = log_kernel.shape
    n, dim = value.shape[2:]
    device, channels = value.device, padded(dim)
    blocks, total = spectra.layout.row_blocks, spectra.block.shape[1]
    size = spectra.layout.block
    _, _, matrix = transform(size, device)
    # (R, 2 B, U): frequency first, as the products read it
    weight_hat = matrix[:, :size] @ spectra.weight.mT
    store_scale = 8.0 / triton.next_power_of_2(max(total, 8))  # sums over runs stay in range
    mixed, far_hat = mix(spectra, spectra.factor, spectra.value, spectra.value_scale,
                         spectra.far_scale, weight_hat, store_scale, False)  # fmt: skip
    far = far_hat @ inverse(size, device)  # (R, A, B)
    tile = ROW_TILE
    block_m = min(tile.block_m, size)
    tiles = size // block_m
    heads = count // value.shape[0]
    far_value = transposed(size, device)[size:] @ mixed.flatten(0, 1)  # (R A, B, C) float16
    least = log_kernel.new_empty((rows, blocks, tiles))
    row_kernel[(rows * blocks * tiles,)](
        far_value, far, spectra.top, spectra.near_top, spectra.far_scale, spectra.unit, log_kernel,
        log_kernel if key_offset is None else key_offset, spectra.of_key,
        spectra.of_key if hidden is None else hidden.contiguous().view(torch.uint8), value, output,
        lse, least, *value.stride()[:3], n, blocks, length, heads, groups, first,
        1.0 / store_scale, GROUP=heads // value.shape[1], DIM=dim, BLOCK=size, BLOCK_C=channels,
        BLOCK_M=block_m, BLOCK_N=min(tile.block_n, size), HAS_OFFSET=key_offset is not None,
        HAS_HIDDEN=hidden is not None, ONE_PASS=value.dtype in ONE_PASS, **tile.options(),
    )  # fmt: skip
    torch.stack((spectra.noise, spectra.top, least.amin(-1)), out=scale)


def mix(spectra: Spectra, factor: Tensor, source: Tensor, in_scale: Tensor, out_scale: Tensor,
        vector: Tensor, store_scale: float, is_back: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Spectra (R, outputs, 2 B, C) float16 of row blocks from runs, or of runs from row blocks.

    And the product with `vector` (R, 2 B, inputs), (R, outputs, 2 B), in float32.
    """
    rows, _, groups, pieces = spectra.kernel.shape
    blocks, total = spectra.layout.row_blocks, spectra.block.shape[1]
    outputs, inputs = (total, blocks) if is_back else (blocks, total)
    tile, size = tile_of("MIX_TILE", source.device), spectra.layout.block
    width = triton.cdiv(inputs, max(tile.block_n, 16)) * max(tile.block_n, 16)
    weight = source.new_empty((rows, size, 2, outputs, width))
    result = source.new_empty((rows, outputs, 2 * size, source.shape[-1]))
    sums = factor.new_empty((rows, outputs, 2 * size))
    small = min(WEIGHT_TILE.block_m, tile.block_m)
    weight_kernel[(rows * size * triton.cdiv(outputs, small),)](
        spectra.kernel, factor, in_scale, out_scale, vector, spectra.block, spectra.group, weight,
        sums, total, blocks, pieces, total - blocks, groups, outputs, inputs, width, BLOCK=size,
        BLOCK_O=small, BLOCK_K=tile.block_n, BLOCK_T=tile.block_m, IS_BACK=is_back,
        **WEIGHT_TILE.options(),
    )  # fmt: skip
    mix_kernel[(rows * size * triton.cdiv(outputs, tile.block_m),)](
        weight, source, spectra.block, result, blocks, total, total - blocks, outputs, inputs,
        width, store_scale, BLOCK=size, BLOCK_C=source.shape[-1], BLOCK_O=tile.block_m,
        BLOCK_K=tile.block_n, IS_BACK=is_back, **tile.options(),
    )  # fmt: skip
    return result, sums


@functools.lru_cache(maxsize=8)
def transposed(block: int, device: torch.device) -> Tensor:
    """W (2 B, 2 B) in float16, one row for each place in time."""
    return transform(block, device)[0].T.contiguous()


@functools.lru_cache(maxsize=8)
def inverse(block: int, device: torch.device) -> Tensor:
    """Right half of W (2 B, B) in float32, over B."""
    return transform(block, device)[2][:, block:] / block
