"""Operator schemas, fakes and autograd links of stick-breaking attention. Imports torch only.

One pair of operators serves dense calls, (B, H, N, D), and packed calls, (total, H, D) with
`cu_seqlens`; the string `impl` ("eager" or "triton") says which code runs, and is imported then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._triton.launch import interpreting
from .impl.common import Settings, wide_dtype

__all__ = ["stick_breaking_bwd", "stick_breaking_fwd"]

_INPUTS = "Tensor query, Tensor key, Tensor value"
_SETTINGS = (  # the fields of impl.common.Settings
    "Tensor? logit_bias, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, SymInt query_offset, "
    "bool attend_current, SymInt? window, float? early_stop, float? gate_threshold"
)


@torch.library.custom_op(
    "longspan::stick_breaking_fwd",
    mutates_args=(),
    schema=f"({_INPUTS}, {_SETTINGS}, bool need_grad, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def stick_breaking_fwd(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, log_rest, residual, visited).

    output: (B, H, N_q, D_v) or (total_q, H, D_v), contiguous, in the dtype of query.
    log_rest: (B, H, N_q) or (total_q, H), float32 (float64 for float64 inputs).
    residual: what else the backward of `impl` needs; empty if it needs nothing.
    visited: (B or S, H, query blocks), int32: key tiles walked, in the tiles of `impl`.
    """
    *fields, need_grad, impl = rest
    settings = Settings(*fields)
    if impl == "triton":
        return _triton_forward(query, key, value, settings, need_grad)
    if settings.cu_seqlens_q is not None:
        from .impl.packed import packed_forward as forward
    else:
        from .impl.eager import eager_forward as forward
    # the inputs are cast already; autocast must not round the float32 sums of the walk
    with torch.autocast(query.device.type, enabled=False):
        part = forward(query, key, value, settings)
    residual = part.total if need_grad else part.total.new_empty(0)
    return part.output, part.log_rest, residual, part.visited


@stick_breaking_fwd.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *fields, need_grad, impl = rest
    settings = Settings(*fields)
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    log_rest = query.new_empty(query.shape[:-1], dtype=wide_dtype(query.dtype))
    if impl == "triton":
        block, residual = _triton_scratch(query, value, output, need_grad)
    else:
        from .impl.walk import QUERY_BLOCK as block

        shape = query.shape[:-1] if need_grad else (0,)
        residual = query.new_empty(shape, dtype=torch.float64)
    if settings.cu_seqlens_q is not None:
        lead, n_q = settings.cu_seqlens_q.shape[0] - 1, settings.max_seqlen_q
    else:
        lead, n_q = query.shape[0], query.shape[2]
    heads = query.shape[1]
    visited = query.new_empty((lead, heads, (n_q + block - 1) // block), dtype=torch.int32)
    return output, log_rest, residual, visited


@torch.library.custom_op(
    "longspan::stick_breaking_bwd",
    mutates_args=(),
    schema=f"(Tensor grad_output, Tensor grad_log_rest, {_INPUTS}, Tensor output, "
    f"Tensor log_rest, Tensor residual, Tensor visited, {_SETTINGS}, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def stick_breaking_bwd(
    grad_output: Tensor,
    grad_log_rest: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_rest: Tensor,
    residual: Tensor,
    visited: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and logit_bias (empty without one)."""
    *fields, impl = rest
    settings = Settings(*fields)
    if impl == "triton":
        return _triton_backward(
            grad_output,
            grad_log_rest,
            query,
            key,
            value,
            output,
            residual,
            log_rest,
            visited,
            settings,
        )
    if settings.cu_seqlens_q is not None:
        from .impl.packed import packed_backward as backward
    else:
        from .impl.eager import eager_backward as backward
    with torch.autocast(query.device.type, enabled=False):
        part = backward(grad_output, grad_log_rest, query, key, value, residual, visited, settings)
    bias = settings.logit_bias
    dbias = query.new_empty(0) if bias is None else part.logit_bias.to(bias.dtype)
    dq, dk, dv = (t.contiguous() for t in (part.query, part.key, part.value))  # as the fake says
    return dq, dk, dv, dbias


@stick_breaking_bwd.register_fake
def _(
    grad_output: Tensor,
    grad_log_rest: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = rest[4]
    dbias = query.new_empty(0) if bias is None else torch.empty_like(bias)
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        dbias,
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, *fields, need_grad, impl = inputs
    settings = Settings(*fields)
    ctx.save_for_backward(query, key, value, *output, *settings[:4])
    ctx.mark_non_differentiable(*output[2:])
    ctx.fields, ctx.need_grad, ctx.impl = settings[4:], need_grad, impl


def _backward(ctx: Any, grad_output: Tensor | None, grad_log_rest: Tensor | None, *_: Any) -> Any:
    assert ctx.need_grad, "the forward was told that no gradient is needed"
    query, key, value, output, log_rest, residual, visited, *tensors = ctx.saved_tensors
    dq, dk, dv, dbias = stick_breaking_bwd(
        torch.zeros_like(output) if grad_output is None else grad_output,
        torch.zeros_like(log_rest) if grad_log_rest is None else grad_log_rest,
        query,
        key,
        value,
        output,
        log_rest,
        residual,
        visited,
        *tensors,
        *ctx.fields,
        ctx.impl,
    )
    rest = len(Settings._fields) - 1 + 2
    return dq, dk, dv, dbias if tensors[0] is not None else None, *([None] * rest)


stick_breaking_fwd.register_autograd(_backward, setup_context=_setup_context)


def _triton_forward(
    query: Tensor, key: Tensor, value: Tensor, settings: Settings, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if interpreting():
        from .._triton.interpreter import repair_interpreter

        repair_interpreter()
    from .impl.triton.decode import MAX_ROWS, stick_decode
    from .impl.triton.forward import forward_config, stick_forward

    named = _kernel_settings(settings)
    if settings.cu_seqlens_q is None and not need_grad:
        rows = query.shape[1] // max(key.shape[1], 1) * query.shape[2]
        block = forward_config(query.dtype, query.shape[-1], value.shape[-1]).block_m
        if 0 < rows <= MAX_ROWS and query.shape[2] <= block:
            dense = {name: named[name] for name in named if "seqlen" not in name}
            output, log_rest, visited = stick_decode(query, key, value, **dense)
            return output, log_rest, query.new_empty(0), visited
    part = stick_forward(query, key, value, need_grad=need_grad, **named)
    residual = query.new_empty(0) if part.residual is None else part.residual
    return part.output, part.log_rest.contiguous(), residual, part.visited


def _triton_backward(
    grad_output: Tensor,
    grad_log_rest: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    residual: Tensor,
    log_rest: Tensor,
    visited: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .impl.triton.backward import stick_backward

    dq, dk, dv, dbias = stick_backward(
        grad_output,
        grad_log_rest,
        query,
        key,
        value,
        output,
        residual if residual.numel() else None,
        log_rest,
        visited,
        **_kernel_settings(settings),
    )
    return dq, dk, dv, query.new_empty(0) if dbias is None else dbias


def _triton_scratch(
    query: Tensor, value: Tensor, output: Tensor, need_grad: bool
) -> tuple[int, Tensor]:
    """Query block of the forward kernel, and a tensor like its residual."""
    from .impl.triton.forward import forward_config

    has_residual = need_grad and query.dtype is not torch.float32
    residual = torch.empty_like(output) if has_residual else query.new_empty(0)
    return forward_config(query.dtype, query.shape[-1], value.shape[-1]).block_m, residual


def _kernel_settings(settings: Settings) -> dict[str, Any]:
    named = settings._asdict()
    del named["gate_threshold"]  # refused before it comes here
    return named
