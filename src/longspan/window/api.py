"""Public functions of window attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._select import choose_impl
from .._triton.launch import triton_refusal
from .._validation import Call, VarlenCall, check_config, validate, validate_varlen
from .._varlen import run_each_sequence
from ..errors import ConfigError, ShapeError
from ..types import AttentionOutput, Impl, ImplReport
from .config import WindowConfig
from .impl.reference import window_reference
from .ops import window_fwd
from .state import WindowState

__all__ = [
    "WindowOutput",
    "implementations",
    "visited_fraction",
    "window_attention",
    "window_attention_chunk",
    "window_attention_varlen",
    "window_attention_with_lse",
]


_WIDEST_SINGLE = 128


class WindowOutput(NamedTuple):
    """A chunk's result (B, H, N_q, D_v) and the state for the next chunk."""

    output: Tensor
    final_state: WindowState


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    query_offset: int = 0,
    key_lengths: Tensor | None = None,
    config: WindowConfig = WindowConfig(),
    impl: Impl | str = "auto",
) -> Tensor:
    """Softmax attention over a sliding window and the first keys (attention sinks).

    The query i stands at key index p = i + query_offset and sees the keys j with
    p - window < j <= p, and the sinks j < num_sinks, j <= p. Not causal: |p - j| < window, and
    all sinks. output_i = sum_j softmax_j(scale q_i . k_j) v_j over these keys, each counted once.
    The visible set is that of StreamingLLM [1].

    Args:
        query: (B, H, N_q, D), float16 / bfloat16 / float32 / float64.
        key: (B, H_kv, N_k, D), dtype and device of `query`; H must be a multiple of H_kv.
        value: (B, H_kv, N_k, D_v).
        attn_mask: None, or a boolean right-padding mask (B or 1, 1, 1, N_k).
        dropout_p: must be 0.0.
        is_causal: keys after p are hidden.
        scale: multiplies the scores. Default: D ** -0.5.
        enable_gqa: H may be a multiple of H_kv.
        query_offset: index, in keys, of the first query. Default: 0, as in torch; pass N_k - N_q
            when decoding.
        key_lengths: (B,), int32, valid keys per batch entry; the rest is padding on the right.
        config: `WindowConfig(window=1024, num_sinks=4)`.
        impl: "auto" picks per device and dtype, see `longspan.explain`; a named one runs or raises.

    Returns:
        (B, H, N_q, D_v) in `query.dtype`; rows without visible keys are zero.

    Raises:
        ShapeError: tensors do not fit together.
        UnsupportedError: another `attn_mask`, dropout, or a named `impl` that cannot run the call.

    Semantics:
        With `window >= max(N_q + query_offset, N_k)` this is exact attention. Gradients are exact
        and, like the output, repeat bit for bit.

    Cost:
        Time O(N_q (window + num_sinks) D H), memory O(N) beside the inputs, forward and backward.

    Differs from the paper:
        Positions are not renumbered inside the cache: rotary embeddings are the caller's, applied
        before this call. [1] rotates the keys by their place in the cache.

    Example:
        >>> q = torch.randn(1, 2, 128, 64)
        >>> window_attention(q, q, q, is_causal=True, config=WindowConfig(window=32)).shape
        torch.Size([1, 2, 128, 64])

    References:
        [1] Xiao et al., Efficient Streaming Language Models with Attention Sinks, ICLR 2024,
            arXiv:2309.17453.
    """
    check_config("window_attention", config, WindowConfig)
    call = validate("window_attention", query, key, value, attn_mask=attn_mask,
                    dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
                    query_offset=query_offset, key_lengths=key_lengths)  # fmt: skip
    return _run("window_attention", call, config, impl).output


def window_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    query_offset: int = 0,
    key_lengths: Tensor | None = None,
    config: WindowConfig = WindowConfig(),
    impl: Impl | str = "auto",
) -> AttentionOutput:
    """Window attention and the log-sum-exp of its scores, both differentiable.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, query_offset,
            key_lengths, config, impl: as in `window_attention`.

    Returns:
        AttentionOutput: output (B, H, N_q, D_v) in `query.dtype`, lse (B, H, N_q) in float32
        (float64 for float64 inputs), natural log. Rows without visible keys: zeros and -inf.

    Raises:
        ShapeError, UnsupportedError: as `window_attention`.

    Cost:
        As `window_attention`.

    Example:
        >>> q = torch.randn(1, 2, 128, 64)
        >>> window_attention_with_lse(q, q, q, is_causal=True).lse.shape
        torch.Size([1, 2, 128])
    """
    name = "window_attention_with_lse"
    check_config(name, config, WindowConfig)
    call = validate(name, query, key, value, attn_mask=attn_mask, dropout_p=dropout_p,
                    is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
                    query_offset=query_offset, key_lengths=key_lengths)  # fmt: skip
    return _run(name, call, config, impl)


def window_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    config: WindowConfig = WindowConfig(),
    impl: Impl | str = "auto",
) -> Tensor:
    """Window attention inside each of several packed sequences; each has its own sinks.

    Args:
        query: (total_q, H, D); the sequences one after the other.
        key: (total_k, H_kv, D).
        value: (total_k, H_kv, D_v).
        cu_seqlens_q, cu_seqlens_k: (S + 1,), int32: 0, then the running totals of the lengths.
        max_seqlen_q, max_seqlen_k: longest sequence, or any upper bound; Python ints.
        is_causal: as in `window_attention`.
        scale, enable_gqa, config, impl: as in `window_attention`.

    Returns:
        (total_q, H, D_v) in `query.dtype`; rows without visible keys are zero.

    Raises:
        ShapeError: tensors do not fit together, or cu_seqlens are inconsistent (checked where
            they are read, i.e. not by the Triton kernels).
        UnsupportedError: a named `impl` that cannot run the call.

    Semantics:
        Query i of a sequence stands at key index i + n_k - n_q of that sequence, causal or not.

    Cost:
        One kernel on CUDA; elsewhere one pass per sequence.

    Example:
        >>> q = torch.randn(10, 2, 16)
        >>> cu = torch.tensor([0, 4, 10], dtype=torch.int32)
        >>> window_attention_varlen(q, q, q, cu, cu, 6, 6, is_causal=True).shape
        torch.Size([10, 2, 16])
    """
    name = "window_attention_varlen"
    check_config(name, config, WindowConfig)
    call = validate_varlen(name, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                           max_seqlen_k, is_causal=is_causal, scale=scale,
                           enable_gqa=enable_gqa)  # fmt: skip
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (call.query, call.key, call.value))
    dense = Call(q, k, v, None, call.is_causal, call.scale, 0)
    chosen = choose_impl(name, impl, implementations(dense, config))
    if chosen is Impl.REFERENCE:
        return _varlen_reference(name, call, config)
    output: Tensor
    output, _ = window_fwd(q, k, v, None, call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q,
                           call.max_seqlen_k, call.is_causal, call.scale, 0, config.window,
                           config.num_sinks, chosen.value)  # fmt: skip
    packed: Tensor = output.squeeze(0).transpose(0, 1)
    return packed


def window_attention_chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: WindowState | None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    config: WindowConfig = WindowConfig(),
    impl: Impl | str = "auto",
) -> WindowOutput:
    """Causal window attention over a stream, a chunk of any size at a time.

    Chunks of any sizes, down to one token, give what one causal pass over the whole stream gives.

    Args:
        query: (B, H, N, D): the next N tokens of the stream.
        key: (B, H_kv, N, D), of the same tokens.
        value: (B, H_kv, N, D_v).
        state: what the previous chunk returned; None at the start of the stream.
        scale, enable_gqa, config, impl: as in `window_attention`.

    Returns:
        WindowOutput: output (B, H, N, D_v), and the final state, which holds at most
        num_sinks + window - 1 keys whatever the number of tokens seen.

    Raises:
        ShapeError: tensors do not fit together or to the state.
        ConfigError: the state was made with other settings.
        UnsupportedError: a named `impl` that cannot run the call.

    Cost:
        Time O((N + window) D H) and a copy of the state per chunk.

    Example:
        >>> q = torch.randn(1, 2, 10, 16)
        >>> settings = WindowConfig(window=4, num_sinks=1)
        >>> first, state = window_attention_chunk(q[:, :, :9], q[:, :, :9], q[:, :, :9], None,
        ...                                       config=settings)
        >>> last, state = window_attention_chunk(q[:, :, 9:], q[:, :, 9:], q[:, :, 9:], state,
        ...                                      config=settings)
        >>> state.seen, state.key.shape[2]
        (10, 4)
    """
    name = "window_attention_chunk"
    check_config(name, config, WindowConfig)
    call = validate(name, query, key, value, is_causal=True, scale=scale,
                    enable_gqa=enable_gqa)  # fmt: skip
    if call.query.shape[2] != call.key.shape[2]:
        raise ShapeError(
            f"{name}: query has {call.query.shape[2]} tokens but key has {call.key.shape[2]}. "
            "A chunk brings the queries, keys and values of the same tokens; pass equal lengths."
        )
    seen = 0
    if state is not None:
        _check_state(name, call, state, config)
        seen = state.seen
        call = call._replace(
            key=torch.cat((state.key, call.key), dim=2),
            value=torch.cat((state.value, call.value), dim=2),
            query_offset=state.key.shape[2],
        )
    output = _run(name, call, config, impl).output
    final = WindowState(
        key=_keep(call.key, config),
        value=_keep(call.value, config),
        seen=seen + query.shape[2],
        config=config,
    )
    return WindowOutput(output, final)


def implementations(call: Call, config: WindowConfig) -> tuple[ImplReport, ...]:
    """Triton kernels where they can run, then plain torch, then the dense definition."""
    widest = max(call.query.shape[-1], call.value.shape[-1])
    refusal = triton_refusal(call.query)
    if refusal is None and call.query.dtype is torch.float32 and widest > _WIDEST_SINGLE:
        refusal = (
            f"float32 with a head dim of {widest}; the Triton kernels take up to "
            f"{_WIDEST_SINGLE} in float32 (256 in half precision), beyond it registers spill"
        )
    return (
        ImplReport(Impl.TRITON, refusal, "tiles of the window only"),
        ImplReport(Impl.EAGER, None, "blocks of the window in plain torch"),
        ImplReport(Impl.REFERENCE, None, "dense"),
    )


def visited_fraction(
    config: WindowConfig, n_q: int, n_k: int, *, is_causal: bool, query_offset: int = 0
) -> float:
    """Share of the scores that exact attention would compute; counted exactly, in constant time.

    1.0 if there are none.
    """
    first, past = query_offset, query_offset + n_q  # key indices of the rows
    window, sinks = config.window, min(config.num_sinks, n_k)
    reach = 1 if is_causal else window
    # A row at p has window keys lo(p) .. hi(p) - 1 with lo and hi clamped to 0 .. n_k.
    hi = _clamped_sum(first + reach, past + reach, n_k)
    lo = _clamped_sum(first - window + 1, past - window + 1, n_k)
    apart = _clamped_sum(first - window + 1, past - window + 1, sinks)  # sinks before lo(p)
    if is_causal:
        visible = hi
    else:
        apart += n_q * sinks - _clamped_sum(first + reach, past + reach, sinks)  # from hi(p) on
        visible = n_q * n_k
    return (hi - lo + apart) / visible if visible else 1.0


def _clamped_sum(start: int, stop: int, most: int) -> int:
    """Sum of min(max(x, 0), most) over start <= x < stop."""

    def below(x: int) -> int:
        inside = min(max(x, 0), most + 1)
        return inside * (inside - 1) // 2 + max(x - most - 1, 0) * most

    return below(stop) - below(start)


def _run(name: str, call: Call, config: WindowConfig, impl: Impl | str) -> AttentionOutput:
    chosen = choose_impl(name, impl, implementations(call, config))
    if chosen is Impl.REFERENCE:
        with torch.autocast(call.query.device.type, enabled=False):
            return window_reference(call, config)
    output, lse = window_fwd(*call[:4], None, None, 0, 0, call.is_causal, call.scale,
                             call.query_offset, config.window, config.num_sinks,
                             chosen.value)  # fmt: skip
    return AttentionOutput(output, lse)


def _varlen_reference(name: str, call: VarlenCall, config: WindowConfig) -> Tensor:
    def one(q: Tensor, k: Tensor, v: Tensor, offset: int) -> Tensor:
        return window_reference(
            Call(q, k, v, None, call.is_causal, call.scale, offset), config
        ).output

    with torch.autocast(call.query.device.type, enabled=False):
        return run_each_sequence(name, call, one)


def _keep(tensor: Tensor, config: WindowConfig) -> Tensor:
    """(B, H_kv, K, D) of (B, H_kv, N, D): the sinks and the last window - 1, as a new tensor."""
    length, recent = tensor.shape[2], config.window - 1
    if length <= config.num_sinks + recent:
        return tensor.clone(memory_format=torch.contiguous_format)
    return torch.cat((tensor[:, :, : config.num_sinks], tensor[:, :, length - recent :]), dim=2)


def _check_state(name: str, call: Call, state: WindowState, config: WindowConfig) -> None:
    if not isinstance(state, WindowState):
        raise ShapeError(
            f"{name}: state is a {type(state).__name__}; it must be the final_state of the "
            "previous chunk, or None at the start of a stream."
        )
    if state.config != config:
        raise ConfigError(
            f"{name}: state was made with {state.config} but config is {config}. "
            "Pass the settings it was made with, or state=None to start again."
        )
    for label, old, new in (("key", state.key, call.key), ("value", state.value, call.value)):
        fits = old.shape[:2] == new.shape[:2] and old.shape[3] == new.shape[3]
        if not fits or old.dtype != new.dtype or old.device != new.device:
            raise ShapeError(
                f"{name}: state.{label} is {tuple(old.shape)} {old.dtype} on {old.device} but "
                f"{label} is {tuple(new.shape)} {new.dtype} on {new.device}. Batch, heads, head "
                "dim, dtype and device must agree; move or reorder the state, or start again "
                "with state=None."
            )
