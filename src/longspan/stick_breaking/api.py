"""Public functions of stick-breaking attention: validate, choose an implementation, call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._select import choose_impl
from .._triton.launch import triton_refusal
from .._validation import Call, VarlenCall, check_config, validate, validate_varlen
from ..errors import ShapeError
from ..types import Impl, ImplReport
from .call import NO_GATE_GRADIENT, NOT_CAUSAL, check_call, needs_grad, run_call
from .config import StickBreakingConfig
from .remainder import give_to_own_value, give_to_own_value_packed

__all__ = [
    "StickBreakingOutput",
    "implementations",
    "stick_breaking_attention",
    "stick_breaking_attention_varlen",
    "stick_breaking_attention_with_remainder",
    "visited_fraction",
]

_NAME = "stick_breaking_attention"


class StickBreakingOutput(NamedTuple):
    """A partial result of stick-breaking over a run of keys; see `merge_stick_breaking`.

    output: (B, H, N_q, D_v); zero in rows that see no key.
    log_rest: (B, H, N_q), float32 (float64 for float64 inputs): natural log of the share of the
        stick that no key took; 0 in rows that see no key. Differentiable.
    """

    output: Tensor
    log_rest: Tensor


def stick_breaking_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = True,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    query_offset: int = 0,
    key_lengths: Tensor | None = None,
    logit_bias: Tensor | None = None,
    config: StickBreakingConfig = StickBreakingConfig(),
    impl: Impl | str = "auto",
) -> Tensor:
    """Stick-breaking attention: each key, nearest first, takes a share of what is left.

    With z_ij = scale * q_j.k_i + bias_h and b_ij = sigmoid(z_ij), query j weighs key i by
    A_ij = b_ij * prod_{i<k<j} (1 - b_kj) [1, Sec. 2]: the keys before j break pieces off a stick
    of length one, the nearest key first. No normaliser, no positions; what no key takes stays.

    Args:
        query: (B, H, N_q, D), float16 / bfloat16 / float32 / float64.
        key: (B, H_kv, N_k, D), dtype and device of `query`; H must be a multiple of H_kv.
        value: (B, H_kv, N_k, D_v).
        attn_mask: None, or a boolean mask that says right padding (becomes `key_lengths`).
        dropout_p: 0.0.
        is_causal: True, the default here and unlike torch's: stick-breaking is causal by
            definition.
        scale: multiplies the scores. Default: D ** -0.5.
        enable_gqa: allow H_kv < H; keys and values are not repeated in memory.
        query_offset: index, in keys, of the first query. Default: 0; pass N_k - N_q when decoding.
        key_lengths: (B,), int32, valid keys per batch entry; the rest is padding on the right.
        logit_bias: (H,), added to the scaled scores of each head; differentiable. Negative values
            make a head look further back.
        config: window, remainder, early stop and so on.
        impl: "auto" picks per device and dtype, see `explain`; a named implementation runs or
            raises.

    Returns:
        (B, H, N_q, D_v) in `query.dtype`; rows without visible keys are zero.

    Raises:
        ShapeError: tensors do not fit together, or `remainder="value"` and a query's own key is
            not among the keys.
        UnsupportedError: is_causal is False, a general `attn_mask`, dropout, `gate_threshold` in
            a call that needs gradients, or the named `impl` cannot run.

    Semantics:
        Query i stands at key index p = i + query_offset and sees keys before p (and p itself with
        `attend_current`), at most the `window` nearest. With `early_stop` the walk ends when less
        than a share R of the stick is left in every row of a tile; an output is then off by at
        most R max|v|, a score's gradient by R (2 + log 1/R) max|dO.v| in all, and gradients are
        those of what was computed. Second derivatives are not available.

    Cost:
        Time O(N_q N_k D) per head for a full walk, O(N_q span D) with `early_stop`, where span is
        how far sticks last; extra memory O(N) (`reference`: O(N_q N_k)).

    Differs from the paper:
        Grouped heads, window, offset, bias, early stop and the choice of remainder are additions.
        The authors' published models give the rest to a learned vector per head, which
        `longspan.nn.StickBreakingAttention` has.

    Example:
        >>> q = torch.randn(1, 2, 128, 64)
        >>> stick_breaking_attention(q, q, q, is_causal=True).shape
        torch.Size([1, 2, 128, 64])

    References:
        [1] Tan et al., Scaling Stick-Breaking Attention, ICLR 2025, arXiv:2410.17980.
    """
    return stick_breaking_attention_with_remainder(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        query_offset=query_offset,
        key_lengths=key_lengths,
        logit_bias=logit_bias,
        config=config,
        impl=impl,
    ).output


def stick_breaking_attention_with_remainder(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = True,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    query_offset: int = 0,
    key_lengths: Tensor | None = None,
    logit_bias: Tensor | None = None,
    config: StickBreakingConfig = StickBreakingConfig(),
    impl: Impl | str = "auto",
) -> StickBreakingOutput:
    """As `stick_breaking_attention`, with the log of the rest of the stick.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, query_offset,
            key_lengths, logit_bias, config, impl: as in `stick_breaking_attention`.

    Returns:
        StickBreakingOutput(output, log_rest): exp(log_rest) = 1 - the sum of the weights. Both
        are differentiable. Parts over consecutive runs of keys join, nearest first, with
        `longspan.merge_stick_breaking` (leave `remainder` at "drop" in the parts). With
        `remainder="value"` log_rest is what was left before the own value got it.

    Example:
        >>> q = torch.randn(1, 2, 8, 16)
        >>> part = stick_breaking_attention_with_remainder(q, q, q)
        >>> part.log_rest[0, 0, 0].item()  # the first query sees no key
        0.0
    """
    check_config(_NAME, config, StickBreakingConfig)
    call = validate(
        _NAME,
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        query_offset=query_offset,
        key_lengths=key_lengths,
    )
    bias = check_call(_NAME, call, config, logit_bias)
    chosen = choose_impl(_NAME, impl, implementations(call, config))
    n_q, n_k = call.query.shape[2], call.key.shape[2]
    if config.remainder == "value" and not 0 <= call.query_offset <= n_k - n_q:
        raise ShapeError(
            f'{_NAME}: remainder="value" gives the rest to the value at each query\'s own '
            f"position, but queries stand at {call.query_offset} .. {call.query_offset + n_q - 1} "
            f"and there are {n_k} keys. Pass the queries' own keys and values too, or use "
            'remainder="drop" and add exp(log_rest) * value yourself.'
        )
    if chosen is Impl.REFERENCE:
        from .impl.reference import stick_breaking_reference

        with torch.autocast(call.query.device.type, enabled=False):
            output, log_rest = stick_breaking_reference(call, config, bias)
    else:
        output, log_rest, _ = run_call(call, config, bias, chosen)
    if config.remainder == "value":
        output = give_to_own_value(output, log_rest, call)
    return StickBreakingOutput(output, log_rest)


def stick_breaking_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    logit_bias: Tensor | None = None,
    config: StickBreakingConfig = StickBreakingConfig(),
    impl: Impl | str = "auto",
) -> Tensor:
    """Stick-breaking attention over packed sequences; no key of another sequence is seen.

    Args:
        query: (total_q, H, D).
        key: (total_k, H_kv, D).
        value: (total_k, H_kv, D_v).
        cu_seqlens_q, cu_seqlens_k: (S + 1,), int32: where each sequence starts; the last entry is
            the total. Empty sequences are allowed.
        max_seqlen_q, max_seqlen_k: longest sequence, as Python ints.
        is_causal: True.
        scale, enable_gqa, logit_bias, config, impl: as in `stick_breaking_attention`.

    Returns:
        (total_q, H, D_v) in `query.dtype`.

    Raises:
        ShapeError, UnsupportedError: as `stick_breaking_attention`; `impl="reference"` raises,
            because it is dense.

    Semantics:
        Causality is aligned at the end of each sequence: its query i stands at key index
        i + N_k - N_q of that sequence.
    """
    name = f"{_NAME}_varlen"
    check_config(name, config, StickBreakingConfig)
    call = validate_varlen(
        name,
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    bias = check_call(name, call, config, logit_bias)
    chosen = choose_impl(name, impl, implementations(call, config))
    output, log_rest, _ = run_call(call, config, bias, chosen)
    if config.remainder == "value":
        output = give_to_own_value_packed(output, log_rest, call)
    return output


def implementations(call: Call | VarlenCall, config: StickBreakingConfig) -> tuple[ImplReport, ...]:
    """For each implementation, preferred first, whether it can run this call."""
    everywhere = None
    if not call.is_causal:
        everywhere = NOT_CAUSAL
    elif config.gate_threshold is not None and needs_grad(call):
        everywhere = NO_GATE_GRADIENT
    triton = triton_refusal(call.query)
    if triton is None and config.gate_threshold is not None:
        triton = "gate_threshold is not in the Triton kernels"
    packed = isinstance(call, VarlenCall)
    reference = "it is dense; packed calls run in eager and triton" if packed else None
    full_walk = "walks all keys, which meets every bound" if config.early_stop else "dense, slow"
    return (
        ImplReport(Impl.TRITON, everywhere or triton, "fused kernels"),
        ImplReport(Impl.EAGER, everywhere, "plain torch in chunks, O(N) memory"),
        ImplReport(Impl.REFERENCE, everywhere or reference, full_walk),
    )


def visited_fraction(
    config: StickBreakingConfig, n_q: int, n_k: int, *, is_causal: bool, query_offset: int = 0
) -> float:
    """Share of the visible scores that are computed: the window's.

    What `early_stop` saves depends on the data: `stick_breaking_attention_stats` measures it.
    """
    limit = torch.arange(n_q, dtype=torch.int64) + query_offset + int(config.attend_current)
    visible = limit.clamp(0, n_k)
    if config.window is None or int(visible.sum()) == 0:
        return 1.0
    inside = visible - (limit - config.window).clamp(0, n_k)
    return float(inside.sum()) / float(visible.sum())
