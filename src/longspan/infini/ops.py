"""The operators behind the Triton kernels: opaque to tracing, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._triton.launch import interpreting

__all__ = [
    "MAX_ROWS",
    "StatesAndInputs",
    "infini_decode",
    "infini_delta_states",
    "infini_mix",
    "infini_states",
]

MAX_ROWS = 16  # query rows times heads of a group that decoding takes at once


@torch.library.custom_op("longspan::infini_states", mutates_args=())
def infini_states(
    key: Tensor,
    value: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    key_lengths: Tensor | None,
    length: int,
    segments: int,
) -> tuple[Tensor, Tensor]:
    """States before each segment, linear rule: (B, H_kv, S + 1, D, D_v), (B, H_kv, S + 1, D)."""
    _prepare()
    from .impl.triton.scan import scan_states
    from .impl.triton.sums import segment_sums

    states, totals = segment_sums(key, value, key_lengths, length, segments)
    states[:, :, 0], totals[:, :, 0] = memory, normaliser
    return scan_states(states), scan_states(totals)


@infini_states.register_fake
def _(
    key: Tensor,
    value: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    key_lengths: Tensor | None,
    length: int,
    segments: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, _, dim = key.shape
    shape = (batch, heads, segments + 1, dim)
    states = key.new_empty((*shape, value.shape[-1]), dtype=torch.float32)
    return states, key.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("longspan::infini_states_bwd", mutates_args=())
def infini_states_bwd(
    grad_states: Tensor,
    grad_totals: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    length: int,
    segments: int,
    more_key: Tensor | None,
    more_value: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of key, value, memory and normaliser; `more_...` are added to the first two."""
    _prepare()
    from .impl.triton.scan import scan_states
    from .impl.triton.sums import segment_sums_backward

    states = scan_states(grad_states.contiguous(), reverse=True, in_place=False)
    totals = scan_states(grad_totals.contiguous(), reverse=True, in_place=False)
    dk, dv = segment_sums_backward(
        states, totals, key, value, key_lengths, length, segments,
        more_key=more_key, more_value=more_value,
    )  # fmt: skip
    return dk, dv, states[:, :, 0].clone(), totals[:, :, 0].clone()


@infini_states_bwd.register_fake
def _(
    grad_states: Tensor,
    grad_totals: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    length: int,
    segments: int,
    more_key: Tensor | None,
    more_value: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = (key, value, grad_states[:, :, 0], grad_totals[:, :, 0])
    dk, dv, memory, normaliser = (t.new_empty(t.shape) for t in made)
    return dk, dv, memory, normaliser


def _states_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    key, value, _, _, key_lengths, *ctx.settings = inputs
    ctx.save_for_backward(key, value, key_lengths)


def _states_backward(ctx: Any, grad_states: Tensor, grad_totals: Tensor) -> tuple[Any, ...]:
    grads = infini_states_bwd(
        grad_states, grad_totals, *ctx.saved_tensors, *ctx.settings, None, None
    )
    return *grads, None, None, None


infini_states.register_autograd(_states_backward, setup_context=_states_context)


@torch.library.custom_op("longspan::infini_delta_states", mutates_args=())
def infini_delta_states(
    key: Tensor,
    value: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    key_lengths: Tensor | None,
    length: int,
    segments: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `infini_states` by the delta rule, and P of each segment (B, H_kv, S, D, D)."""
    _prepare()
    from .impl.triton.delta import delta_states

    return delta_states(key, value, memory, normaliser, key_lengths, length, segments)


@infini_delta_states.register_fake
def _(
    key: Tensor,
    value: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    key_lengths: Tensor | None,
    length: int,
    segments: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _, dim = key.shape
    wide = torch.float32
    states = key.new_empty((batch, heads, segments + 1, dim, value.shape[-1]), dtype=wide)
    totals = key.new_empty((batch, heads, segments + 1, dim), dtype=wide)
    return states, totals, key.new_empty((batch, heads, segments, dim, dim), dtype=wide)


@torch.library.custom_op("longspan::infini_delta_states_bwd", mutates_args=())
def infini_delta_states_bwd(
    grad_states: Tensor,
    grad_totals: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    states: Tensor,
    totals: Tensor,
    maps: Tensor,
    length: int,
    more_key: Tensor | None,
    more_value: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of key, value, memory and normaliser; `more_...` are added to the first two."""
    _prepare()
    from .impl.triton.delta import delta_states_backward

    return delta_states_backward(
        grad_states, grad_totals, key, value, key_lengths, states, totals, maps, length, more_key,
        more_value,
    )  # fmt: skip


@infini_delta_states_bwd.register_fake
def _(
    grad_states: Tensor, grad_totals: Tensor, key: Tensor, value: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = (key, value, grad_states[:, :, 0], grad_totals[:, :, 0])
    dk, dv, memory, normaliser = (t.new_empty(t.shape) for t in made)
    return dk, dv, memory, normaliser


class StatesAndInputs(torch.autograd.Function):
    """States before each segment, and the key and value again, for the local attention to use.

    Gradients of the local attention arrive here and are added where those of the states are
    written; autograd by itself would read all of them once more.
    """

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, memory: Tensor, normaliser: Tensor,
        key_lengths: Tensor | None, length: int, segments: int, is_delta: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """States and normalisers before each segment; key and value as they came."""
        ctx.set_materialize_grads(False)
        ctx.settings = (length, segments, is_delta)
        inputs = (key, value, memory, normaliser, key_lengths, length, segments)
        if is_delta:
            states, totals, maps = infini_delta_states(*inputs)
            ctx.save_for_backward(key, value, key_lengths, states, totals, maps)
        else:
            states, totals = infini_states(*inputs)
            ctx.save_for_backward(key, value, key_lengths)
        return states, totals, key.view_as(key), value.view_as(value)

    @staticmethod
    def backward(
        ctx: Any, grad_states: Tensor | None, grad_totals: Tensor | None,
        more_key: Tensor | None, more_value: Tensor | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Gradients of key, value, memory and normaliser."""
        key, value, key_lengths, *kept = ctx.saved_tensors
        if grad_states is None and grad_totals is None:
            return more_key, more_value, *(None,) * 6
        length, segments, is_delta = ctx.settings
        batch, heads, _, dim = key.shape
        shape = (batch, heads, segments + 1, dim)
        if grad_states is None:
            grad_states = key.new_zeros((*shape, value.shape[-1]), dtype=torch.float32)
        if grad_totals is None:
            grad_totals = key.new_zeros(shape, dtype=torch.float32)
        inputs, more = (grad_states, grad_totals, key, value, key_lengths), (more_key, more_value)
        if is_delta:
            grads = infini_delta_states_bwd(*inputs, *kept, length, *more)
        else:
            grads = infini_states_bwd(*inputs, length, segments, *more)
        return *grads, None, None, None, None


@torch.library.custom_op("longspan::infini_mix", mutates_args=())
def infini_mix(
    query: Tensor,
    local: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    gate: Tensor,
    written: Tensor,
    key_lengths: Tensor | None,
    length: int,
    lag: int,
    query_offset: int,
    n_k: int,
    local_first: bool,
) -> Tensor:
    """g sigma(q) M / (sigma(q) z) + (1 - g) local, (B, H, N_q, D_v), contiguous."""
    _prepare()
    from .impl.triton.mix import Layout, mix

    layout = Layout(length, lag, query_offset, n_k, local_first)
    return mix(query, local, memory, normaliser, gate, written, key_lengths, layout)


@infini_mix.register_fake
def _(query: Tensor, local: Tensor, *_rest: Any) -> Tensor:
    return local.new_empty(local.shape)


@torch.library.custom_op("longspan::infini_mix_bwd", mutates_args=())
def infini_mix_bwd(
    grad: Tensor,
    query: Tensor,
    local: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    gate: Tensor,
    written: Tensor,
    key_lengths: Tensor | None,
    length: int,
    lag: int,
    query_offset: int,
    n_k: int,
    local_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, local, memory, normaliser and gate."""
    _prepare()
    from .impl.triton.mix import Layout
    from .impl.triton.mix_bwd import mix_backward

    layout = Layout(length, lag, query_offset, n_k, local_first)
    return mix_backward(grad, query, local, memory, normaliser, gate, written, key_lengths, layout)


@infini_mix_bwd.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    local: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    gate: Tensor,
    *_rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = (query, local, memory, normaliser, gate)
    dq, dlocal, dm, dz, dgate = (t.new_empty(t.shape) for t in made)
    return dq, dlocal, dm, dz, dgate


def _mix_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, _, _, _, _ = inputs
    ctx.settings = inputs[len(tensors) :]
    ctx.save_for_backward(*tensors)


def _mix_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = infini_mix_bwd(grad, *ctx.saved_tensors, *ctx.settings)
    return *grads, *(None,) * 7


infini_mix.register_autograd(_mix_backward, setup_context=_mix_context)


@torch.library.custom_op("longspan::infini_decode", mutates_args=())
def infini_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_query: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    gate: Tensor,
    written: Tensor,
    length: int,
    lag: int,
    query_offset: int,
    local_first: bool,
    scale: float,
) -> Tensor:
    """Output (B, H, N_q, D_v) of a few rows of one segment; no gradients."""
    _prepare()
    from .impl.triton.decode import decode
    from .impl.triton.mix import Layout

    layout = Layout(length, lag, query_offset, key.shape[2], local_first)
    return decode(query, key, value, memory_query, memory, normaliser, gate, written, layout, scale)


@infini_decode.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_rest: Any) -> Tensor:
    return value.new_empty((*query.shape[:3], value.shape[-1]))


def _prepare() -> None:
    if interpreting():
        from .._triton.interpreter import repair_interpreter

        repair_interpreter()
