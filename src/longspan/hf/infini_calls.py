"""Infini-attention of one layer: plain, padded, packed, and as a stream through a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..infini.api import infini_attention, infini_attention_varlen
from ..infini.state import InfiniState
from .cache_layer import holder_of
from .calls import Request, flat, put_back, real_first, take
from .infini_layer import InfiniLayer
from .masks import Layout
from .rotation import Angles, Rotation

__all__ = ["run_infini"]


def run_infini(
    request: Request, angles: Angles | None, mask: Tensor | None, documents: Layout | None
) -> Tensor:
    """(B, H, N_q, D_v); rows of padding are zero.

    Args:
        request: the call; query and key as the model rotated them.
        angles: cos and sin that it rotated them by.
        mask: (B, T), as `longspan_mask` makes it; None if all tokens are real.
        documents: packed documents, or None.
    """
    holder = holder_of(request.key)
    holder = holder if isinstance(holder, InfiniLayer) else None
    _check_keys(request, holder, documents)
    rotation: Rotation = request.route.rotation
    plain = rotation.unrotate(request.query, request.key, angles)
    if documents is not None:
        return _packed(request, plain, documents)
    if mask is not None:
        real = mask[:, mask.shape[1] - request.query.shape[2] :].bool()
        if holder is None:
            return _padded(request, plain, real)
        return _rows(request, plain, real, holder)
    state = holder.states[0] if holder is not None and holder.states else None
    if holder is not None and len(holder.states) > 1:  # padded before, and this mask was left out
        everyone = torch.ones_like(request.query[:, 0, :, 0], dtype=torch.bool)
        return _rows(request, plain, everyone, holder)
    output, state = _attend(request, plain, state)
    if holder is not None:
        holder.put((state,))
    return output


def _attend(
    request: Request, plain: tuple[Tensor, Tensor], state: InfiniState | None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, InfiniState]:  # fmt: skip
    """Tokens that follow those of `state`, one after the other in each row."""
    query, key = _placed(request, plain, 0 if state is None else state.seen)
    result = infini_attention(
        query, key, request.value, initial_state=state, key_lengths=key_lengths,
        memory_query=plain[0], memory_key=plain[1], **request.arguments,
    )  # fmt: skip
    if key_lengths is None:
        count = (query.shape[2], result.final_state.seen)
        request.route.count(() if torch.compiler.is_compiling() else (count,) * query.shape[0])
    return result.output, result.final_state


def _placed(request: Request, plain: tuple[Tensor, Tensor], seen: int) -> tuple[Tensor, Tensor]:
    """Queries and keys of the local part: from the second segment on, positions start again."""
    query, key, config = request.query, request.key, request.route.config
    length, count = config.segment_length, query.shape[2]
    if config.lag or seen + count <= length:
        return query, key
    first = max(length - seen, 0)  # rows of the first segment keep the model's own positions
    later = request.route.rotation.restarted(
        plain[0][:, :, first:], plain[1][:, :, first:], seen + first, length
    )
    if later is None:
        return query, key
    if first == 0:
        return later  # type: ignore[no-any-return]
    return (
        torch.cat((query[:, :, :first], later[0]), 2),
        torch.cat((key[:, :, :first], later[1]), 2),
    )


def _padded(request: Request, plain: tuple[Tensor, Tensor], real: Tensor) -> Tensor:
    """Padding anywhere, without a cache: move it to the right end of each row."""
    order = real_first(real)
    query, key, value, *plain_moved = (
        take(t, order) for t in (request.query, request.key, request.value, *plain)
    )
    moved = request._replace(query=query, key=key, value=value)
    lengths = real.sum(1, dtype=torch.int32)
    if not torch.compiler.is_compiling():
        request.route.count(tuple((n, n) for n in lengths.tolist()))
    output, _ = _attend(moved, (plain_moved[0], plain_moved[1]), None, lengths)
    return put_back(output, order, real)


def _rows(
    request: Request, plain: tuple[Tensor, Tensor], real: Tensor, holder: InfiniLayer
) -> Tensor:
    """A padded batch with a cache: every row is a stream of its own."""
    query, value = request.query, request.value
    outputs: list[Tensor] = []
    states: list[InfiniState] = []
    before: tuple[InfiniState | None, ...] = holder.rows() or (None,) * query.shape[0]
    for row, state in enumerate(before):
        columns = real[row].nonzero().squeeze(1)
        part = request._replace(
            query=query[row : row + 1, :, columns],
            key=request.key[row : row + 1, :, columns],
            value=value[row : row + 1, :, columns],
        )
        its_plain = (plain[0][row : row + 1, :, columns], plain[1][row : row + 1, :, columns])
        piece, after = _attend(part, its_plain, state)
        outputs.append(_back_in_place(piece, columns, query.shape[2]))
        states.append(after)
    holder.put(tuple(states))
    return torch.cat(outputs)


def _back_in_place(piece: Tensor, columns: Tensor, count: int) -> Tensor:
    whole = piece.new_zeros(1, piece.shape[1], count, piece.shape[3])
    return whole.index_copy(2, columns, piece)


def _packed(request: Request, plain: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
    """Documents one after the other in each row, each with a memory of its own."""
    batch, _, count, _ = request.query.shape
    request.route.count(layout.lengths)
    query, key, value, plain_query, plain_key = (
        flat(t) for t in (request.query, request.key, request.value, *plain)
    )
    output = infini_attention_varlen(
        query, key, value, layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_seqlen_q,
        layout.max_seqlen_k, memory_query=plain_query, memory_key=plain_key, **request.arguments,
    )  # fmt: skip
    return output.reshape(batch, count, *output.shape[1:]).transpose(1, 2)


def _check_keys(request: Request, holder: Any, documents: Layout | None) -> None:
    n_q, n_k = request.query.shape[2], request.key.shape[2]
    if n_q != n_k:
        raise UnsupportedError(
            f"past_key_values: {request.route.name} got {n_q} queries and {n_k} keys, but "
            "Infini-attention keeps a memory instead of old keys, which come rotated from a cache. "
            "Pass past_key_values=longspan.hf.make_cache(model), or use_cache=False."
        )
    if holder is not None and documents is not None:
        raise UnsupportedError(
            f"position_ids: packed documents reached {request.route.name} together with a cache, "
            "which holds one stream a row. Pass one document per row, or use_cache=False."
        )
