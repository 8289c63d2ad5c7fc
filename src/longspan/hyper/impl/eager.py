"""HyperAttention over chunks in plain torch: any device, O(N) memory, deterministic.

Dense matrix products over blocks of queries (near keys, sinks, columns; `dense.py`) and over
clusters with the queries that opened them (`opened.py`), joined by their log-sum-exps. The
backward computes the weights again from the lse of the whole row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..._validation import Call
from ..config import HyperConfig
from ..plan import ChunkIndex, Columns
from .common import columns_backward, make_columns, wide_dtype, without_padding
from .dense import Block, Side, blocks, dense_backward, dense_forward
from .opened import keys_of_pieces, make_pieces, opened_backward, opened_forward

__all__ = ["eager_backward", "eager_forward"]

_ENTRIES_AT_ONCE = 2**24  # elements of the gathered queries of opened clusters held at a time
_SCORES_AT_ONCE = 2**24


def eager_forward(
    call: Call, config: HyperConfig, index: ChunkIndex, chosen: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, H, N_q, D_v), lse (B, H, N_q) and chosen (B, H, N_q, P)."""
    batch, heads, n_q, _ = call.query.shape
    wide = wide_dtype(call)
    probes = min(config.num_probes, index.counts.shape[2])
    output = call.query.new_zeros((batch, heads, n_q, call.value.shape[-1]))
    lse = call.query.new_full((batch, heads, n_q), float("-inf"), dtype=wide)
    picks = torch.full((batch, heads, n_q, probes), -1, dtype=torch.int32, device=lse.device)
    if 0 in (call.query.numel(), call.key.numel(), call.value.numel()):
        return output, lse, picks
    for entries, part, part_index in _parts(call, config, index):
        columns = make_columns(part, config, part_index)
        side = _side(part, config, part_index, columns)
        pieces = make_pieces(part.key, part.value, part_index, config.cluster_size, wide)
        given = None if chosen is None else _grouped(chosen[entries], part)
        q_all = _grouped(part.query, part)
        for rows, run in _runs(part, config):
            shape = (*q_all.shape[:2], rows.stop - rows.start)
            q = call.scale * q_all[:, :, rows].to(wide)
            near = q.new_zeros((*shape, call.value.shape[-1]))
            near_lse = q.new_full(shape, float("-inf"))
            opened = torch.full((*shape, probes), -1, dtype=torch.int32, device=q.device)
            for block in run:
                at = slice(block.rows.start - rows.start, block.rows.stop - rows.start)
                fixed = None if given is None else given[:, :, block.rows]
                for some in _heads_at_once(q, side, block):
                    near[some, :, at], near_lse[some, :, at], opened[some, :, at] = dense_forward(
                        q[some, :, at], _of_heads(side, some), block,
                        None if fixed is None else fixed[some],
                    )  # fmt: skip
            far, far_lse = opened_forward(_of_entries(q, part), _of_entries(opened, part), pieces)
            joined, joined_lse = _join(near, near_lse, far.view_as(near), far_lse.view_as(near_lse))
            output[entries, :, rows] = _ungrouped(joined, part).to(output.dtype)
            lse[entries, :, rows] = _ungrouped(joined_lse, part)
            picks[entries, :, rows] = _ungrouped(opened, part)
    return output, lse, picks


def eager_backward(
    call: Call,
    config: HyperConfig,
    index: ChunkIndex,
    chosen: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv with the plan held fixed: ds = p (dp - delta + dlse)."""
    wide = wide_dtype(call)
    dq = torch.zeros_like(call.query, memory_format=torch.contiguous_format)
    dk = torch.zeros_like(call.key, dtype=wide, memory_format=torch.contiguous_format)
    dv = torch.zeros_like(call.value, dtype=wide, memory_format=torch.contiguous_format)
    if 0 in (call.query.numel(), call.key.numel(), call.value.numel()):
        return dq, dk.to(call.key.dtype), dv.to(call.value.dtype)
    for entries, part, part_index in _parts(call, config, index):
        columns = make_columns(part, config, part_index)
        side = _side(part, config, part_index, columns)
        pieces = make_pieces(part.key, part.value, part_index, config.cluster_size, wide)
        d_keys, d_values = (  # contiguous: rows are added to flat views of them
            torch.zeros_like(t, memory_format=torch.contiguous_format)
            for t in (side.key, side.value)
        )
        d_columns = (
            torch.zeros_like(side.columns.key),
            torch.zeros_like(side.columns.value),
            None if side.columns.variance is None else torch.zeros_like(side.columns.variance),
        )
        d_pieces = (torch.zeros_like(pieces.keys), torch.zeros_like(pieces.values[..., :-1]))
        q_all, picks = _grouped(part.query, part), _grouped(chosen[entries], part)
        for rows, run in _runs(part, config):
            q = call.scale * q_all[:, :, rows].to(wide)
            do = _grouped(grad_output[entries, :, rows].to(wide), part)
            delta = (do * _grouped(output[entries, :, rows].to(wide), part)).sum(-1)
            if grad_lse is not None:
                delta = delta - _grouped(grad_lse[entries, :, rows].to(wide), part)
            rest = _grouped(lse[entries, :, rows], part)
            opened = picks[:, :, rows]
            d_rows = opened_backward(
                _of_entries(q, part), _of_entries(opened, part), pieces, _of_entries(rest, part),
                _of_entries(do, part), _of_entries(delta, part), *d_pieces,
            ).view_as(q)  # fmt: skip
            for block in run:
                at = slice(block.rows.start - rows.start, block.rows.stop - rows.start)
                for some in _heads_at_once(q, side, block):
                    d_rows[some, :, at] += dense_backward(
                        q[some, :, at], _of_heads(side, some), block, opened[some, :, at],
                        rest[some, :, at], do[some, :, at], delta[some, :, at],
                        (d_keys[some], d_values[some]),
                        tuple(None if t is None else t[some] for t in d_columns),  # type: ignore[arg-type]
                    )  # fmt: skip
            dq[entries, :, rows] = _ungrouped(call.scale * d_rows, part).to(dq.dtype)
        dk_part, dv_part = d_keys.view_as(part.key), d_values.view_as(part.value)
        for grads, total in zip(d_pieces, (dk_part, dv_part), strict=True):
            keys_of_pieces(pieces, part_index, grads, total)
        by_entry = [
            None if t is None else t.view(*part.key.shape[:2], *t.shape[1:]) for t in d_columns
        ]
        assert by_entry[0] is not None
        assert by_entry[1] is not None
        columns_backward(part, config, part_index, columns,
                         (by_entry[0], by_entry[1], by_entry[2]), dk_part, dv_part)  # fmt: skip
        length = part.key.shape[2]
        dk[entries, :, :length] = dk_part
        dv[entries, :, :length] = dv_part
    return dq, dk.to(call.key.dtype), dv.to(call.value.dtype)


def _parts(
    call: Call, config: HyperConfig, index: ChunkIndex
) -> Iterator[tuple[slice, Call, ChunkIndex]]:
    """Batch entries that are computed together: all, or one by one without their padding."""
    if call.key_lengths is None:
        yield slice(0, call.query.shape[0]), call, index
        return
    per_chunk = config.clusters_per_chunk
    for entry, length in enumerate(call.key_lengths.tolist()):
        one = slice(entry, entry + 1)
        length = min(max(length, 0), call.key.shape[2])
        if length == 0:
            continue
        full = length // config.chunk_size
        chunks = max(index.counts.shape[2] // per_chunk, 1)

        def cut(tensor: Tensor, full: int = full, one: slice = one, chunks: int = chunks) -> Tensor:
            return tensor[one, :, : tensor.shape[2] // chunks * full]

        yield (
            one,
            call._replace(
                query=call.query[one],
                key=call.key[one, :, :length],
                value=call.value[one, :, :length],
                key_lengths=None,
            ),
            ChunkIndex(*(cut(tensor) for tensor in index)),
        )


def _runs(call: Call, config: HyperConfig) -> Iterator[tuple[slice, list[Block]]]:
    """Consecutive blocks whose opened clusters are gathered at once."""
    batch, heads, n_q, dim = call.query.shape
    per_row = batch * heads * max(config.num_probes, 1) * max(dim, call.value.shape[-1])
    most = max(1, _ENTRIES_AT_ONCE // per_row)
    run: list[Block] = []
    for block in blocks(n_q, call.key.shape[2], call.query_offset, call.is_causal, config):
        if run and block.rows.stop - run[0].rows.start > most:
            yield slice(run[0].rows.start, run[-1].rows.stop), run
            run = []
        run.append(block)
    if run:
        yield slice(run[0].rows.start, run[-1].rows.stop), run


def _heads_at_once(q: Tensor, side: Side, block: Block) -> Iterator[slice]:
    count, group = q.shape[:2]
    width = side.columns.key.shape[1] + sum(keys.stop - keys.start for keys in block.keys)
    step = max(1, _SCORES_AT_ONCE // max(1, group * (block.rows.stop - block.rows.start) * width))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _side(call: Call, config: HyperConfig, index: ChunkIndex, columns: Columns) -> Side:
    wide = wide_dtype(call)
    key, value = without_padding(call)
    flat = Columns(*(None if t is None else t.flatten(0, 1) for t in columns))  # type: ignore[arg-type]
    flat_index = ChunkIndex(*(tensor.flatten(0, 1).unsqueeze(0) for tensor in index))
    return Side(key.to(wide).flatten(0, 1), value.to(wide).flatten(0, 1), flat, flat_index, config,
                call.is_causal, call.scale)  # fmt: skip


def _of_heads(side: Side, some: slice) -> Side:
    """The same for some of the key/value heads."""
    if some.start == 0 and some.stop == side.key.shape[0]:
        return side
    columns = Columns(*(None if t is None else t[some] for t in side.columns))  # type: ignore[arg-type]
    index = ChunkIndex(*(tensor[:, some] for tensor in side.lookup))
    return side._replace(key=side.key[some], value=side.value[some], columns=columns, lookup=index)


def _grouped(tensor: Tensor, call: Call) -> Tensor:
    """(B, H, rows, ...) to (B H_kv, G, rows, ...)."""
    group = call.query.shape[1] // call.key.shape[1]
    return tensor.reshape(tensor.shape[0] * call.key.shape[1], group, *tensor.shape[2:])


def _ungrouped(tensor: Tensor, call: Call) -> Tensor:
    return tensor.reshape(call.query.shape[0], call.query.shape[1], *tensor.shape[2:])


def _of_entries(tensor: Tensor, call: Call) -> Tensor:
    """(B H_kv, G, rows, ...) to (B, H_kv, G, rows, ...)."""
    return tensor.reshape(call.key.shape[0], call.key.shape[1], *tensor.shape[1:])


def _join(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """As `merge` of two parts, in the dtype of both."""
    top = torch.maximum(a_lse, b_lse)
    safe = top.masked_fill(top == float("-inf"), 0.0)  # -inf - -inf is NaN in rows without keys
    wa, wb = torch.exp(a_lse - safe), torch.exp(b_lse - safe)
    total = wa + wb
    scale = 1.0 / total.masked_fill(total == 0, 1.0)
    output = a * (wa * scale).unsqueeze(-1)
    output = output.addcmul_(b, (wb * scale).unsqueeze(-1))
    return output, safe + torch.log(total)
