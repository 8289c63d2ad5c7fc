"""Gradients of the engine for half precision values, by the forward's transforms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ...._triton.interpreter import repair_interpreter
from ...._triton.launch import interpreting, unit_last_stride
from . import half
from .spectra import transform

__all__ = ["half_backward"]

_EARLY = 2  # row blocks whose pairs are computed densely: rows that see few keys


def half_backward(
    log_kernel: Tensor,
    starts: Tensor,
    key_offset: Tensor | None,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log_kernel (R, G, L), key_offset (R, N), value (R, N, D_v); spread (R,).

    Inputs as in `half_forward`; output, grad_output (R, N, D_v); lse, grad_lse (R, N) float32.
    spread: the largest factor of a pair of blocks; the kernel's gradient errs in proportion.
    """
    if interpreting():
        repair_interpreter()
    value = unit_last_stride(value)
    count, (n, dim) = log_kernel.shape[0], value.shape[2:]
    grad_kernel = torch.empty_like(log_kernel, memory_format=torch.contiguous_format)
    grad_key = log_kernel.new_empty((count, n))
    is_shared = count != value.shape[0] * value.shape[1]
    dtype = torch.float32 if is_shared else value.dtype
    grad_value = torch.empty((count, n, dim), dtype=dtype, device=value.device)
    spread = log_kernel.new_empty((count,))
    step = max(1, half.problems_at_once(log_kernel, value, is_backward=True))
    for first in range(0, count, step):
        part = slice(first, min(first + step, count))
        offset = None if key_offset is None else key_offset[part].contiguous()
        flat_lse = None if grad_lse is None else grad_lse[part].contiguous()
        spread[part] = _backward(
            log_kernel[part].contiguous(), starts[part].contiguous(), offset, value, first, count,
            output[part].contiguous(), lse[part].contiguous(), grad_output[part].contiguous(),
            flat_lse, grad_kernel[part], grad_key[part], grad_value[part],
        )  # fmt: skip
    return grad_kernel, grad_key, grad_value, spread


def _backward(
    log_kernel: Tensor, starts: Tensor, key_offset: Tensor | None, value: Tensor, first: int,
    count: int, output: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None,
    grad_kernel: Tensor, grad_key: Tensor, grad_value: Tensor,
) -> Tensor:  # fmt: skip
    block = half.block_of(value.shape[2])
    spectra = half.make_spectra(log_kernel, starts, key_offset, value, first, count, has_logs=True)
    assert spectra.log_pair is not None
    rows, groups, length = log_kernel.shape
    n, dim = value.shape[2:]
    device, channels = value.device, half.padded(dim)
    blocks, total = spectra.layout.row_blocks, spectra.block.shape[1]
    high, _, matrix = transform(block, device)
    shape: dict[str, int] = {"DIM": dim, "BLOCK": block, "BLOCK_C": channels}

    least = F.pad(lse, (0, blocks * block - n), value=float("-inf")).view(rows, blocks, block)
    least = torch.where(least == float("-inf"), float("inf"), least).amin(-1)
    least = torch.where(least == float("inf"), 0.0, least).contiguous()  # (R, A)
    upstream = torch.empty((rows, blocks, 2 * block, channels), dtype=torch.float16, device=device)
    up_scale, bound = (log_kernel.new_empty((rows, blocks)) for _ in range(2))
    last = log_kernel.new_empty((rows, n))
    damped = log_kernel.new_empty((rows, blocks, block))
    tile = half.UPSTREAM_TILE
    half.upstream_kernel[(rows * blocks,)](
        grad, output, lse, lse if grad_lse is None else grad_lse, least, high, upstream, up_scale,
        bound, last, damped, n, blocks, **shape, BLOCK_F=min(tile.block_m, 2 * block),
        HAS_GRAD_LSE=grad_lse is not None, **tile.options(),
    )  # fmt: skip
    last_hat = (matrix[:, block:] @ damped.mT).contiguous()  # (R, 2 B, A)
    weight_hat = (matrix[:, :block] @ spectra.weight.mT).contiguous()  # (R, 2 B, U)
    factor = torch.exp(spectra.log_pair - least.unsqueeze(-1))  # (R, A, U)

    _values(log_kernel, key_offset, value, first, count, lse, grad, grad_key, grad_value, spectra,
            upstream, up_scale, bound, last, last_hat, factor, shape)  # fmt: skip

    factor[:, :_EARLY] = 0.0
    pair = log_kernel.new_empty((rows, 2 * block, total, blocks))
    tile = half.PAIR_TILE
    tiles = triton.cdiv(total, tile.block_m) * triton.cdiv(blocks, tile.block_n)
    half.pair_kernel[(rows * block * tiles,)](
        factor, spectra.value, spectra.value_scale, weight_hat, upstream, up_scale, last_hat,
        spectra.block, pair, total, blocks, BLOCK=block, BLOCK_C=channels, BLOCK_U=tile.block_m,
        BLOCK_A=tile.block_n, **tile.options(),
    )  # fmt: skip
    borders = torch.arange(groups + 1, device=device, dtype=torch.int32).expand(rows, -1)
    runs_of = torch.searchsorted(spectra.group, borders.contiguous()).to(torch.int32)
    tile = half.SUM_TILE
    summed = log_kernel.new_empty((rows, 2 * block, groups, blocks))
    half.group_sum_kernel[(rows * 2 * block * groups * triton.cdiv(blocks, tile.block_n),)](
        pair, runs_of, spectra.block, summed, total, blocks, blocks, groups, BLOCK=block,
        BLOCK_U=tile.block_m, BLOCK_P=tile.block_n, **tile.options(),
    )  # fmt: skip
    # back to lags: each lag lies in two pieces
    frames = summed.view(rows, 2 * block, -1).mT @ (matrix / block)  # (R, G P, 2 B)
    frames = frames.view(rows, groups, blocks, 2, block)
    wide = blocks * block
    lags = F.pad(log_kernel[..., :wide], (0, max(wide - length, 0)), value=float("-inf"))
    lags = lags.view(rows, groups, blocks, block)
    before = F.pad(spectra.block_max[..., :-1], (1, 0), value=float("-inf"))
    scale = torch.maximum(spectra.block_max, before).unsqueeze(-1)  # of the pieces
    scale = torch.where(scale == float("-inf"), 0.0, scale)
    found = frames[:, :, :, 1] * torch.exp(lags - scale)
    later = frames[:, :, 1:, 0] * torch.exp(lags[:, :, :-1] - scale[:, :, 1:])
    later[..., 0] = 0.0  # the first place of a piece never counts
    found[:, :, :-1] += later
    grad_kernel.zero_()
    grad_kernel[..., :wide] = found.reshape(rows, groups, wide)[..., : min(wide, length)]
    _add_early(log_kernel, key_offset, value, first, count, lse, grad, last, spectra, grad_kernel)
    return factor.amax((1, 2))


def _values(
    log_kernel: Tensor, key_offset: Tensor | None, value: Tensor, first: int, count: int,
    lse: Tensor, grad: Tensor, grad_key: Tensor, grad_value: Tensor, spectra: half.Spectra,
    upstream: Tensor, up_scale: Tensor, bound: Tensor, last: Tensor, last_hat: Tensor,
    factor: Tensor, shape: dict[str, int],
) -> None:  # fmt: skip
    block = spectra.layout.block
    rows, groups, length = log_kernel.shape
    n = value.shape[2]
    device = value.device
    blocks, total = spectra.layout.row_blocks, spectra.block.shape[1]
    _, _, matrix = transform(block, device)
    steps = torch.arange(blocks, device=device).unsqueeze(-1)
    far = torch.where(steps - spectra.runs.block.unsqueeze(1) >= 2, factor, 0.0)
    back_scale = (far * up_scale.unsqueeze(-1)).amax(1)  # (R, U)
    back_scale = torch.where(back_scale > 0, back_scale, 1.0)
    unit = torch.maximum(bound, F.pad(bound[:, 1:], (0, 1)))
    most = torch.zeros_like(unit).scatter_reduce_(1, spectra.runs.block, back_scale, "amax")
    unit = torch.where(unit > 0, torch.maximum(unit, 1e-30 * most), 1.0)
    store_scale = 8.0 / triton.next_power_of_2(max(blocks, 8))
    back, last_back = half.mix(spectra, factor, upstream, up_scale, back_scale, last_hat,
                               store_scale, True)  # fmt: skip
    last_far = last_back @ (matrix[:, :block] / block)  # (R, U, B)
    tile = half.BACK_ROW_TILE
    block_m = min(tile.block_m, block)
    heads = count // value.shape[0]
    far_value = half.transposed(block, device)[:block] @ back.flatten(0, 1)  # (R U, B, C)
    half.key_kernel[(rows * total * (block // block_m),)](
        far_value, back_scale, spectra.weight, last_far, unit, last,
        lse, log_kernel, log_kernel if key_offset is None else key_offset, spectra.block,
        spectra.group, spectra.runs.start, spectra.runs.end, value, grad, grad_value, grad_key,
        *value.stride()[:3], n, blocks, total, length, heads, groups, first, 1.0 / store_scale,
        GROUP=heads // value.shape[1], **shape, BLOCK_M=block_m,
        BLOCK_N=min(tile.block_n, block), HAS_OFFSET=key_offset is not None,
        **tile.options(),
    )  # fmt: skip


def _add_early(
    log_kernel: Tensor, key_offset: Tensor | None, value: Tensor, first: int, count: int,
    lse: Tensor, grad: Tensor, last: Tensor, spectra: half.Spectra, grad_kernel: Tensor,
) -> None:  # fmt: skip
    """The first rows' share of the kernel's gradient, in float32, weight by weight."""
    rows, groups, length = log_kernel.shape
    n = min(_EARLY * spectra.layout.block, value.shape[2])
    heads = count // value.shape[0]
    head = torch.arange(first, first + rows, device=value.device)
    own = head % heads // (heads // value.shape[1])
    keys = torch.arange(n, device=value.device)
    some = value[head // heads, own, :n].float()  # (R, n, D)
    group = spectra.of_key[:, :n].long()  # (R, n)
    # entry (l, j): lag l, key j, row l + j
    row = keys[:, None] + keys
    seen = (row < n) & (keys < length)[:, None]
    row = row.clamp(max=n - 1)
    column = torch.gather(
        log_kernel[..., :n].mT if length >= n else F.pad(log_kernel, (0, n - length)).mT,
        2, group.unsqueeze(1).expand(-1, n, -1),
    )  # fmt: skip
    if key_offset is not None:
        column = column + key_offset[:, None, :n]
    row_lse = lse[:, row.flatten()].view(rows, n, n)
    seen = seen & (row_lse > float("-inf"))
    weight = torch.exp(torch.where(seen, column - row_lse, float("-inf")))
    change = grad[:, :n].float() @ some.mT + last[:, :n].unsqueeze(-1)  # (R, i, j)
    change = torch.gather(change, 1, row.expand(rows, -1, -1)) * weight
    member = F.one_hot(group, groups).to(change.dtype)  # (R, j, G)
    part = (change @ member).mT  # (R, G, l)
    end = min(n, length)
    grad_kernel[..., :end] += part[..., :end]
