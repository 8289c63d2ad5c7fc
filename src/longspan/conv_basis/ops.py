"""The operators behind Conv-Basis attention: opaque to tracing, gradients where there are any."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._triton.launch import triton_refusal
from .config import ConvBasisConfig
from .impl.engine import make_problem

__all__ = [
    "exact_heads",
    "find_starts",
    "find_violations",
    "score_columns",
    "toeplitz_bwd",
    "toeplitz_fwd",
]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


@torch.library.custom_op("longspan::conv_basis_starts", mutates_args=())
def find_starts(
    query: Tensor,
    key: Tensor,
    lengths: Tensor,
    scale: float,
    num_bases: int,
    probe_length: int,
    threshold: float,
    noise: float,
    recover: str,
    near_window: int,
    num_sinks: int,
    impl: str,
) -> Tensor:
    """(B, H, num_bases) int64, see `impl.recover.recover_starts`. No gradient."""
    from .impl.recover import recover_starts

    config = ConvBasisConfig(
        num_bases=num_bases, probe_length=probe_length, threshold=threshold, noise=noise,
        recover=recover, near_window=near_window, num_sinks=num_sinks,
    )  # fmt: skip
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        if impl == "triton" and recover == "binary":
            from .impl.triton.search import search_starts

            return search_starts(query, key, lengths, scale, config)
        return recover_starts(query, key, lengths, scale, config)


@find_starts.register_fake
def _(
    query: Tensor, key: Tensor, lengths: Tensor, scale: float, num_bases: int, *rest: Any
) -> Tensor:
    groups = 1 if rest[3] == "means" else num_bases
    return query.new_empty((*query.shape[:2], groups), dtype=torch.int64)


@torch.library.custom_op("longspan::conv_basis_columns", mutates_args=())
def score_columns(query: Tensor, key: Tensor, starts: Tensor, scale: float) -> Tensor:
    """(B, H, G, N) float32 log-kernels by Triton, see `impl.recover.shifted_columns`."""
    from .impl.triton.columns import columns

    return columns(query, key, starts, scale)


@score_columns.register_fake
def _(query: Tensor, key: Tensor, starts: Tensor, scale: float) -> Tensor:
    return query.new_empty((*starts.shape, query.shape[2]), dtype=torch.float32)


@torch.library.custom_op("longspan::conv_basis_columns_bwd", mutates_args=())
def score_columns_bwd(
    grad: Tensor, query: Tensor, key: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of query and key."""
    from .impl.triton.columns import column_gradients

    return column_gradients(grad, query, key, starts, scale)


@score_columns_bwd.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _columns_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _columns_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *score_columns_bwd(grad, *ctx.saved_tensors, ctx.scale), None, None


score_columns.register_autograd(_columns_backward, setup_context=_columns_context)


@torch.library.custom_op("longspan::toeplitz_fwd", mutates_args=())
def toeplitz_fwd(
    log_kernel: Tensor,
    starts: Tensor,
    key_offset: Tensor | None,
    value: Tensor,
    hidden: Tensor | None,
    n_q: int,
    is_causal: bool,
    query_offset: int,
    block: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, H, N_q, D_v) and lse (B, H, N_q) of Toeplitz weights; path (B, H) uint8.

    log_kernel: (B, H, G, L); starts: (B, H, G) int64; key_offset: (B, H, N_k); value:
    (B, H_kv, N_k, D_v); hidden: (B, N_q) bool. block: 0 picks one. impl: "eager" keeps to torch.
    """
    from .impl.guard import guarded_forward

    batch, heads = log_kernel.shape[:2]
    wide = _wide(log_kernel)
    if value.numel() == 0 or batch * heads * n_q == 0:
        output = value.new_zeros((batch, heads, n_q, value.shape[-1]))
        lse = log_kernel.new_full((batch, heads, n_q), float("-inf"), dtype=wide)
        return output, lse, lse.new_zeros((batch, heads), dtype=torch.uint8)
    with torch.autocast(value.device.type, enabled=False):
        if impl != "eager" and _takes_half(log_kernel, value, n_q, is_causal, query_offset, block):
            from .impl.half_guard import guarded_half_forward

            output, lse, path = guarded_half_forward(log_kernel, starts, key_offset, value, hidden)
        else:
            problem = make_problem(log_kernel, starts, key_offset, value, hidden, n_q, is_causal,
                                   query_offset)  # fmt: skip
            output, lse, path = guarded_forward(problem, block or None, value.dtype)
    shape = (batch, heads, n_q)
    output = output.reshape(*shape, -1).to(value.dtype).contiguous()
    return output, lse.reshape(shape).contiguous(), path.view(batch, heads)


@toeplitz_fwd.register_fake
def _(
    log_kernel: Tensor, starts: Tensor, key_offset: Tensor | None, value: Tensor,
    hidden: Tensor | None, n_q: int, *_rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = (*log_kernel.shape[:2], n_q)
    return (
        value.new_empty((*shape, value.shape[-1])),
        log_kernel.new_empty(shape, dtype=_wide(log_kernel)),
        log_kernel.new_empty(shape[:2], dtype=torch.uint8),
    )


@torch.library.custom_op("longspan::toeplitz_bwd", mutates_args=())
def toeplitz_bwd(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
    path: Tensor,
    log_kernel: Tensor,
    starts: Tensor,
    key_offset: Tensor | None,
    value: Tensor,
    hidden: Tensor | None,
    n_q: int,
    is_causal: bool,
    query_offset: int,
    block: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of log_kernel, key_offset (B, H, N_k) and value."""
    from .impl.guard import guarded_backward

    batch, heads = log_kernel.shape[:2]
    n_k = value.shape[2]
    if value.numel() == 0 or output.numel() == 0:
        offset = log_kernel.new_zeros((batch, heads, n_k))
        return torch.zeros_like(log_kernel), offset, torch.zeros_like(value)
    with torch.autocast(value.device.type, enabled=False):
        if impl != "eager" and _takes_half(log_kernel, value, n_q, is_causal, query_offset, block):
            from .impl.half_guard import guarded_half_backward

            return guarded_half_backward(grad_output, grad_lse, output, lse, path, log_kernel,
                                         starts, key_offset, value, hidden)  # fmt: skip
        problem = make_problem(log_kernel, starts, key_offset, value, hidden, n_q, is_causal,
                               query_offset)  # fmt: skip
        wide = _wide(log_kernel)
        flat_lse = None if grad_lse is None else grad_lse.to(wide).flatten(0, 1)
        kernel, key, part = guarded_backward(
            problem,
            path.flatten(),
            output.to(wide).flatten(0, 1),
            lse.to(wide).flatten(0, 1),
            grad_output.to(wide).flatten(0, 1),
            flat_lse,
            block or None,
        )
    shape = (batch, value.shape[1], -1, n_k, value.shape[-1])
    own_value = part.view(shape).sum(2).to(value.dtype)
    return (kernel.view(log_kernel.shape).to(log_kernel.dtype),
            key.view(batch, heads, n_k).to(log_kernel.dtype), own_value)  # fmt: skip


@toeplitz_bwd.register_fake
def _(
    grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor, path: Tensor,
    log_kernel: Tensor, starts: Tensor, key_offset: Tensor | None, value: Tensor, *_rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    offset = log_kernel.new_empty((*log_kernel.shape[:2], value.shape[2]))
    return log_kernel.new_empty(log_kernel.shape), offset, value.new_empty(value.shape)


def _takes_half(
    log_kernel: Tensor, value: Tensor, n_q: int, is_causal: bool, query_offset: int, block: int
) -> bool:
    """Whether the kernels for half precision values take this problem."""
    half = value.dtype in (torch.float16, torch.bfloat16)
    if not half or triton_refusal(value) is not None:
        return False
    from .impl.triton.half import takes

    return takes(log_kernel, value, n_q, is_causal, query_offset, block)


def _toeplitz_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    log_kernel, starts, key_offset, value, hidden, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*output, log_kernel, starts, key_offset, value, hidden)


def _toeplitz_backward(
    ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, _path: Tensor | None
) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(saved[0])
    kernel, key, value = toeplitz_bwd(grad_output, grad_lse, *saved, *ctx.settings)
    key_or_none = None if saved[5] is None else key
    return kernel, None, key_or_none, value, *(None,) * 6


toeplitz_fwd.register_autograd(_toeplitz_backward, setup_context=_toeplitz_context)


@torch.library.custom_op("longspan::conv_basis_violations", mutates_args=())
def find_violations(
    query: Tensor,
    key: Tensor,
    lengths: Tensor,
    log_kernel: Tensor,
    starts: Tensor,
    key_offset: Tensor | None,
    row_offset: Tensor | None,
    lse: Tensor,
    scale: float,
    near: int,
    num_sinks: int,
    check_rows: int,
    max_tv: float,
    on_violation: str,
    seed: int,
    impl: str,
) -> Tensor:
    """(B, H) bool: heads whose sampled total variation exceeds max_tv; may warn or raise."""
    from .impl.certificate import act_on_violations, sample_distances

    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        _, distances, _ = sample_distances(
            query, key, lengths, log_kernel, starts, key_offset, row_offset, lse, scale, near,
            num_sinks, check_rows, seed, with_residual=False, impl=impl,
        )  # fmt: skip
        return act_on_violations(distances, max_tv, on_violation)


@find_violations.register_fake
def _(query: Tensor, *_rest: Any) -> Tensor:
    return query.new_empty(query.shape[:2], dtype=torch.bool)


@torch.library.custom_op("longspan::conv_basis_exact_heads", mutates_args=())
def exact_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    output: Tensor,
    lse: Tensor,
    chosen: Tensor,
    scale: float,
    exact_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """`output` and `lse` with the heads `chosen` (B, H) computed exactly.

    Backward: exact attention's gradient to query, key and value for the chosen heads (for all
    with exact_gradient), the incoming gradient to `output` and `lse` for the others.
    """
    from .impl.exact_part import exact_rows

    output, lse = output.clone(), lse.clone()
    for entry, own, own_lse in exact_rows(query, key, value, key_lengths, chosen, scale):
        output[entry], lse[entry] = own, own_lse.to(lse.dtype)
    return output, lse


@exact_heads.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, output: Tensor,
      lse: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    return output.new_empty(output.shape), lse.new_empty(lse.shape)


@torch.library.custom_op("longspan::conv_basis_exact_heads_bwd", mutates_args=())
def exact_heads_bwd(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    chosen: Tensor,
    scale: float,
    exact_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value through the exact heads; zeros elsewhere."""
    from .impl.exact_part import exact_row_gradients

    with torch.autocast(query.device.type, enabled=False):
        return exact_row_gradients(
            grad_output, grad_lse, query, key, value, key_lengths,
            torch.ones_like(chosen) if exact_gradient else chosen, scale,
        )  # fmt: skip


@exact_heads_bwd.register_fake
def _(grad_output: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
      *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return dq, dk, dv


def _heads_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, key_lengths, _, _, chosen, ctx.scale, ctx.exact_gradient = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, key_lengths, chosen, output[0])


def _heads_backward(
    ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None
) -> tuple[Any, ...]:
    *inputs, chosen, output = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    grads = exact_heads_bwd(grad_output, grad_lse, *inputs, chosen, ctx.scale, ctx.exact_gradient)
    through = ~(chosen | ctx.exact_gradient)  # (B, H)
    to_output = grad_output * through[..., None, None]
    to_lse = None if grad_lse is None else grad_lse * through[..., None]
    return *grads, None, to_output, to_lse, None, None, None


exact_heads.register_autograd(_heads_backward, setup_context=_heads_context)
