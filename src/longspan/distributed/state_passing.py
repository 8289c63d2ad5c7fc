"""Infini-attention over several ranks: only memories move, whatever the length is.

A rank's tokens map the memory they find, M -> A M + B (A = 1 for the linear rule). Each rank makes
the map of its own tokens, the ranks exchange the maps once, and each composes those before it into
the memory that its own tokens start from. The delta rules read through the normaliser z, which does
not depend on M: its sums are exchanged first. The backward is the same exchange the other way
round, by the gradient of an all-to-all.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._select import choose_impl
from .._validation import validate
from ..errors import ConfigError, UnsupportedError
from ..infini.api import InfiniOutput, _run, implementations
from ..infini.call import InfiniCall, make_call
from ..infini.config import InfiniConfig
from ..infini.impl.eager import _mixed, assemble
from ..infini.impl.memory import memory_states
from ..infini.impl.parts import local_attention, needed_states, plan
from ..infini.ops import infini_mix, infini_states
from ..infini.state import InfiniState
from ..types import Impl
from .checks import check_local, describe, verified
from .exchange import Message, fetch_rows, gather_ranks, start_transfer, tie
from .group import ContextGroup
from .layout import SequenceLayout, Span
from .tiles import local_lengths

__all__ = ["infini_attention_across_ranks"]

_NAME = "infini_attention_across_ranks"
_PER_KEY = (
    "key",
    "value",
    "memory_key",
    "write_gate",
    "log_decay",
)  # what a state holds of a token


class _Exchange(NamedTuple):
    """The group, and what all that is sent depends on, so that all ranks take part backward."""

    group: ContextGroup
    anchors: list[Tensor]

    def gather(self, tensor: Tensor) -> Tensor:
        """(size, ...) of all ranks."""
        return gather_ranks(tie(tensor, *self.anchors), self.group)


class _Rows(NamedTuple):
    """What belongs to keys, (B, H_kv, n, ...) each; None where the call has no such thing."""

    key: Tensor
    value: Tensor
    memory_key: Tensor | None
    write_gate: Tensor | None
    log_decay: Tensor | None

    def map(self, function: Any) -> _Rows:
        made = (None if tensor is None else function(tensor) for tensor in self)
        return _Rows(*made)  # type: ignore[arg-type]


def infini_attention_across_ranks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: ContextGroup,
    layout: SequenceLayout,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    gate: Tensor | None = None,
    memory_query: Tensor | None = None,
    memory_key: Tensor | None = None,
    write_gate: Tensor | None = None,
    log_decay: Tensor | None = None,
    initial_state: InfiniState | None = None,
    config: InfiniConfig = InfiniConfig(),
    impl: Impl | str = "auto",
) -> InfiniOutput:
    """Infini-attention over a sequence that is spread over ranks, by passing memories.

    Args:
        query: (B, H, n, D), the tokens that `layout` gives this rank.
        key, value: (B, H_kv, n, D) and (B, H_kv, n, D_v).
        group: the ranks that share the sequence.
        layout: "contiguous", cut at segment bounds: multiple=config.segment_length.
        key_lengths: (B,), int32, valid keys of each entry of the whole sequence.
        memory_query, memory_key, write_gate, log_decay: this rank's tokens, as query and key.
        gate: (H,); its gradient is this rank's share, and the sum over ranks is the whole.
        initial_state: of all heads, equal on all ranks, at the end of a segment; what an earlier
            call returned. Gradients of its tensors are shares, too.
        is_causal, scale, enable_gqa, config, impl: as in `infini_attention`.

    Returns:
        InfiniOutput(output (B, H, n, D_v), this rank's tokens; final_state, that of the whole
        sequence, equal on all ranks). A loss on the state belongs on one rank.

    Raises:
        ShapeError: a tensor is not this rank's share.
        ConfigError: a layout that does not cut at segment bounds; a state amid a segment.
        UnsupportedError: a zigzag layout, or packed documents.
        RankError: ranks differ (found before the first exchange), or one stopped.

    Semantics:
        Equals one process up to the order of sums; gradients, too.

    Cost:
        Received per rank and call, forward, in float32: with M = B H_kv (F D_v + F) numbers, R M
        for update="linear"; R (M + B H_kv F^2) for the delta rules; the same again backward.
        local="sliding" also fetches one segment of keys and values. Nothing grows with N.
        "delta_corrected" finds z rank after rank. The maps of the delta rules cost F x F
        products per segment more than one process pays.

    Example:
        layout = SequenceLayout(length=n, ranks=group.size, kind="contiguous", multiple=2048)
        out, state = infini_attention_across_ranks(q, k, v, gate=gate, group=group, layout=layout)

    References:
        Munkhdalai et al., Leave No Context Behind, 2024, arXiv:2404.07143.
    """
    settings = {"is_causal": is_causal, "scale": scale, "config": config, "layout": layout,
                "impl": str(impl), "initial_state": _state_kind(initial_state)}  # fmt: skip
    extra = {"memory_query": memory_query, "memory_key": memory_key, "write_gate": write_gate,
             "log_decay": log_decay}  # fmt: skip
    with verified(_NAME, group) as shared:
        _check_layout(layout, config, initial_state)
        check_local(_NAME, group, layout, {"query": query, "key": key, "value": value})
        call = validate(
            _NAME, query, key, value, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
            key_lengths=key_lengths,
        )  # fmt: skip
        chosen = choose_impl(_NAME, impl, implementations(call, config))
        named = {**extra, "gate": gate}
        own = make_call(_NAME, call, config, initial_state=None, **named)  # checks
        if initial_state is not None:  # checked here, used where the sequence starts
            make_call(_NAME, call, config, initial_state=initial_state, **named)
        shared.update(describe(
            {"query": call.query, "key": call.key, "value": call.value, "gate": gate,
             "key_lengths": key_lengths, **extra}, settings,
        ))  # fmt: skip
    start = initial_state
    if start is None:
        batch, kv_heads, _, head_dim = call.key.shape
        start = InfiniState.empty(
            config, batch, kv_heads, head_dim, call.value.shape[3], dtype=call.key.dtype,
            device=call.key.device,
        )  # fmt: skip
    with torch.autocast(query.device.type, enabled=False):
        return _pass_states(own, call.key_lengths, start, chosen, group, layout)


def _pass_states(
    own: InfiniCall,
    key_lengths: Tensor | None,
    start: InfiniState,
    chosen: Impl,
    group: ContextGroup,
    layout: SequenceLayout,
) -> InfiniOutput:
    config = own.config
    length, lag, rank = config.segment_length, config.lag, group.rank
    chunk = layout.chunk(rank)
    rows = _Rows(own.key, own.value, own.memory_key if own.own_memory_key else None,
                 own.write_gate, own.log_decay)  # fmt: skip
    held = _held_before(rows, start, group, layout, lag * length)
    call = _joined(own, held, chunk, key_lengths)
    # Segments that this rank writes: those it holds in front, and its own but the last `lag`.
    count = max(call.key.shape[2] // length - lag, 0)
    # A rank that writes nothing sends zeros; their gradients must be wanted where others' are.
    anchors = [*_tensors(rows), *(getattr(start, name) for name in _PER_KEY)]
    anchors = [tensor for tensor in anchors if tensor is not None and tensor.requires_grad]
    exchange = _Exchange(group, anchors)
    before = max(start.key.shape[2] + chunk.start - held.key.shape[2], 0)  # tokens written
    call = call._replace(written=_written(start, before, key_lengths))
    run = _linear if config.update == "linear" else _affine
    output, memory, normaliser = run(call, count, start, chosen, exchange)
    final = _final_state(rows, memory, normaliser, start, key_lengths, group, layout)
    # Every exchange gets its backward on every rank, whatever is done with the state.
    ends = (getattr(final, name) for name in ("memory", "normaliser", *_PER_KEY))
    return InfiniOutput(tie(output, *_tensors(held), *(t for t in ends if t is not None)), final)


def _held_before(
    rows: _Rows, start: InfiniState, group: ContextGroup, layout: SequenceLayout, reach: int
) -> _Rows:
    """The last `reach` tokens before this rank's: seen exactly, not in the memory yet."""
    if reach == 0:
        return rows.map(lambda tensor: tensor[:, :, :0])
    starts = [layout.chunk(rank).start for rank in range(group.size)]
    wanted = tuple((Span(max(stop - reach, 0), stop),) if stop else () for stop in starts)
    fetched = rows.map(lambda tensor: fetch_rows(tensor, group, layout, wanted))
    if starts[group.rank] > 0:
        return fetched
    first = _Rows(start.key, start.value, start.memory_key, start.write_gate, start.log_decay)
    came = [tensor for tensor in fetched if tensor is not None]
    return first._replace(key=tie(first.key, *came))


def _joined(own: InfiniCall, held: _Rows, chunk: Span, key_lengths: Tensor | None) -> InfiniCall:
    """The call over the tokens held in front and this rank's own, from an empty memory."""
    count = held.key.shape[2]

    def join(name: str, tensor: Tensor | None) -> Tensor | None:
        front = getattr(held, name)
        return tensor if tensor is None or front is None else torch.cat((front, tensor), 2)

    key, value = torch.cat((held.key, own.key), 2), torch.cat((held.value, own.value), 2)
    memory_key = join("memory_key", own.memory_key) if own.own_memory_key else key
    assert memory_key is not None
    lengths = None
    if key_lengths is not None:
        # In front of the sequence's start lies a state, all of whose tokens are valid.
        first = chunk.start - count
        lengths = local_lengths(key_lengths, (Span(max(first, 0), chunk.stop),))
        assert lengths is not None
        lengths = lengths + max(-first, 0)
    return own._replace(
        key=key, value=value, memory_key=memory_key, write_gate=join("write_gate", own.write_gate),
        log_decay=join("log_decay", own.log_decay), key_lengths=lengths, query_offset=count,
        starts_empty=False,
    )  # fmt: skip


def _linear(
    call: InfiniCall, count: int, start: InfiniState, chosen: Impl, exchange: _Exchange
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and memory and normaliser at the end: states from an empty memory are made once, and
    what comes from other ranks is added to them."""
    config, rank = call.config, exchange.group.rank
    parts = plan(call)
    needed = needed_states(call, parts)
    if chosen is Impl.TRITON:
        memory, normaliser = infini_states(
            call.memory_key, call.value, call.memory, call.normaliser, call.key_lengths,
            config.segment_length, needed,
        )  # fmt: skip
    else:
        memory, normaliser = memory_states(call, needed)
    mine = torch.cat((memory[:, :, count], normaliser[:, :, count].unsqueeze(-1)), -1)
    memories, normalisers = [start.memory], [start.normaliser]
    for share in exchange.gather(mine):
        memories.append(memories[-1] + share[..., :-1])
        normalisers.append(normalisers[-1] + share[..., -1])
    memory = memory + memories[rank].unsqueeze(2)
    normaliser = normaliser + normalisers[rank].unsqueeze(2)
    if chosen is Impl.TRITON:
        output = infini_mix(
            call.memory_query, assemble(call, [local_attention(call, part) for part in parts]),
            memory, normaliser, call.gate, call.written, call.key_lengths, config.segment_length,
            config.lag, call.query_offset, call.key.shape[2], config.first_segment == "local",
        )  # fmt: skip
    else:
        output = assemble(call, [_mixed(call, part, memory, normaliser) for part in parts])
    return output, memories[-1], normalisers[-1]


def _affine(
    call: InfiniCall, count: int, start: InfiniState, chosen: Impl, exchange: _Exchange
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the delta rules: maps are exchanged, then the call runs from what arrives."""
    rank = exchange.group.rank
    normalisers = _normalisers(call, count, start, exchange)
    memories = _memories(*_map_of(call, count, normalisers[rank]), start, exchange)
    call = call._replace(memory=memories[rank], normaliser=normalisers[rank])
    return _run(call, chosen)[0], memories[-1], normalisers[-1]


def _normalisers(
    call: InfiniCall, count: int, start: InfiniState, exchange: _Exchange
) -> list[Tensor]:
    """z before each rank's segments, and after the last."""
    if not call.config.has_normaliser:
        return [start.normaliser] * (exchange.group.size + 1)
    config, first = call.config, start.normaliser.detach()
    if config.update == "delta_corrected":
        first = _arriving_normaliser(call, count, first, exchange.group)
    else:  # the same z, by a rule whose memory costs nothing to speak of
        config = dataclasses.replace(config, update="linear")
    probe = call._replace(
        config=config,
        normaliser=first,
        memory=call.memory[..., :1],
        value=torch.zeros_like(call.value[..., :1]),
    )
    mine = memory_states(probe, count)[1][:, :, -1] - first
    found = [start.normaliser]
    for share in exchange.gather(mine):
        found.append(found[-1] + share)
    return found


def _arriving_normaliser(
    call: InfiniCall, count: int, first: Tensor, group: ContextGroup
) -> Tensor:
    """z as the ranks before leave it, where it depends on what they found: one after the other."""
    if group.rank > 0:
        first = torch.empty_like(first)
        start_transfer(group, _NAME, [], [Message(first, group.rank - 1)]).wait()
    if group.rank + 1 < group.size:
        with torch.no_grad():
            leaving = memory_states(call._replace(normaliser=first), count)[1][:, :, -1]
        start_transfer(group, _NAME, [Message(leaving, group.rank + 1)], []).wait()
    return first


def _map_of(call: InfiniCall, count: int, normaliser: Tensor) -> tuple[Tensor, Tensor]:
    """A (B, H_kv, F, F) and B (B, H_kv, F, D_v) of this rank's segments."""
    size, width = call.memory.shape[-2:]
    zero = torch.zeros_like(call.memory)
    # One walk for both: columns that start at 0 and write values, and columns that start at 1.
    eye = torch.eye(size, dtype=zero.dtype, device=zero.device).expand(*zero.shape[:2], -1, -1)
    nothing = call.value.new_zeros((*call.value.shape[:3], size))
    probe = call._replace(
        memory=torch.cat((zero, eye), -1),
        value=torch.cat((call.value, nothing), -1),
        normaliser=normaliser,
    )
    both = memory_states(probe, count)[0][:, :, -1]
    return both[..., width:], both[..., :width]


def _memories(maps: Tensor, added: Tensor, start: InfiniState, exchange: _Exchange) -> list[Tensor]:
    """The memory before each rank's segments, and after the last."""
    found, size = [start.memory], maps.shape[-1]
    for both in exchange.gather(torch.cat((maps, added), -1)):
        found.append(both[..., :size] @ found[-1] + both[..., size:])
    return found


def _written(start: InfiniState, tokens: int, key_lengths: Tensor | None) -> Tensor:
    """(B,) valid tokens in the memory once `tokens` have been folded, those held by `start`
    first."""
    added = torch.full_like(start.written, tokens)
    if key_lengths is not None:
        limit = key_lengths.to(added.dtype) + start.key.shape[2]
        added = torch.minimum(added, limit)
    return start.written + added


def _final_state(
    rows: _Rows,
    memory: Tensor,
    normaliser: Tensor,
    start: InfiniState,
    key_lengths: Tensor | None,
    group: ContextGroup,
    layout: SequenceLayout,
) -> InfiniState:
    """The state after the whole sequence, on every rank."""
    config, held = start.config, start.key.shape[2]
    length = config.segment_length
    folded = max((held + layout.length) // length - config.lag, 0) * length
    first = max(folded - held, 0)
    wanted = ((Span(first, layout.length),) if first < layout.length else (),) * group.size
    last = rows.map(lambda tensor: fetch_rows(tensor, group, layout, wanted))
    rest: dict[str, Tensor | None] = {}
    for name, tensor in zip(_PER_KEY, last, strict=True):
        front = getattr(start, name)
        if tensor is not None and front is not None and folded < held:
            tensor = torch.cat((front[:, :, folded:], tensor), 2)
        rest[name] = tensor
    return InfiniState(
        memory=memory,
        normaliser=normaliser,
        written=_written(start, folded, key_lengths),
        seen=start.seen + layout.length,
        config=config,
        can_continue=key_lengths is None,
        **rest,  # type: ignore[arg-type]
    )


def _state_kind(state: InfiniState | None) -> str:
    """What must be equal of a state on all ranks, as far as can be told without reading it."""
    if state is None:
        return "None"
    wanted = [n for n in state._fields if getattr(getattr(state, n), "requires_grad", False)]
    return f"{state.seen} tokens seen, {state.key.shape[2]} held, gradients of {wanted}"


def _tensors(rows: _Rows) -> list[Tensor]:
    return [tensor for tensor in rows if tensor is not None]


def _check_layout(
    layout: SequenceLayout, config: InfiniConfig, initial_state: InfiniState | None
) -> None:
    if not isinstance(config, InfiniConfig):
        raise ConfigError(
            f"{_NAME}: config is a {type(config).__name__}; it must be an InfiniConfig. Other "
            "mechanisms run with ring_attention or ulysses_attention."
        )
    if layout.cu_seqlens is not None:
        raise UnsupportedError(
            f"{_NAME}: layout has packed documents, whose segments start at each document. Use "
            "ulysses_attention_varlen."
        )
    if layout.ranks > 1 and layout.kind != "contiguous":
        raise UnsupportedError(
            f"{_NAME}: layout is {layout.kind!r}; memories pass from a rank to the next, so it "
            "must be 'contiguous'. The work is balanced as it is."
        )
    if layout.ranks > 1 and layout.multiple % config.segment_length:
        raise ConfigError(
            f"{_NAME}: layout cuts at multiples of {layout.multiple}, segments have "
            f"{config.segment_length} tokens. Make it with multiple={config.segment_length}."
        )
    if initial_state is not None and not initial_state.at_boundary and layout.ranks > 1:
        raise ConfigError(
            f"{_NAME}: initial_state has seen {initial_state.seen} tokens, which is amid a segment "
            f"of {config.segment_length}; it must be at the end of one. Run the tokens up to there "
            "with infini_attention_chunk."
        )
