"""Public functions of Infini-attention: validate, choose an implementation, call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._select import choose_impl
from .._triton.launch import triton_refusal
from .._validation import Call, check_config, validate, validate_varlen
from .._varlen import sequence_bounds
from ..errors import ConfigError, ShapeError, nearest_name
from ..types import Impl, ImplReport
from .call import InfiniCall, make_call
from .config import InfiniConfig
from .impl.eager import infini_eager
from .impl.kernels import infini_triton, kernel_refusal
from .impl.reference import infini_reference
from .state import InfiniState

__all__ = [
    "InfiniOutput",
    "implementations",
    "infini_attention",
    "infini_attention_chunk",
    "infini_attention_varlen",
    "initial_gate",
    "initial_parameters",
    "visited_fraction",
]

_NAME = "infini_attention"
_STARTS = ("spread", "zero")
_SPREAD = 3.0  # sigmoid from 0.05 to 0.95


class InfiniOutput(NamedTuple):
    """output: (B, H, N_q, D_v); final_state: what the next call of the stream needs."""

    output: Tensor
    final_state: InfiniState


def infini_attention(
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
    gate: Tensor | None = None,
    memory_query: Tensor | None = None,
    memory_key: Tensor | None = None,
    write_gate: Tensor | None = None,
    log_decay: Tensor | None = None,
    initial_state: InfiniState | None = None,
    config: InfiniConfig = InfiniConfig(),
    impl: Impl | str = "auto",
) -> InfiniOutput:
    """Infini-attention: causal attention inside segments, and a memory of all segments before.

    For segment s, with sigma(x) = ELU(x) + 1 and g = sigmoid(gate) [1, Sec. 2]:
    local A_dot = softmax(scale Q K^T) V, causal inside the segment;
    read A_mem = sigma(Q) M_{s-1} / (sigma(Q) z_{s-1});
    mix A = g A_mem + (1 - g) A_dot;
    then write M_s = M_{s-1} + sigma(K)^T V, z_s = z_{s-1} + sum_t sigma(k_t), or by the delta rule.

    Args:
        query: (B, H, N_q, D), float16 / bfloat16 / float32 / float64.
        key: (B, H_kv, N_k, D), dtype and device of `query`; H must be a multiple of H_kv.
        value: (B, H_kv, N_k, D_v).
        attn_mask: None, or a boolean mask that says right padding (becomes `key_lengths`).
        dropout_p: 0.0.
        is_causal: True, the default here and unlike torch's.
        scale: multiplies the local scores. Default: D ** -0.5.
        enable_gqa: allow H_kv < H; there is one memory per key head.
        query_offset: index, among the keys of this call, of the first query. Default: 0.
        key_lengths: (B,), int32, valid keys per batch entry; the rest is padding on the right,
            neither attended to nor written. The final state cannot be continued then.
        gate: (H,), logit of the memory's share per query head; differentiable. None: zeros, i.e.
            one half. It is a parameter to be trained: see `longspan.nn.InfiniAttention`.
        memory_query, memory_key: as query and key, without position encoding; default: query and
            key themselves. Pass them where query and key are rotated: positions are relative to
            the segment, and mean nothing in a memory.
        write_gate, log_decay: (B, H_kv, N_k), of `update="gated_delta"`: strength of each write in
            [0, 1], default 1; logarithm of what stays of the memory, at most 0, default 0.
        initial_state: what an earlier call returned, whose stream this call continues.
        config: segment length, update rule and so on.
        impl: "auto" picks per device and dtype, see `explain`; a named implementation runs or
            raises.

    Returns:
        InfiniOutput(output (B, H, N_q, D_v) in `query.dtype`, final_state). Rows without visible
        keys or memory are zero.

    Raises:
        ShapeError: tensors do not fit together or to the state.
        ConfigError: the state was made with other settings.
        UnsupportedError: is_causal is False, a general `attn_mask`, dropout, a state that cannot
            be continued, or a named `impl` that cannot run.

    Semantics:
        Chunks of any sizes, each with the state of the one before, equal the whole. Gradients
        reach through the memory and the state to every earlier key and value; `detach` the state
        for truncated backpropagation. A segment longer than the input gives exact attention
        (`first_segment="local"`). Keys reach rows of later segments through the memory only.

    Cost:
        Per head, O(N_k segment D) for the local part and O(N_k D D_v) for the memory; linear in
        length. Extra memory: D D_v numbers in float32 per key head and segment of this call, one
        set in the state. "delta" adds D D numbers and two D x D products per segment.

    Differs from the paper:
        Scores are scaled by D ** -0.5 (the paper prints d_model). First segment, grouped heads,
        padding and states are ours to define: see InfiniConfig. sigma is computed as exp(x) below
        zero. The memory is float32 whatever the inputs are.

    Example:
        >>> q = torch.randn(1, 2, 128, 64)
        >>> output, state = infini_attention(q, q, q, config=InfiniConfig(segment_length=32))
        >>> output.shape, state.memory.shape, state.seen
        (torch.Size([1, 2, 128, 64]), torch.Size([1, 2, 64, 64]), 128)

    References:
        [1] Munkhdalai et al., Leave No Context Behind, 2024, arXiv:2404.07143.
    """
    check_config(_NAME, config, InfiniConfig)
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
    chosen = choose_impl(_NAME, impl, implementations(call, config))
    joined = make_call(
        _NAME,
        call,
        config,
        gate=gate,
        memory_query=memory_query,
        memory_key=memory_key,
        write_gate=write_gate,
        log_decay=log_decay,
        initial_state=initial_state,
    )
    output, memory, normaliser = _run(joined, chosen)
    return InfiniOutput(output, _final_state(joined, memory, normaliser))


def infini_attention_chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: InfiniState | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    gate: Tensor | None = None,
    memory_query: Tensor | None = None,
    memory_key: Tensor | None = None,
    write_gate: Tensor | None = None,
    log_decay: Tensor | None = None,
    config: InfiniConfig = InfiniConfig(),
    impl: Impl | str = "auto",
) -> InfiniOutput:
    """The next tokens of a stream: chunks of any size, down to one token, equal the whole.

    Args:
        query: (B, H, n, D), the next n tokens.
        key: (B, H_kv, n, D), of the same tokens.
        value: (B, H_kv, n, D_v).
        state: what the call before returned; None starts a stream.
        scale, enable_gqa, gate, memory_query, memory_key, write_gate, log_decay, config, impl: as
            in `infini_attention`.

    Returns:
        InfiniOutput(output (B, H, n, D_v), final_state). `state` itself is not changed.

    Raises:
        ShapeError: query and key are not of the same tokens; else as `infini_attention`.

    Cost:
        As `infini_attention`, and a copy of the state's unfinished segment.

    Example:
        >>> q = torch.randn(1, 2, 10, 16)
        >>> settings = InfiniConfig(segment_length=4)
        >>> whole = infini_attention(q, q, q, config=settings).output
        >>> first, state = infini_attention_chunk(*[q[:, :, :7]] * 3, config=settings)
        >>> last, state = infini_attention_chunk(*[q[:, :, 7:]] * 3, state, config=settings)
        >>> torch.allclose(last, whole[:, :, 7:], atol=1e-6), state.seen, state.folded
        (True, 10, 8)
    """
    if query.shape[-2] != key.shape[-2]:
        raise ShapeError(
            f"infini_attention_chunk: query has {query.shape[-2]} tokens but key has "
            f"{key.shape[-2]}. A chunk brings the queries, keys and values of the same tokens; "
            "use infini_attention with query_offset for other alignments."
        )
    return infini_attention(
        query,
        key,
        value,
        is_causal=True,
        scale=scale,
        enable_gqa=enable_gqa,
        gate=gate,
        memory_query=memory_query,
        memory_key=memory_key,
        write_gate=write_gate,
        log_decay=log_decay,
        initial_state=state,
        config=config,
        impl=impl,
    )


def infini_attention_varlen(
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
    gate: Tensor | None = None,
    memory_query: Tensor | None = None,
    memory_key: Tensor | None = None,
    write_gate: Tensor | None = None,
    log_decay: Tensor | None = None,
    config: InfiniConfig = InfiniConfig(),
    impl: Impl | str = "auto",
) -> Tensor:
    """Infini-attention inside each of several packed sequences; each starts with no memory.

    Args:
        query: (total_q, H, D); the sequences one after the other.
        key: (total_k, H_kv, D).
        value: (total_k, H_kv, D_v).
        cu_seqlens_q, cu_seqlens_k: (S + 1,), int32: 0, then the running totals of the lengths.
        max_seqlen_q, max_seqlen_k: longest sequence, or any upper bound; Python ints.
        is_causal: True.
        memory_query, memory_key: (total, H, D) without position encoding; default: query and key.
        write_gate, log_decay: (total_k, H_kv), of `update="gated_delta"`.
        scale, enable_gqa, gate, config, impl: as in `infini_attention`.

    Returns:
        (total_q, H, D_v) in `query.dtype`. For states, run the sequences with `infini_attention`.

    Raises:
        ShapeError: tensors do not fit together, or cu_seqlens are inconsistent.
        UnsupportedError: as `infini_attention`.

    Semantics:
        Query i of a sequence stands at key index i + n_k - n_q of that sequence. Segments start
        at each sequence's first key.

    Cost:
        One pass per sequence, and one device synchronisation to read the bounds.

    Example:
        >>> q = torch.randn(10, 2, 16)
        >>> cu = torch.tensor([0, 4, 10], dtype=torch.int32)
        >>> infini_attention_varlen(q, q, q, cu, cu, 6, 6).shape
        torch.Size([10, 2, 16])
    """
    name = "infini_attention_varlen"
    check_config(name, config, InfiniConfig)
    call = validate_varlen(name, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                           max_seqlen_k, is_causal=is_causal, scale=scale,
                           enable_gqa=enable_gqa)  # fmt: skip
    for label, extra, like in (("memory_query", memory_query, query),
                               ("memory_key", memory_key, key)):  # fmt: skip
        if extra is not None and extra.shape != like.shape:
            raise ShapeError(
                f"{name}: {label} is {tuple(extra.shape)}; it must be {tuple(like.shape)}, packed "
                f"as {label.removeprefix('memory_')} is. Leave it out if there are no positions."
            )

    for label, rate in (("write_gate", write_gate), ("log_decay", log_decay)):
        if rate is not None and rate.shape != key.shape[:2]:
            raise ShapeError(
                f"{name}: {label} is {tuple(rate.shape)}; it must be (total_k, H_kv) = "
                f"{tuple(key.shape[:2])}, one number per key. Leave it out for none."
            )

    def part(tensor: Tensor | None, start: int, end: int) -> Tensor | None:
        return None if tensor is None else tensor[start:end].transpose(0, 1).unsqueeze(0)

    outputs = []
    for q_start, q_end, k_start, k_end in sequence_bounds(name, call):
        result = infini_attention(
            part(call.query, q_start, q_end),  # type: ignore[arg-type]
            part(call.key, k_start, k_end),  # type: ignore[arg-type]
            part(call.value, k_start, k_end),  # type: ignore[arg-type]
            is_causal=is_causal,
            scale=call.scale,
            enable_gqa=enable_gqa,
            query_offset=(k_end - k_start) - (q_end - q_start),
            gate=gate,
            memory_query=part(memory_query, q_start, q_end),
            memory_key=part(memory_key, k_start, k_end),
            write_gate=part(write_gate, k_start, k_end),
            log_decay=part(log_decay, k_start, k_end),
            config=config,
            impl=impl,
        )
        outputs.append(result.output.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def initial_gate(heads: int, start: str | float = "spread") -> Tensor:
    """(H,) float32 logits to start training from.

    Args:
        heads: H.
        start: "spread": evenly from -3 to 3, so that some heads read the memory from the first
            step on and some stay local; "zero": one half each; or a number for all heads.

    Raises:
        ConfigError: another name.
    """
    if start == "spread":
        return torch.linspace(-_SPREAD, _SPREAD, heads) if heads > 1 else torch.zeros(heads)
    if start == "zero":
        return torch.zeros(heads)
    if isinstance(start, str):
        raise ConfigError(
            f"initial_gate: start is {start!r}. {nearest_name(start, _STARTS)} Or pass a number."
        )
    return torch.full((heads,), float(start))


def initial_parameters(
    config: InfiniConfig, *, heads: int, kv_heads: int, head_dim: int
) -> dict[str, Tensor]:
    """What a layer of a model learns besides its projections: a gate per query head."""
    return {"gate": initial_gate(heads)}


def implementations(call: Call, config: InfiniConfig) -> tuple[ImplReport, ...]:
    """Kernels around torch's attention, plain torch, then the loop that defines it."""
    refusal = triton_refusal(call.query) or kernel_refusal(
        config, call.query.dtype, call.query.device, call.query.shape[-1], call.value.shape[-1]
    )
    return (
        ImplReport(Impl.TRITON, refusal, "torch's attention on segments, one pass for the memory"),
        ImplReport(Impl.EAGER, None, "torch's attention on segments, prefix sums or a scan"),
        ImplReport(Impl.REFERENCE, None, "loop over segments"),
    )


def visited_fraction(
    config: InfiniConfig, n_q: int, n_k: int, *, is_causal: bool, query_offset: int = 0
) -> float:
    """Share of the scores of causal exact attention that the local part computes.

    Reads of the memory are no scores and do not count. 1.0 if there are no scores.
    """
    length, lag = config.segment_length, config.lag
    position = torch.arange(n_q, dtype=torch.int64) + query_offset
    visible = (position + 1).clamp(0, n_k)
    total = int(visible.sum())
    if total == 0:
        return 1.0
    first = ((position // length - lag).clamp(min=0) * length).clamp(max=n_k)
    return float((visible - first).clamp(min=0).sum()) / total


def _run(call: InfiniCall, chosen: Impl) -> tuple[Tensor, Tensor, Tensor]:
    kind = "cpu" if call.query.is_meta else call.query.device.type  # meta has no autocast
    with torch.autocast(kind, enabled=False):
        if chosen is Impl.REFERENCE:
            return infini_reference(call)
        if chosen is Impl.TRITON:
            return infini_triton(call)
        return infini_eager(call)


def _final_state(call: InfiniCall, memory: Tensor, normaliser: Tensor) -> InfiniState:
    config = call.config
    length, n_k = config.segment_length, call.key.shape[2]
    folded = max(n_k // length - config.lag, 0) * length
    added = torch.full_like(call.written, folded)
    if call.key_lengths is not None:
        added = torch.minimum(added, call.key_lengths.to(added.dtype))

    def rest(tensor: Tensor | None) -> Tensor | None:
        # copies: views would keep the whole sequence in memory
        return None if tensor is None else tensor[:, :, folded:].clone()

    key, value = rest(call.key), rest(call.value)
    assert key is not None
    assert value is not None
    return InfiniState(
        memory=memory.clone(),  # a view would keep the states of all segments
        normaliser=normaliser.clone(),
        written=call.written + added,
        key=key,
        value=value,
        memory_key=rest(call.memory_key) if call.own_memory_key else None,
        write_gate=rest(call.write_gate),
        log_decay=rest(call.log_decay),
        seen=call.seen,
        config=config,
        can_continue=call.key_lengths is None,
    )
