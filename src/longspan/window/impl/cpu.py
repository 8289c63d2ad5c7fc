"""Window attention's forward on torch's CPU flash kernel, blocks of queries under masks.

Blocks away from the start are alike: their windows are overlapping views of the keys, which one
call reads in place under one shared mask; the sinks are a second call, joined by lse. A block near
the start is a call of its own. The last block is filled up with zeros to the shape that it has in
a longer text, so that its rows have the same bits there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._merge import merge
from ..._validation import Call
from ...types import AttentionOutput
from ..config import WindowConfig

__all__ = ["kernel_blocks", "kernel_forward"]

_ELEMENTS_AT_ONCE = 2**23  # of the queries of one call


def kernel_blocks(call: Call, config: WindowConfig, height: int) -> range:
    """First rows of the blocks of `height` queries that `kernel_forward` computes; may be empty."""
    batch, heads, n_q, dim = call.query.shape
    n_k, offset = call.key.shape[2], call.query_offset
    kernel_fits = (
        call.query.device.type == "cpu"
        and call.key_lengths is None
        and call.value.shape[-1] == dim
        and dim > 0
        and batch * heads > 0
        and n_q >= height
    )
    if not kernel_fits:
        return range(0)
    start = max(0, -(offset // height) * height)  # rows before key 0 see nothing
    if call.is_causal:
        stop = n_q if n_q + offset <= n_k else (n_k - offset) // height * height
    else:  # all of the last row's keys are there
        stop = min(n_q, n_k - config.window - offset + 1) // height * height
    return range(start, stop, height)


def kernel_forward(
    call: Call, config: WindowConfig, blocks: range, output: Tensor, lse: Tensor
) -> None:
    """Write the rows of `blocks` into output (B, H, N_q, D_v) and lse (B, H, N_q)."""
    height, heads = blocks.step, call.query.shape[1]
    # From here on a gap, or nothing, is between the sinks and the window of the first row.
    apart = config.num_sinks + config.window - call.query_offset
    near_start = [blocks[i : i + 1] for i, first in enumerate(blocks) if first < apart]
    rest = blocks[len(near_start) :]
    count = max(1, _ELEMENTS_AT_ONCE // (heads * height * call.query.shape[-1]))
    alike = [rest[i : i + count] for i in range(0, len(rest), count)]
    bias = None
    for some in [*near_start, *alike]:
        if bias is None or some[0] < apart or some is alike[0]:
            bias = _bias(call, config, some)
        rows = slice(some[0], min(some[-1] + height, call.query.shape[2]))
        length = rows.stop - rows.start
        for entry in range(call.query.shape[0]):
            part = _run(call, config, entry, some, bias)
            output[entry, :, rows] = part.output[:, :length]
            lse[entry, :, rows] = part.lse[:, :length]


def _begin(call: Call, config: WindowConfig, first: int) -> int:
    """The first of the consecutive keys of the block at row `first`; 0 takes the sinks in."""
    begin = first + call.query_offset - config.window + 1
    return begin if begin > config.num_sinks else 0


def _run(
    call: Call, config: WindowConfig, entry: int, blocks: range, bias: Tensor
) -> AttentionOutput:
    """Output (H, blocks * height, D_v), lse (H, blocks * height)."""
    height, columns = blocks.step, bias.shape[-1]
    heads, _, dim = call.query.shape[1:]
    kv_heads = call.key.shape[1]
    begin = _begin(call, config, blocks[0])
    needed = (len(blocks) - 1) * height + columns
    q = _rows(call.query[entry], blocks[0], len(blocks) * height)
    # (blocks, H_kv, G * height, D): the heads that share keys become rows.
    q = q.view(kv_heads, heads // kv_heads, len(blocks), height, dim).permute(2, 0, 1, 3, 4)
    q = q.reshape(len(blocks), kv_heads, -1, dim)
    near = []
    for tensor in (call.key, call.value):
        side = _rows(tensor[entry], begin, needed)
        per_head, per_key, _ = side.stride()
        shape = (len(blocks), kv_heads, columns, dim)
        near.append(side.as_strided(shape, (height * per_key, per_head, per_key, 1)))
    parts = [_kernel(q, near[0], near[1], bias, call.scale)]
    if config.num_sinks and begin:
        shape = (len(blocks), kv_heads, config.num_sinks, dim)
        k, v = (_rows(t[entry], 0, config.num_sinks).expand(shape) for t in (call.key, call.value))
        parts.append(_kernel(q, k, v, None, call.scale))
    joined = merge(parts)
    split = (len(blocks), kv_heads, heads // kv_heads, height)
    order = (1, 2, 0, 3)
    return AttentionOutput(
        joined.output.view(*split, dim).permute(*order, 4).reshape(heads, -1, dim),
        joined.lse.view(split).permute(order).reshape(heads, -1),
    )


def _kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> AttentionOutput:
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=bias, scale=scale
    )
    return AttentionOutput(output, lse)


def _rows(tensor: Tensor, begin: int, length: int) -> Tensor:
    """(H, length, D) from row `begin` on, dense in D, zeros behind the end."""
    tensor = tensor[:, begin : begin + length]
    missing = length - tensor.shape[1]
    if missing:
        return F.pad(tensor, (0, 0, 0, missing))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _bias(call: Call, config: WindowConfig, blocks: range) -> Tensor:
    """(G * height, columns): -inf where a row of a block does not see one of its keys."""
    begin = _begin(call, config, blocks[0])
    first = blocks[0] + call.query_offset
    end = first + blocks.step
    if not call.is_causal:
        end = max(end + config.window - 1, min(config.num_sinks, call.key.shape[2]))
    p = torch.arange(first, first + blocks.step)[:, None]
    j = torch.arange(begin, end)
    hidden = ((p - j).abs() >= config.window) & (j >= config.num_sinks)
    hidden = hidden | (j > p) if call.is_causal else hidden
    bias = torch.zeros(hidden.shape, dtype=call.query.dtype).masked_fill_(hidden, float("-inf"))
    return bias.repeat(call.query.shape[1] // call.key.shape[1], 1)
