"""Public functions of exact attention."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._select import choose_impl
from .._triton.launch import capability
from .._validation import Call, check_config, validate, validate_varlen
from .._varlen import run_each_sequence
from ..errors import ShapeError, UnsupportedError
from ..types import AttentionOutput, Impl, ImplReport
from .config import ExactConfig
from .impl.reference import exact_reference
from .impl.vendor import positive_scale
from .ops import exact_fwd

__all__ = [
    "exact_attention",
    "exact_attention_varlen",
    "exact_attention_with_lse",
    "implementations",
    "visited_fraction",
]

_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cpu": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Torch tries flash first; on Hopper cuDNN is about 1.5 times as fast (benchmarks/results).
_HOPPER_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_CUDNN_WIDEST = 128
_HALF = (torch.float16, torch.bfloat16)


def exact_attention(
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
    config: ExactConfig = ExactConfig(),
    impl: Impl | str = "auto",
) -> Tensor:
    """Softmax attention by the fastest kernel that torch has for the device.

    output_i = sum_j softmax_j(scale q_i . k_j) v_j over the keys j that query i sees.

    Args:
        query: (B, H, N_q, D), float16 / bfloat16 / float32 / float64.
        key: (B, H_kv, N_k, D), dtype and device of `query`.
        value: (B, H_kv, N_k, D_v).
        attn_mask: broadcasts to (B, H, N_q, N_k); boolean (True takes part) or additive float.
            Not together with `is_causal`.
        dropout_p: probability of dropping a weight, from torch's global random state.
        is_causal: row i sees keys 0 .. i + query_offset.
        scale: multiplies the scores. Default: D ** -0.5.
        enable_gqa: H may be a multiple of H_kv.
        query_offset: index, in keys, of the first query. Default: 0, as in torch; pass N_k - N_q
            when decoding.
        key_lengths: (B,), int32, valid keys per batch entry; the rest is padding on the right.
        config: which backend of torch runs; the default takes the fastest that accepts the call.
        impl: "auto", "eager" (torch's kernels) or "reference" (dense).

    Returns:
        (B, H, N_q, D_v) in `query.dtype`; rows without visible keys are zero.

    Raises:
        ShapeError: tensors do not fit together.
        UnsupportedError: `attn_mask` with `is_causal`, dropout with an argument torch lacks, or a
            named backend that cannot run the call.

    Semantics:
        Without `query_offset` and `key_lengths` this is torch's own call, bit for bit. On CUDA
        the bits of the gradients repeat only under `torch.use_deterministic_algorithms(True)`.

    Cost:
        4 N_q N_k D H operations (half when causal), memory O(N). `key_lengths` costs one device
        synchronisation.

    Example:
        >>> q = torch.randn(1, 2, 128, 64)
        >>> exact_attention(q, q, q, is_causal=True).shape
        torch.Size([1, 2, 128, 64])
    """
    check_config("exact_attention", config, ExactConfig)
    call = _validated("exact_attention", query, key, value, attn_mask, is_causal, scale,
                      enable_gqa, query_offset, key_lengths)  # fmt: skip
    if not 0.0 <= dropout_p <= 1.0:
        raise ShapeError(
            f"exact_attention: dropout_p is {dropout_p}; it must be a probability, 0.0 to 1.0. "
            "Pass 0.0 to drop nothing."
        )
    chosen = choose_impl("exact_attention", impl, implementations(call, config, attn_mask))
    if chosen is Impl.EAGER and _is_torch_call(call, config):
        return _torch_call(call, attn_mask, dropout_p, config)
    if dropout_p != 0.0:
        raise UnsupportedError(
            f"exact_attention: dropout_p is {dropout_p} together with an argument that torch's "
            "kernels do not have (query_offset, key_lengths, impl='reference' or another value "
            "dim). Only 0.0 is supported then; apply dropout to the output instead."
        )
    return _with_lse(call, attn_mask, config, chosen).output


def exact_attention_with_lse(
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
    config: ExactConfig = ExactConfig(),
    impl: Impl | str = "auto",
) -> AttentionOutput:
    """Softmax attention and the log-sum-exp of its scores, both differentiable.

    Args:
        query, key, value, attn_mask, is_causal, scale, enable_gqa, query_offset, key_lengths,
            config, impl: as in `exact_attention`. A float `attn_mask` gets no gradient.
        dropout_p: must be 0.0.

    Returns:
        AttentionOutput: output (B, H, N_q, D_v) in `query.dtype`, lse (B, H, N_q) in float32
        (float64 for float64 inputs), natural log. Rows without visible keys: zeros and -inf.

    Raises:
        ShapeError, UnsupportedError: as `exact_attention`; also for dropout, for a mask that
            requires a gradient, and for the backend "efficient".

    Cost:
        As `exact_attention`, never N_q x N_k memory, forward or backward. The gradient through
        lse rides on torch's kernel as one or two further columns of the head dim.

    Example:
        >>> q = torch.randn(1, 2, 128, 64)
        >>> exact_attention_with_lse(q, q, q, is_causal=True).lse.shape
        torch.Size([1, 2, 128])
    """
    check_config("exact_attention_with_lse", config, ExactConfig)
    call = _validated("exact_attention_with_lse", query, key, value, attn_mask, is_causal, scale,
                      enable_gqa, query_offset, key_lengths)  # fmt: skip
    if dropout_p != 0.0:
        raise UnsupportedError(
            f"exact_attention_with_lse: dropout_p is {dropout_p}; only 0.0 is supported, because "
            "dropped weights have no log-sum-exp. Use exact_attention."
        )
    reports = implementations(call, config, attn_mask, needs_lse=True)
    chosen = choose_impl("exact_attention_with_lse", impl, reports)
    return _with_lse(call, attn_mask, config, chosen)


def exact_attention_varlen(
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
    config: ExactConfig = ExactConfig(),
    impl: Impl | str = "auto",
) -> Tensor:
    """Softmax attention inside each of several packed sequences.

    Args:
        query: (total_q, H, D); the sequences one after the other.
        key: (total_k, H_kv, D).
        value: (total_k, H_kv, D_v).
        cu_seqlens_q, cu_seqlens_k: (S + 1,), int32: 0, then the running totals of the lengths.
        max_seqlen_q, max_seqlen_k: longest sequence, or any upper bound; Python ints.
        is_causal: aligned at the end of each sequence: query i sees keys 0 .. i + n_k - n_q.
        scale, enable_gqa, config, impl: as in `exact_attention`.

    Returns:
        (total_q, H, D_v) in `query.dtype`; rows without visible keys are zero.

    Raises:
        ShapeError: tensors do not fit together, or cu_seqlens are inconsistent (checked where
            they are read, i.e. not by the CUDA kernel).
        UnsupportedError: a named backend or implementation that cannot run the call.

    Cost:
        One flash kernel on CUDA in half precision; elsewhere one call per sequence.

    Example:
        >>> q = torch.randn(10, 2, 16)
        >>> cu = torch.tensor([0, 4, 10], dtype=torch.int32)
        >>> exact_attention_varlen(q, q, q, cu, cu, 6, 6, is_causal=True).shape
        torch.Size([10, 2, 16])
    """
    name = "exact_attention_varlen"
    check_config(name, config, ExactConfig)
    call = validate_varlen(name, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                           max_seqlen_k, is_causal=is_causal, scale=scale,
                           enable_gqa=enable_gqa)  # fmt: skip
    on_flash = call.query.is_cuda and call.query.dtype in _HALF
    if on_flash and config.backend in ("auto", "flash") and impl in ("auto", "eager"):
        return _flash_varlen(*call)

    def one(q: Tensor, k: Tensor, v: Tensor, offset: int) -> Tensor:
        return exact_attention(q, k, v, is_causal=is_causal, scale=call.scale, enable_gqa=True,
                               query_offset=offset, config=config, impl=impl)  # fmt: skip

    return run_each_sequence(name, call, one)


def implementations(
    call: Call, config: ExactConfig, attn_mask: Tensor | None = None, *, needs_lse: bool = False
) -> tuple[ImplReport, ...]:
    """Whether torch's kernels can run the call, and which; the reference always can."""
    refusal, note = None, "torch's kernels"
    if not needs_lse and _is_torch_call(call, config):
        on_cpu = call.query.device.type == "cpu"
        if config.backend == "cpu" and not on_cpu:
            refusal = f"backend 'cpu' needs CPU tensors, query is on {call.query.device}"
        elif on_cpu and config.backend in ("flash", "cudnn", "efficient"):
            refusal = f"backend {config.backend!r} needs CUDA tensors, query is on the CPU"
        note = f"torch's scaled_dot_product_attention, backend {config.backend}"
    else:
        backend, refusal = _lse_backend(call, config, attn_mask)
        note = f"backend {backend}"
    return ImplReport(Impl.EAGER, refusal, note), ImplReport(Impl.REFERENCE, None, "dense")


def visited_fraction(
    config: ExactConfig, n_q: int, n_k: int, *, is_causal: bool, query_offset: int = 0
) -> float:
    """1.0: every visible score is computed."""
    return 1.0


def _validated(
    name: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None,
    is_causal: bool, scale: float | None, enable_gqa: bool, query_offset: int,
    key_lengths: Tensor | None,
) -> Call:  # fmt: skip
    call = validate(name, query, key, value, is_causal=is_causal, scale=scale,
                    enable_gqa=enable_gqa, query_offset=query_offset,
                    key_lengths=key_lengths)  # fmt: skip
    n_k = call.key.shape[2]
    if call.is_causal and call.key_lengths is None and call.query_offset >= n_k - 1:
        call = call._replace(is_causal=False)  # every row sees all keys: decoding
    if not call.is_causal and call.query_offset != 0:
        call = call._replace(query_offset=0)  # the offset only places the causal edge
    if attn_mask is None:
        return call
    if is_causal:
        raise UnsupportedError(
            f"{name}: attn_mask and is_causal=True were both given; what that means depends on "
            "the backend in torch. Put the triangle into the mask, or drop one of them."
        )
    if attn_mask.dtype is not torch.bool and not attn_mask.is_floating_point():
        raise ShapeError(
            f"{name}: attn_mask has dtype {attn_mask.dtype}; it must be boolean (True takes part) "
            "or floating point (added to the scores). Cast it."
        )
    target = (*call.query.shape[:3], n_k)
    pairs = zip(reversed(attn_mask.shape), reversed(target), strict=False)
    if attn_mask.ndim > 4 or any(size not in (1, full) for size, full in pairs):
        raise ShapeError(
            f"{name}: attn_mask has shape {tuple(attn_mask.shape)}; it must broadcast to "
            f"(B, H, N_q, N_k) = {target}. Unsqueeze the missing axes."
        )
    return call


def _is_torch_call(call: Call, config: ExactConfig) -> bool:
    """True if torch's public function computes exactly this call."""
    return (
        call.key_lengths is None
        and call.query_offset == 0
        and config.backend != "chunked"
        and call.value.shape[-1] == call.query.shape[-1]
        and call.query.numel() > 0
        and call.key.numel() > 0
    )


def _torch_call(
    call: Call, attn_mask: Tensor | None, dropout_p: float, config: ExactConfig
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype is not torch.bool:
        attn_mask = attn_mask.to(call.query.dtype)
    chosen: Any = contextlib.nullcontext()
    if config.backend in _SDPA:
        chosen = sdpa_kernel(_SDPA[config.backend])
    elif call.query.is_cuda and capability(call.query.device.index or 0) >= (9, 0):
        chosen = sdpa_kernel(_HOPPER_ORDER, set_priority=True)
    sign, scale = positive_scale(call.scale)
    with chosen:
        output = F.scaled_dot_product_attention(
            call.query if sign == 1 else sign * call.query,
            call.key,
            call.value,
            attn_mask,
            dropout_p,
            call.is_causal,
            scale=scale,
            enable_gqa=call.query.shape[1] != call.key.shape[1],
        )
    if output.is_cuda and output.requires_grad:
        # cuDNN's backward (torch 2.11) misreads an upstream gradient that is a slice of a longer
        # one, as torch.cat and narrow make them: wrong dq, dk and dv without an error.
        return _DenseGradient.apply(output)  # type: ignore[no-untyped-call,no-any-return]
    return output


class _DenseGradient(torch.autograd.Function):
    """Identity whose gradient lies in memory without gaps, as the output does or contiguous.

    A gradient in the output's layout needs no copy: torch would bring a contiguous one into it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.strides = output.stride()
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        extent = 1 + sum((n - 1) * s for n, s in zip(grad.shape, grad.stride(), strict=True))
        if grad.stride() == ctx.strides and extent == grad.numel():
            return grad
        return grad.contiguous()


def _lse_backend(
    call: Call, config: ExactConfig, attn_mask: Tensor | None
) -> tuple[str, str | None]:
    """The backend that returns lse, and why it cannot run (None if it can)."""
    backend = config.backend
    if backend == "auto":
        if attn_mask is None and call.query.device.type == "cpu":
            return "cpu", None
        half = call.query.is_cuda and call.query.dtype in _HALF
        return ("flash" if half and attn_mask is None else "chunked"), None
    if backend == "efficient":
        return backend, (
            "backend 'efficient' takes no query_offset, key_lengths or other value dim and "
            "returns no lse here; allowed are auto, flash, cudnn, cpu and chunked"
        )
    if backend != "chunked" and attn_mask is not None:
        return backend, f"backend {backend!r} takes no attn_mask; allowed are auto and chunked"
    if backend == "cpu" and call.query.device.type != "cpu":
        return backend, f"backend 'cpu' needs CPU tensors, query is on {call.query.device}"
    if backend in ("flash", "cudnn") and not (call.query.is_cuda and call.query.dtype in _HALF):
        return backend, (
            f"backend {backend!r} needs float16 or bfloat16 on CUDA, query is {call.query.dtype} "
            f"on {call.query.device}"
        )
    if backend == "cudnn" and max(call.query.shape[-1], call.value.shape[-1]) > _CUDNN_WIDEST:
        return backend, (
            f"backend 'cudnn' takes head dims to {_CUDNN_WIDEST} here, query has "
            f"{call.query.shape[-1]}, value {call.value.shape[-1]}; use auto or flash"
        )
    return backend, None


def _with_lse(
    call: Call, attn_mask: Tensor | None, config: ExactConfig, chosen: Impl
) -> AttentionOutput:
    if attn_mask is not None:
        if attn_mask.requires_grad:
            raise UnsupportedError(
                "exact_attention: attn_mask requires a gradient, which this call cannot give. "
                "Detach it, or call exact_attention without query_offset, key_lengths and lse."
            )
        shape = (*call.query.shape[:3], call.key.shape[2])
        attn_mask = attn_mask.expand(shape)
    if chosen is Impl.REFERENCE:
        return exact_reference(call, attn_mask)
    backend, _ = _lse_backend(call, config, attn_mask)
    output, lse = exact_fwd(
        call.query,
        call.key,
        call.value,
        attn_mask,
        call.key_lengths,
        call.is_causal,
        call.scale,
        call.query_offset,
        backend,
    )
    return AttentionOutput(output, lse)


def _flash_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, is_causal: bool, scale: float,
) -> Tensor:  # fmt: skip
    value_dim = value.shape[-1]
    dim = -(-max(query.shape[-1], value_dim) // 8) * 8
    sign, scale = positive_scale(scale)
    query = query if sign == 1 else sign * query
    query, key, value = (F.pad(t, (0, dim - t.shape[-1])) for t in (query, key, value))
    output = torch.ops.aten._flash_attention_forward(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0,
        is_causal, False, scale=scale,
    )[0]  # fmt: skip
    return output[..., :value_dim]  # type: ignore[no-any-return]
