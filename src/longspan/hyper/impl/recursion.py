"""The paper's recursion in plain torch: leaves, matched blocks and residual columns, node by node.

Every visible pair is in one node or leaf, so partial results join by their log-sum-exps and, in
the backward, gradients made with the lse of the whole row add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._validation import Call
from ..config import HyperConfig
from ..geometry import Leaf, Node, Recursion, recursion
from ..index.sorted import build_sorted_index
from ..plan import SortedIndex
from .common import add_rows, wide_dtype
from .flash_cpu import attend, can_attend

__all__ = [
    "entries_of",
    "geometry_of",
    "recursion_backward",
    "recursion_forward",
    "recursion_index",
]

_SCORES_AT_ONCE = 2**22
_LEAF_ROWS = 256


def geometry_of(call: Call, config: HyperConfig) -> Recursion:
    """Nodes and leaves of a call without key_lengths."""
    return recursion(call.query.shape[2], call.key.shape[2], call.is_causal, call.query_offset,
                     config.block_size, config.min_length)  # fmt: skip


def entries_of(call: Call) -> Iterator[tuple[slice, Call]]:
    """Batch entries that have the same geometry: all, or one by one without their padding."""
    if call.key_lengths is None:
        yield slice(0, call.query.shape[0]), call
        return
    for entry, length in enumerate(call.key_lengths.tolist()):
        one, length = slice(entry, entry + 1), min(max(length, 0), call.key.shape[2])
        yield one, call._replace(query=call.query[one], key=call.key[one, :, :length],
                                 value=call.value[one, :, :length], key_lengths=None)  # fmt: skip


def recursion_index(
    call: Call, config: HyperConfig, projections: Tensor | None, seed: int
) -> SortedIndex:
    """Sorted index of a call without key_lengths."""
    geometry = geometry_of(call, config)
    return build_sorted_index(call.query, call.key, call.value, geometry, config, projections, seed)


class _Tile(NamedTuple):
    """Some consecutive pairs of blocks of one node, E = B H_kv."""

    rows: Tensor  # (E, G, n) int64: query rows
    keys: Tensor  # (E, m) int64: key positions
    first: int  # number of the first block
    blocks: int  # the last may be short
    q_pad: int  # rows missing in the last block
    k_pad: int


def recursion_forward(call: Call, config: HyperConfig, index: SortedIndex) -> tuple[Tensor, Tensor]:
    """Output (B, H, N_q, D_v) in the dtype of query, lse (B, H, N_q), without key_lengths."""
    wide = wide_dtype(call)
    q, k, v = _flat(call)
    shape = q.shape[:3]
    output, lse = q.new_zeros((*shape, v.shape[-1])), q.new_full(shape, float("-inf"))
    geometry = geometry_of(call, config)
    fast = can_attend(q, v)
    for leaf in geometry.leaves:
        aligned = leaf.q_start + call.query_offset == leaf.k_start
        if fast and (not call.is_causal or (aligned and leaf.q_end - leaf.q_start <= leaf.k_end
                                            - leaf.k_start)):  # fmt: skip
            rows, keys = slice(leaf.q_start, leaf.q_end), slice(leaf.k_start, leaf.k_end)
            if call.is_causal:
                keys = slice(leaf.k_start, leaf.k_start + leaf.q_end - leaf.q_start)
            output[:, :, rows], lse[:, :, rows] = attend(
                q[:, :, rows], k[:, keys], v[:, keys], is_causal=call.is_causal
            )
            continue
        for rows, keys, bias in _leaf_blocks(call, leaf):
            scores = (q[:, :, rows].flatten(1, 2) @ k[:, keys].transpose(1, 2)).view(
                *shape[:2], rows.stop - rows.start, -1
            )
            scores += bias
            part, part_lse = _softmax(scores, v[:, None, keys])
            output[:, :, rows], lse[:, :, rows] = part, part_lse
    for number, node in enumerate(geometry.nodes):
        columns = _node_columns(k, v, config, index, geometry, number)
        for tile in _tiles(index, geometry, number, node, q.shape):
            if fast and not tile.q_pad and not tile.k_pad and columns.variance is None:
                _fast_tile(output, lse, q, k, v, tile, node, columns)
                continue
            _, ks, vs, scores = _tile_scores(q, k, v, tile, node, columns, config)
            width = ks.shape[2]
            top = scores.amax(-1, keepdim=True)
            top = top.masked_fill(top == float("-inf"), 0.0)
            p = scores.sub_(top).exp_()
            total = p.sum(-1, keepdim=True)
            part = (p[..., :width].flatten(2, 3) @ vs).view(*p.shape[:-1], -1)
            if columns.value.shape[1]:
                part += (p[..., width:].flatten(1, 3) @ columns.value).view_as(part)
            part = part / total.masked_fill(total == 0, 1.0)
            _join_rows(output, lse, tile, part, (top + torch.log(total)).squeeze(-1))
    batch, heads = call.query.shape[:2]
    return (
        output.view(batch, heads, *output.shape[2:]).to(call.query.dtype),
        lse.view(batch, heads, -1).to(wide),
    )


def _fast_tile(
    output: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, tile: _Tile, node: Node,
    columns: _NodeColumns,
) -> None:  # fmt: skip
    """A tile of whole blocks by the CPU's attention kernel: blocks, then columns, joined."""
    groups, group, _ = tile.rows.shape
    qs = q.gather(2, tile.rows.unsqueeze(-1).expand(-1, -1, -1, q.shape[-1]))
    ks, vs = (_keys_of(tensor, tile, node).flatten(0, 1) for tensor in (k, v))
    blocks = qs.view(groups, group, tile.blocks, node.q_block, -1).transpose(1, 2)
    part, part_lse = attend(blocks.flatten(0, 1), ks, vs)
    shape = (groups, tile.blocks, group, node.q_block)
    _join_rows(output, lse, tile, part.reshape(*shape, -1), part_lse.reshape(shape))
    if columns.key.shape[1] == 0:
        return
    names = torch.arange(tile.first, tile.first + tile.blocks, device=q.device)
    own = columns.owner.unsqueeze(1) == names.unsqueeze(-1)  # (E, blocks, R)
    bias = columns.bias.unsqueeze(1).masked_fill(own, float("-inf"))
    bias = bias.repeat_interleave(node.q_block, 1)  # (E, count, R)
    part, part_lse = attend(qs, columns.key, columns.value, bias=bias)
    _join_rows(output, lse, tile, part.view(groups, group, *shape[1:2], node.q_block, -1)
               .transpose(1, 2), part_lse.view(groups, group, tile.blocks, node.q_block)
               .transpose(1, 2))  # fmt: skip


def recursion_backward(
    call: Call,
    config: HyperConfig,
    index: SortedIndex,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, wide, with the plan held fixed."""
    wide = wide_dtype(call)
    q, k, v = _flat(call)
    shape = q.shape[:3]
    do = grad_output.to(wide).reshape(*shape, -1)
    delta = (do * output.to(wide).reshape(*shape, -1)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(wide).reshape(shape)
    rest = lse.reshape(shape)
    rest = rest.masked_fill(rest == float("-inf"), 0.0)
    # contiguous: models give transposed heads, and rows are added to flat views of these
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    geometry = geometry_of(call, config)
    for leaf in geometry.leaves:
        for rows, keys, bias in _leaf_blocks(call, leaf):
            size = (*shape[:2], rows.stop - rows.start, -1)
            flat_q, flat_do = q[:, :, rows].flatten(1, 2), do[:, :, rows].flatten(1, 2)
            scores = (flat_q @ k[:, keys].transpose(1, 2)).view(size)
            scores += bias
            p = scores.sub_(rest[:, :, rows].unsqueeze(-1)).exp_()
            ds = (flat_do @ v[:, keys].transpose(1, 2)).view_as(p)
            ds = ds.sub_(delta[:, :, rows].unsqueeze(-1)).mul_(p).flatten(1, 2)
            dq[:, :, rows] += (ds @ k[:, keys]).view(size)
            dk[:, keys] += ds.transpose(1, 2) @ flat_q
            dv[:, keys] += p.flatten(1, 2).transpose(1, 2) @ flat_do
    for number, node in enumerate(geometry.nodes):
        columns = _node_columns(k, v, config, index, geometry, number)
        d_column_key = torch.zeros_like(columns.key)
        d_column_value = torch.zeros_like(columns.value)
        d_variance = None if columns.variance is None else torch.zeros_like(columns.variance)
        for tile in _tiles(index, geometry, number, node, q.shape):
            qs, ks, vs, scores = _tile_scores(q, k, v, tile, node, columns, config)
            width = ks.shape[2]
            # Padded rows carry an infinite lse: their weights vanish.
            p = scores.sub_(_rows_of(rest, tile, node, float("inf")).unsqueeze(-1)).exp_()
            dos, deltas = _rows_of(do, tile, node, 0.0), _rows_of(delta, tile, node, 0.0)
            near, near_do = p[..., :width].flatten(2, 3), dos.flatten(2, 3)
            dp = (near_do @ vs.transpose(2, 3)).view(*p.shape[:-1], width)
            d_near = (dp - deltas.unsqueeze(-1)).mul_(p[..., :width]).flatten(2, 3)
            d_rows = (d_near @ ks).view_as(qs)
            _add_keys(dk, tile, d_near.transpose(2, 3) @ qs.flatten(2, 3))
            _add_keys(dv, tile, near.transpose(2, 3) @ near_do)
            if columns.key.shape[1]:
                far, flat_do = p[..., width:].flatten(1, 3), dos.flatten(1, 3)
                d_far = flat_do @ columns.value.transpose(1, 2)
                d_far = d_far.sub_(deltas.flatten(1, 3).unsqueeze(-1)).mul_(far)
                flat_q = qs.flatten(1, 3)
                d_rows += (d_far @ columns.key).view_as(qs)
                d_column_key += d_far.transpose(1, 2) @ flat_q
                d_column_value += far.transpose(1, 2) @ flat_do
                if columns.variance is not None and d_variance is not None:
                    d_rows += qs * (d_far @ columns.variance).view_as(qs)
                    d_variance += 0.5 * (d_far.transpose(1, 2) @ flat_q.square())
            _add_query_rows(dq, tile, node, d_rows)
        _columns_to_keys(dk, dv, k, columns, d_column_key, d_column_value, d_variance,
                         index, geometry, number, config)  # fmt: skip
    dq = dq.mul_(call.scale)
    return dq.view_as(call.query), dk.view_as(call.key), dv.view_as(call.value)


class _NodeColumns(NamedTuple):
    key: Tensor  # (E, R, D)
    value: Tensor  # (E, R, D_v)
    bias: Tensor  # (E, R)
    owner: Tensor  # (E, R)
    variance: Tensor | None  # (E, R, D)


def _flat(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Wide: scaled q (E, G, N_q, D), k (E, N_k, D), v (E, N_k, D_v), E = B H_kv."""
    wide = wide_dtype(call)
    batch, heads, n_q, dim = call.query.shape
    kv_heads = call.key.shape[1]
    q = (call.query.to(wide) * call.scale).reshape(
        batch * kv_heads, heads // max(kv_heads, 1), n_q, dim
    )
    return q, call.key.to(wide).flatten(0, 1), call.value.to(wide).flatten(0, 1)


def _leaf_blocks(call: Call, leaf: Leaf) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, keys, and a bias (rows, keys) of 0 and -inf."""
    device, wide = call.query.device, wide_dtype(call)
    for start in range(leaf.q_start, leaf.q_end, _LEAF_ROWS):
        rows = slice(start, min(start + _LEAF_ROWS, leaf.q_end))
        keys = slice(leaf.k_start, leaf.k_end)
        if call.is_causal:
            keys = slice(leaf.k_start, min(leaf.k_end, rows.stop + call.query_offset))
        bias = torch.zeros((rows.stop - rows.start, keys.stop - keys.start), dtype=wide,
                           device=device)  # fmt: skip
        if call.is_causal:
            at = torch.arange(rows.start, rows.stop, device=device)[:, None] + call.query_offset
            bias.masked_fill_(torch.arange(keys.start, keys.stop, device=device) > at,
                              float("-inf"))  # fmt: skip
        yield rows, keys, bias


def _softmax(scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output and lse of scores (E, G, n, m), every row of which has a finite one."""
    top = scores.amax(-1, keepdim=True)
    p = scores.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    part = (p.flatten(1, 2) @ value.squeeze(1)).view(*p.shape[:-1], -1)
    return part / total, (top + torch.log(total)).squeeze(-1)


def _tiles(
    index: SortedIndex, geometry: Recursion, number: int, node: Node, shape: torch.Size
) -> Iterator[_Tile]:
    groups, group = shape[0], shape[1]
    q_base, k_base = geometry.query_bases[number], geometry.key_bases[number]
    q_len, k_len = node.q_end - node.q_start, node.k_end - node.k_start
    order_q = index.query_order.reshape(groups, group, -1)[..., q_base : q_base + q_len].long()
    order_k = index.key_order.flatten(0, 1)[:, k_base : k_base + k_len].long()
    samples = index.samples.shape[-1]
    width = node.k_block + max(samples, -(-k_len // node.k_block) if samples == 0 else 0)
    step = max(1, _SCORES_AT_ONCE // max(1, groups * group * node.q_block * width))
    blocks = -(-q_len // node.q_block)
    for first in range(0, blocks, step):
        count = min(step, blocks - first)
        q_from, q_to = first * node.q_block, min((first + count) * node.q_block, q_len)
        k_from, k_to = first * node.k_block, min((first + count) * node.k_block, k_len)
        yield _Tile(order_q[..., q_from:q_to], order_k[:, k_from:k_to], first, count,
                    count * node.q_block - (q_to - q_from),
                    count * node.k_block - (k_to - k_from))  # fmt: skip


def _rows_of(tensor: Tensor, tile: _Tile, node: Node, fill: float) -> Tensor:
    """(E, G, N_q, ...) to (E, blocks, G, q_block, ...): the tile's rows, in sorted order."""
    extra = tensor.shape[3:]
    at = tile.rows.reshape(*tile.rows.shape, *(1,) * len(extra)).expand(*tile.rows.shape, *extra)
    rows = tensor.gather(2, at)
    if tile.q_pad:
        pad = rows.new_full((*rows.shape[:2], tile.q_pad, *extra), fill)
        rows = torch.cat((rows, pad), 2)
    return rows.view(*rows.shape[:2], tile.blocks, node.q_block, *extra).transpose(1, 2)


def _tile_scores(
    q: Tensor, k: Tensor, v: Tensor, tile: _Tile, node: Node, columns: _NodeColumns,
    config: HyperConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """qs (E, blocks, G, q_block, D), ks and vs (E, blocks, k_block, .), and the scores
    (E, blocks, G, q_block, k_block + R)."""
    qs = _rows_of(q, tile, node, 0.0).contiguous()
    ks, vs = (_keys_of(tensor, tile, node) for tensor in (k, v))
    near = (qs.flatten(2, 3) @ ks.transpose(2, 3)).view(*qs.shape[:-1], node.k_block)
    if tile.k_pad:
        near[:, -1, :, :, node.k_block - tile.k_pad :] = float("-inf")
    if columns.key.shape[1] == 0:
        return qs, ks, vs, near
    flat = qs.flatten(1, 3)
    far = flat @ columns.key.transpose(1, 2)
    if columns.variance is not None:
        far += 0.5 * (flat.square() @ columns.variance.transpose(1, 2))
    far = far.view(*qs.shape[:-1], -1) + columns.bias[:, None, None, None]
    blocks = torch.arange(tile.first, tile.first + tile.blocks, device=q.device)
    own = columns.owner[:, None] == blocks[:, None]  # (E, blocks, R)
    far = far.masked_fill_(own[:, :, None, None], float("-inf"))
    return qs, ks, vs, torch.cat((near, far), -1)


def _keys_of(tensor: Tensor, tile: _Tile, node: Node) -> Tensor:
    rows = tensor.gather(1, tile.keys.unsqueeze(-1).expand(-1, -1, tensor.shape[-1]))
    if tile.k_pad:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, tile.k_pad))
    return rows.view(rows.shape[0], tile.blocks, node.k_block, -1)


def _join_rows(output: Tensor, lse: Tensor, tile: _Tile, part: Tensor, part_lse: Tensor) -> None:
    """Merge a partial result (E, blocks, G, q_block, ...) into the rows that it belongs to."""
    count = tile.rows.shape[2]
    new = part.transpose(1, 2).flatten(2, 3)[:, :, :count]
    new_lse = part_lse.transpose(1, 2).flatten(2, 3)[:, :, :count]
    at = tile.rows.unsqueeze(-1).expand(-1, -1, -1, output.shape[-1])
    old, old_lse = output.gather(2, at), lse.gather(2, tile.rows)
    top = torch.maximum(old_lse, new_lse)
    safe = top.masked_fill(top == float("-inf"), 0.0)
    a, b = torch.exp(old_lse - safe), torch.exp(new_lse - safe)
    total = a + b
    share = 1.0 / total.masked_fill(total == 0, 1.0)
    output.scatter_(2, at, old * (a * share).unsqueeze(-1) + new * (b * share).unsqueeze(-1))
    lse.scatter_(2, tile.rows, safe + torch.log(total))


def _add_query_rows(total: Tensor, tile: _Tile, node: Node, rows: Tensor) -> None:
    new = rows.transpose(1, 2).flatten(2, 3)[:, :, : tile.rows.shape[2]]
    at = tile.rows.unsqueeze(-1).expand(-1, -1, -1, new.shape[-1])
    total.scatter_(2, at, total.gather(2, at) + new)  # each row once


def _add_keys(total: Tensor, tile: _Tile, rows: Tensor) -> None:
    new = rows.flatten(1, 2)[:, : tile.keys.shape[1]]
    at = tile.keys.unsqueeze(-1).expand(-1, -1, new.shape[-1])
    total.scatter_(1, at, total.gather(1, at) + new)  # each key once


def _node_columns(
    k: Tensor, v: Tensor, config: HyperConfig, index: SortedIndex, geometry: Recursion, number: int
) -> _NodeColumns:
    groups = k.shape[0]
    if config.residual == "centroid":
        order, member, counts = _members(index, geometry, number, k.dtype)

        def mean(tensor: Tensor) -> Tensor:
            rows = tensor.gather(1, order.unsqueeze(-1).expand(-1, -1, tensor.shape[-1]))
            return torch.stack([part.mean(1) for part in torch.split(rows, member, 1)], 1)

        mean_key = mean(k)
        variance = None
        if config.variance_term:
            variance = (mean(k.square()) - mean_key.square()).clamp(min=0)
        owner = torch.arange(counts.numel(), device=k.device).expand(groups, -1)
        return _NodeColumns(mean_key, mean(v), torch.log(counts).expand(groups, -1), owner,
                            variance)  # fmt: skip
    at = index.samples[:, :, number].flatten(0, 1).long()

    def gather(tensor: Tensor) -> Tensor:
        return tensor.gather(1, at.unsqueeze(-1).expand(-1, -1, tensor.shape[-1]))

    return _NodeColumns(gather(k), gather(v),
                        index.sample_bias[:, :, number].flatten(0, 1).to(k.dtype),
                        index.sample_owner[:, :, number].flatten(0, 1), None)  # fmt: skip


def _members(
    index: SortedIndex, geometry: Recursion, number: int, dtype: torch.dtype
) -> tuple[Tensor, int, Tensor]:
    """Sorted keys (E, keys) of a node, the size of its blocks, and the count of each."""
    node = geometry.nodes[number]
    size, base = node.k_end - node.k_start, geometry.key_bases[number]
    order = index.key_order.flatten(0, 1)[:, base : base + size].long()
    starts = torch.arange(0, size, node.k_block, device=order.device)
    return order, node.k_block, (size - starts).clamp(max=node.k_block).to(dtype)


def _columns_to_keys(
    dk: Tensor, dv: Tensor, k: Tensor, columns: _NodeColumns, d_key: Tensor, d_value: Tensor,
    d_variance: Tensor | None, index: SortedIndex, geometry: Recursion, number: int,
    config: HyperConfig,
) -> None:  # fmt: skip
    if columns.key.shape[1] == 0:
        return
    if config.residual == "centroid":
        order, block, counts = _members(index, geometry, number, k.dtype)
        owner = torch.arange(order.shape[1], device=k.device) // block
        share = (1.0 / counts)[owner].unsqueeze(-1)
        for total, grad in ((dk, d_key), (dv, d_value)):
            at = order.unsqueeze(-1).expand(-1, -1, total.shape[-1])
            total.scatter_(1, at, total.gather(1, at) + share * grad[:, owner])
        if d_variance is not None:
            at = order.unsqueeze(-1).expand(-1, -1, k.shape[-1])
            apart = k.gather(1, at) - columns.key[:, owner]
            dk.scatter_(1, at, dk.gather(1, at) + 2.0 * share * apart * d_variance[:, owner])
        return
    at = index.samples[:, :, number].flatten(0, 1)
    add_rows(dk.unsqueeze(1), at.unsqueeze(1), d_key)
    add_rows(dv.unsqueeze(1), at.unsqueeze(1), d_value)
