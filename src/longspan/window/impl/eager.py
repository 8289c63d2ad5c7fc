"""Window attention in plain torch, a block of queries at a time: O(N window), any device.

A block of `rows` queries sees at most rows + window - 1 consecutive keys (twice the window when
not causal) and the sinks; one matrix product covers them all, and a mask hides the corners. The
backward computes the weights again. On the CPU the forward runs in torch's own kernel where it
can (cpu.py). The block size depends on the settings alone, so that a result does not depend on
the length or on batch neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._validation import Call
from ..config import WindowConfig
from .cpu import kernel_blocks, kernel_forward

__all__ = ["eager_backward", "eager_forward"]

_SCORES_AT_ONCE = 2**23  # scores held at a time: 32 MB in float32
_LEAST_ROWS, _MOST_ROWS = 64, 256


class _Block(NamedTuple):
    entries: slice  # batch entries
    rows: slice  # queries
    keys: slice  # consecutive keys that some row's window covers
    num_sinks: int  # sinks that stand apart from `keys`, as the first columns
    bias: Tensor  # (B or 1, 1, rows, num_sinks + keys), wide: -inf where a score does not count
    padding: Tensor | None  # (B, 1, num_sinks + keys) bool, True where key_lengths ends the keys
    may_be_empty: bool  # a row may see no key


class _Columns(NamedTuple):
    """Keys and values of a block, sinks first: (B, H_kv, num_sinks + keys, D or D_v), wide."""

    k: Tensor
    v: Tensor


def eager_forward(call: Call, config: WindowConfig) -> tuple[Tensor, Tensor]:
    """Output (B, H, N_q, D_v) in the dtype of query, lse (B, H, N_q) in float32 or float64."""
    batch, heads, n_q, _ = call.query.shape
    output = call.query.new_zeros((batch, heads, n_q, call.value.shape[-1]))
    lse = call.query.new_full((batch, heads, n_q), float("-inf"), dtype=_wide(call))
    done = kernel_blocks(call, config, _height(config))
    if done:
        kernel_forward(call, config, done, output, lse)
    for block in _blocks(call, config, done):
        columns = _columns(call, block)
        scores = _scores(call, block, columns)  # (B, H_kv, G * rows, columns)
        top = scores.amax(-1, keepdim=True)
        p = torch.softmax(scores, -1)
        rest = top - torch.log(p.amax(-1, keepdim=True))  # the largest weight is exp(top - lse)
        part = p @ columns.v
        if block.may_be_empty:  # the softmax of a row without keys is NaN
            empty = top == float("-inf")
            part, rest = torch.where(empty, 0.0, part), torch.where(empty, top, rest)
        shape = (part.shape[0], heads, -1)
        output[block.entries, :, block.rows] = part.view(*shape, part.shape[-1]).to(output.dtype)
        lse[block.entries, :, block.rows] = rest.view(shape)
    return output, lse


def eager_backward(
    call: Call,
    config: WindowConfig,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv: ds = p (dp - delta + dlse) with p = softmax(s), delta = rowsum(dO * O)."""
    wide = _wide(call)
    dq = torch.zeros_like(call.query, memory_format=torch.contiguous_format)
    dk = torch.zeros_like(call.key, dtype=wide, memory_format=torch.contiguous_format)
    dv = torch.zeros_like(call.value, dtype=wide, memory_format=torch.contiguous_format)
    kv_heads = call.key.shape[1]
    for block in _blocks(call, config):
        columns = _columns(call, block)

        def rows_of(tensor: Tensor, block: _Block = block) -> Tensor:
            return _group(tensor[block.entries, :, block.rows].to(wide), kv_heads)

        do = rows_of(grad_output)
        delta = (do * rows_of(output)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - rows_of(grad_lse.unsqueeze(-1))
        # All keys of a row are here: the softmax is more exact than exp(s - lse) for a large lse.
        p = torch.softmax(_scores(call, block, columns), -1)
        if block.may_be_empty:
            p = torch.where(rows_of(lse.unsqueeze(-1)) == float("-inf"), 0.0, p)
        dv_columns = p.transpose(-1, -2) @ do
        ds = (do @ columns.v.transpose(-1, -2)).sub_(delta).mul_(p)
        dq_rows = call.scale * (ds @ columns.k)
        dq[block.entries, :, block.rows] = dq_rows.view(
            dq_rows.shape[0], call.query.shape[1], -1, dq_rows.shape[-1]
        ).to(dq.dtype)
        dk_columns = call.scale * (ds.transpose(-1, -2) @ rows_of(call.query))
        for total, grad in ((dk, dk_columns), (dv, dv_columns)):
            total[block.entries, :, block.keys] += grad[:, :, block.num_sinks :]
            total[block.entries, :, : block.num_sinks] += grad[:, :, : block.num_sinks]
    return dq, dk.to(call.key.dtype), dv.to(call.value.dtype)


def _wide(call: Call) -> torch.dtype:
    return torch.float64 if call.query.dtype is torch.float64 else torch.float32


def _group(tensor: Tensor, kv_heads: int) -> Tensor:
    """(B, H, rows, X) to (B, H_kv, G * rows, X): the heads that share keys become rows."""
    batch, heads, rows, width = tensor.shape
    return tensor.reshape(batch, kv_heads, heads // kv_heads * rows, width)


def _height(config: WindowConfig) -> int:
    return min(_MOST_ROWS, max(_LEAST_ROWS, config.window // 2))


def _blocks(call: Call, config: WindowConfig, done: range = range(0)) -> Iterator[_Block]:
    """The blocks that compute something, without those whose first row is in `done`."""
    batch, heads, n_q, _ = call.query.shape
    n_k, window = call.key.shape[2], config.window
    if call.query.numel() == 0 or call.key.numel() == 0 or call.value.numel() == 0:
        return
    device = call.query.device
    height = _height(config)
    made = None  # blocks away from both ends share one mask
    for start in range(0, n_q, height):
        if start in done:
            continue
        rows = slice(start, min(start + height, n_q))
        first, last = rows.start + call.query_offset, rows.stop - 1 + call.query_offset
        begin = min(max(first - window + 1, 0), n_k)
        end = min(max(last + 1 if call.is_causal else last + window, 0), n_k)
        sinks = min(config.num_sinks, n_k)
        if begin <= sinks:  # no gap between the sinks and the window
            begin, end, sinks = 0, max(end, sinks), 0
        if begin == end and sinks == 0:
            continue
        if (shape := (last - first, first - begin, end - begin, sinks)) != made:
            made = shape
            p = torch.arange(first, last + 1, device=device)[:, None]
            j = _places(begin, end, sinks, device)
            hidden = ((p - j).abs() >= window) & (j >= config.num_sinks)
            hidden = (hidden | (j > p) if call.is_causal else hidden)[None, None]
            # Added, because masked_fill on the CPU takes longer than the matrix product.
            unpadded = torch.zeros(hidden.shape, dtype=_wide(call), device=device)
            unpadded.masked_fill_(hidden, float("-inf"))
        j = _places(begin, end, sinks, device)
        outside = first < 0 or last - window >= n_k - 1
        count = max(1, _SCORES_AT_ONCE // max(1, heads * unpadded.numel()))
        for entry in range(0, batch, count):
            entries = slice(entry, min(entry + count, batch))
            bias, padding = unpadded, None
            if call.key_lengths is not None:
                padding = (j >= call.key_lengths[entries, None])[:, None]
                bias = unpadded.masked_fill(padding.unsqueeze(2), float("-inf"))
            keys, may_be_empty = slice(begin, end), outside or padding is not None
            yield _Block(entries, rows, keys, sinks, bias, padding, may_be_empty)


def _places(begin: int, end: int, sinks: int, device: torch.device) -> Tensor:
    """Key indices of the columns of a block."""
    near = torch.arange(begin, end, device=device)
    return torch.cat((torch.arange(sinks, device=device), near)) if sinks else near


def _columns(call: Call, block: _Block) -> _Columns:
    sides = []
    for tensor in (call.key, call.value):
        side = tensor[block.entries, :, block.keys].to(_wide(call))
        if block.num_sinks:
            sinks = tensor[block.entries, :, : block.num_sinks].to(_wide(call))
            side = torch.cat((sinks, side), dim=2)
        if block.padding is not None:  # 0 * NaN is NaN: padding must not reach a product
            side = side.masked_fill(block.padding.unsqueeze(-1), 0.0)
        sides.append(side)
    return _Columns(*sides)


def _scores(call: Call, block: _Block, columns: _Columns) -> Tensor:
    """(B, H_kv, G * rows, columns), -inf where hidden."""
    q = _group(call.query[block.entries, :, block.rows].to(_wide(call)), call.key.shape[1])
    scores = (call.scale * q) @ columns.k.transpose(-1, -2)
    batch, kv_heads, _, width = scores.shape
    grouped = scores.view(batch, kv_heads, -1, block.rows.stop - block.rows.start, width)
    grouped += block.bias.unsqueeze(2)
    return scores
