"""From a validated call to the operator: what is refused, and the operator's arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from .._validation import Call, VarlenCall
from ..errors import ShapeError, UnsupportedError
from ..types import Impl
from .config import StickBreakingConfig
from .impl.common import Settings, wide_dtype
from .ops import stick_breaking_fwd

__all__ = [
    "NOT_CAUSAL",
    "NO_GATE_GRADIENT",
    "check_call",
    "needs_grad",
    "run_call",
    "settings_of",
]

NOT_CAUSAL = (
    "is_causal is False, but stick-breaking is causal by definition: keys are visited from the "
    "query backwards. Pass is_causal=True"
)
NO_GATE_GRADIENT = (
    "gate_threshold is for inference, because zeroed gates have no useful gradient. Call under "
    "torch.no_grad() or set gate_threshold=None"
)


def check_call(
    name: str, call: Call | VarlenCall, config: StickBreakingConfig, logit_bias: Tensor | None
) -> Tensor | None:
    """Refuse what no implementation can honour; the bias in the dtype that is computed in."""
    if not call.is_causal:
        raise UnsupportedError(f"{name}: {NOT_CAUSAL}.")
    if config.gate_threshold is not None and needs_grad(call, logit_bias):
        raise UnsupportedError(f"{name}: {NO_GATE_GRADIENT}.")
    if logit_bias is None:
        return None
    heads = call.query.shape[1]
    if not isinstance(logit_bias, Tensor) or tuple(logit_bias.shape) != (heads,):
        got = tuple(logit_bias.shape) if isinstance(logit_bias, Tensor) else repr(logit_bias)
        raise ShapeError(
            f"{name}: logit_bias is {got}; it must be a tensor of shape ({heads},), one number "
            "per query head. Use torch.full((H,), value) for the same bias everywhere."
        )
    if not logit_bias.is_floating_point() or logit_bias.device != call.query.device:
        raise ShapeError(
            f"{name}: logit_bias is {logit_bias.dtype} on {logit_bias.device}; it must be floating "
            f"point on {call.query.device}. Cast or move it."
        )
    return logit_bias.to(wide_dtype(call.query.dtype))


def needs_grad(call: Call | VarlenCall, logit_bias: Tensor | None = None) -> bool:
    """Whether autograd will want a backward."""
    tensors = (call.query, call.key, call.value, logit_bias)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def run_call(
    call: Call | VarlenCall, config: StickBreakingConfig, bias: Tensor | None, impl: Impl
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, log_rest, visited) by an implementation behind the operator."""
    output, log_rest, _, visited = stick_breaking_fwd(
        call.query,
        call.key,
        call.value,
        *settings_of(call, config, bias),
        needs_grad(call, bias),
        impl.value,
    )
    return output, log_rest, visited


def settings_of(
    call: Call | VarlenCall, config: StickBreakingConfig, bias: Tensor | None
) -> Settings:
    """The operator's arguments."""
    if isinstance(call, VarlenCall):
        lengths, cu_q, cu_k = None, call.cu_seqlens_q, call.cu_seqlens_k
        longest_q, longest_k, offset = call.max_seqlen_q, call.max_seqlen_k, 0
    else:
        lengths, cu_q, cu_k = call.key_lengths, None, None
        longest_q, longest_k = call.query.shape[2], call.key.shape[2]
        offset = call.query_offset
    return Settings(
        logit_bias=bias,
        key_lengths=lengths,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        scale=call.scale,
        query_offset=offset,
        attend_current=config.attend_current,
        window=config.window,
        early_stop=config.early_stop,
        gate_threshold=config.gate_threshold,
    )
