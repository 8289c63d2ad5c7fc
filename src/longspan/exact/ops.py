"""The operators behind exact attention with lse: opaque to tracing, both outputs differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._validation import Call


@torch.library.custom_op("longspan::exact_fwd", mutates_args=())
def exact_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
    scale: float,
    query_offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, N_q, D_v) and lse (B, H, N_q)."""
    from .impl.eager import eager_forward

    call = Call(query, key, value, key_lengths, is_causal, scale, query_offset)
    with torch.autocast(query.device.type, enabled=False):
        return eager_forward(call, attn_mask, backend)


@exact_fwd.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
    scale: float,
    query_offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return output, query.new_empty(query.shape[:-1], dtype=wide)


@torch.library.custom_op("longspan::exact_bwd", mutates_args=())
def exact_bwd(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
    scale: float,
    query_offset: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    from .impl.eager import eager_backward

    call = Call(query, key, value, key_lengths, is_causal, scale, query_offset)
    with torch.autocast(query.device.type, enabled=False):
        grads = eager_backward(call, attn_mask, backend, grad_output, grad_lse, output, lse)
    dq, dk, dv = (grad.contiguous() for grad in grads)
    return dq, dk, dv


@exact_bwd.register_fake
def _(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, attn_mask, key_lengths, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, attn_mask, key_lengths)


def _backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, output, lse, attn_mask, key_lengths = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    grads = exact_bwd(
        grad_output,
        grad_lse,
        query,
        key,
        value,
        output,
        lse,
        attn_mask,
        key_lengths,
        *ctx.settings,
    )
    return *grads, None, None, None, None, None, None


exact_fwd.register_autograd(_backward, setup_context=_setup_context)
