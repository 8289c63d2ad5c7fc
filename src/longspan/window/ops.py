"""The operators behind window attention: opaque to tracing, both outputs differentiable.

One pair of operators serves dense and packed calls. A packed call passes (1, H, total, D) views
and cu_seqlens; causality is then aligned at the end of each sequence and `query_offset` is 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._validation import Call, VarlenCall
from .._varlen import sequence_bounds
from .config import WindowConfig

__all__ = ["window_bwd", "window_fwd"]


@torch.library.custom_op("longspan::window_fwd", mutates_args=())
def window_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
    query_offset: int,
    window: int,
    num_sinks: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, N_q, D_v) and lse (B, H, N_q); `impl` is "eager" or "triton"."""
    call = Call(query, key, value, key_lengths, is_causal, scale, query_offset)
    config = WindowConfig(window=window, num_sinks=num_sinks)
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if impl == "triton":
        from .impl.triton.forward import triton_forward

        return triton_forward(call, config, *packing)
    with torch.autocast(query.device.type, enabled=False):
        from .impl.eager import eager_forward

        if cu_seqlens_q is None or cu_seqlens_k is None:
            return eager_forward(call, config)
        wide = torch.float64 if query.dtype is torch.float64 else torch.float32
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        lse = query.new_empty(query.shape[:-1], dtype=wide)
        for rows, _, part in _sequences(
            call, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        ):
            output[:, :, rows], lse[:, :, rows] = eager_forward(part, config)
        return output, lse


@window_fwd.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return output, query.new_empty(query.shape[:-1], dtype=wide)


@torch.library.custom_op("longspan::window_bwd", mutates_args=())
def window_bwd(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
    query_offset: int,
    window: int,
    num_sinks: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous."""
    call = Call(query, key, value, key_lengths, is_causal, scale, query_offset)
    config = WindowConfig(window=window, num_sinks=num_sinks)
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if impl == "triton":
        from .impl.triton.backward import triton_backward

        return triton_backward(call, config, grad_output, grad_lse, output, lse, *packing)
    with torch.autocast(query.device.type, enabled=False):
        from .impl.eager import eager_backward

        if cu_seqlens_q is None or cu_seqlens_k is None:
            return eager_backward(call, config, grad_output, grad_lse, output, lse)
        dq, dk, dv = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
        for rows, keys, part in _sequences(
            call, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        ):
            part_lse = None if grad_lse is None else grad_lse[:, :, rows]
            dq[:, :, rows], dk[:, :, keys], dv[:, :, keys] = eager_backward(
                part, config, grad_output[:, :, rows], part_lse, output[:, :, rows], lse[:, :, rows]
            )
        return dq, dk, dv


@window_bwd.register_fake
def _(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, key_lengths, cu_seqlens_q, cu_seqlens_k, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, query, key, value, key_lengths, cu_seqlens_q, cu_seqlens_k)


def _backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(saved[0])
    return *window_bwd(grad_output, grad_lse, *saved, *ctx.settings), *(None,) * 11


window_fwd.register_autograd(_backward, setup_context=_setup_context)


def _sequences(
    call: Call, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> list[tuple[slice, slice, Call]]:
    """Rows, keys and a dense call for each sequence of a packed one."""
    packed = VarlenCall(
        call.query[0].transpose(0, 1),
        call.key[0].transpose(0, 1),
        call.value[0].transpose(0, 1),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        call.is_causal,
        call.scale,
    )
    parts = []
    for bounds in sequence_bounds("window_attention_varlen", packed):
        rows = slice(bounds.q_start, bounds.q_end)
        keys = slice(bounds.k_start, bounds.k_end)
        offset = (bounds.k_end - bounds.k_start) - (bounds.q_end - bounds.q_start)
        part = call._replace(
            query=call.query[:, :, rows],
            key=call.key[:, :, keys],
            value=call.value[:, :, keys],
            query_offset=offset,
        )
        parts.append((rows, keys, part))
    return parts
