"""Public functions of HyperAttention."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .._random import seed_of_heads
from .._select import choose_impl
from .._triton.launch import triton_refusal
from .._validation import Call, check_config, validate, validate_varlen
from .._varlen import run_each_sequence
from ..errors import ShapeError
from ..types import AttentionOutput, Impl, ImplReport
from .config import HyperConfig
from .impl.common import choose
from .impl.control import apply_control, control_call
from .impl.decode import MOST_QUERIES, decode_forward
from .impl.recursion import entries_of, geometry_of, recursion_index
from .impl.reference import chunks_reference, recursion_reference
from .incremental import Finished, IndexCache
from .index.lsh import draw_projections
from .ops import hyper_fwd, hyper_index, settings_of
from .plan import ChunkIndex
from .visited import visited_fraction

__all__ = [
    "hyper_attention",
    "hyper_attention_varlen",
    "hyper_attention_with_lse",
    "implementations",
    "visited_fraction",
]

_WIDEST_SINGLE = 128


def hyper_attention(
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
    config: HyperConfig = HyperConfig(),
    projections: Tensor | None = None,
    seed: int = 0,
    head_offset: int = 0,
    impl: Impl | str = "auto",
) -> Tensor:
    """Softmax attention in which far keys are visited only where an index finds large scores.

    With A = exp(scale * Q K^T) and D its row sums, HyperAttention [1] splits A by a mask M into
    M . A, the large entries that an index finds, computed exactly, and (1 - M) . A, the rest,
    estimated; the output approximates D^-1 A V.

    By default (`structure="chunks"`) the last keys and the first ones (sinks) are exact, and keys
    before them lie in chunks of consecutive keys, clustered inside of each chunk. Each query opens
    the `num_probes` clusters with the largest scale * q . mean_key + log(count) and visits their
    keys; every other cluster is one column of mean key and mean value, weighted by its count.
    `HyperConfig.paper()` is the algorithm of [1]: sortLSH blocks, uniform samples with weight n/m,
    exact leaves, and the recursion over halves for causal calls.

    Args:
        query: (B, H, N_q, D), float16 / bfloat16 / float32 / float64.
        key: (B, H_kv, N_k, D), dtype and device of `query`; H must be a multiple of H_kv.
        value: (B, H_kv, N_k, D_v).
        attn_mask: None, or a boolean right-padding mask (B or 1, 1, 1, N_k).
        dropout_p: must be 0.0.
        is_causal: row i sees keys 0 .. i + query_offset.
        scale: multiplies the scores. Default: D ** -0.5.
        enable_gqa: H may be a multiple of H_kv; keys are indexed once for each of the H_kv.
        query_offset: index, in keys, of the first query. Default: 0, as in torch; pass N_k - N_q
            when decoding.
        key_lengths: (B,), int32, valid keys per batch entry; the rest is padding on the right.
        config: what the approximation is, see `HyperConfig`.
        projections: (H_kv, D, config.num_projections), the hash planes of index="lsh". Default:
            drawn from `seed`.
        seed: makes `projections` and the samples; the default settings draw nothing.
        head_offset: index of the first of these key heads among all that share the seed, for
            ranks that hold some heads each.
        impl: "auto" picks per device and dtype, see `longspan.explain`; a named one runs or raises.

    Returns:
        (B, H, N_q, D_v) in `query.dtype`; rows without visible keys are zero.

    Raises:
        ShapeError: tensors do not fit together.
        UnsupportedError: another `attn_mask`, dropout, or a named `impl` that cannot run the call.

    Semantics:
        Settings larger than the input are no error: with a window over all keys, or with as many
        probes as there are clusters, the result is exact attention. `structure="chunks"` is
        strictly causal (a chunk is indexed by its own keys, once all of them lie before the
        window), so decoding equals prefill. The recursion of the paper is not: how a query's
        block is made up depends on the other queries of its half, later ones included; neither
        does decoding equal prefill there. The gradient is the exact derivative of the estimator
        with the index and the choice held fixed, also through lse.

    Cost:
        For N queries and keys, per head and with the defaults: window + chunk_size / 2 + sinks +
        num_probes * cluster_size keys and N / (2 cluster_size) columns for each query (causal),
        and index work of about num_iterations * N * chunk_size / cluster_size products.
        Memory O(N). `longspan.explain` gives the visited fraction.

    Differs from the paper:
        The default visits clusters chosen by each query, with centroid columns instead of samples
        and a window; `HyperConfig.paper()` differs from [1] in that a key of a row's own block is
        not counted again when it is sampled, leaves are aligned to multiples of min_length, and
        one sample serves numerator and denominator, without cap and floor (as in the authors'
        code).

    Example:
        >>> q = torch.randn(1, 2, 1024, 64)
        >>> hyper_attention(q, q, q, is_causal=True, config=HyperConfig(window=128)).shape
        torch.Size([1, 2, 1024, 64])

    References:
        [1] Han et al., HyperAttention: Long-context Attention in Near-Linear Time, ICLR 2024,
            arXiv:2310.05869v3.
    """
    check_config("hyper_attention", config, HyperConfig)
    call = validate("hyper_attention", query, key, value, attn_mask=attn_mask,
                    dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
                    query_offset=query_offset, key_lengths=key_lengths)  # fmt: skip
    return run_call("hyper_attention", call, config, projections,
                    seed_of_heads(seed, head_offset), impl).output  # fmt: skip


def hyper_attention_with_lse(
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
    config: HyperConfig = HyperConfig(),
    projections: Tensor | None = None,
    seed: int = 0,
    head_offset: int = 0,
    impl: Impl | str = "auto",
) -> AttentionOutput:
    """HyperAttention and the logarithm of its estimate of the row sums, both differentiable.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, query_offset,
            key_lengths, config, projections, seed, head_offset, impl: as in `hyper_attention`.

    Returns:
        AttentionOutput: output (B, H, N_q, D_v) in `query.dtype`, lse (B, H, N_q) in float32
        (float64 for float64 inputs), natural log. Rows without visible keys: zeros and -inf.

    Raises:
        ShapeError, UnsupportedError: as `hyper_attention`.

    Cost:
        As `hyper_attention`.

    Example:
        >>> q = torch.zeros(1, 1, 2048, 64)
        >>> lse = hyper_attention_with_lse(q, q, q, is_causal=True).lse
        >>> torch.allclose(lse[0, 0, -1].exp(), torch.tensor(2048.0))
        True
    """
    name = "hyper_attention_with_lse"
    check_config(name, config, HyperConfig)
    call = validate(name, query, key, value, attn_mask=attn_mask, dropout_p=dropout_p,
                    is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
                    query_offset=query_offset, key_lengths=key_lengths)  # fmt: skip
    return run_call(name, call, config, projections, seed_of_heads(seed, head_offset), impl)


def hyper_attention_varlen(
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
    config: HyperConfig = HyperConfig(),
    projections: Tensor | None = None,
    seed: int = 0,
    head_offset: int = 0,
    impl: Impl | str = "auto",
) -> Tensor:
    """HyperAttention inside each of several packed sequences; each has sinks and chunks of its own.

    Args:
        query: (total_q, H, D); the sequences one after the other.
        key: (total_k, H_kv, D).
        value: (total_k, H_kv, D_v).
        cu_seqlens_q, cu_seqlens_k: (S + 1,), int32: 0, then the running totals of the lengths.
        max_seqlen_q, max_seqlen_k: longest sequence, or any upper bound; Python ints.
        is_causal: as in `hyper_attention`, aligned at the end of each sequence.
        scale, enable_gqa, config, projections, seed, head_offset, impl: as in `hyper_attention`.

    Returns:
        (total_q, H, D_v) in `query.dtype`; rows without visible keys are zero.

    Raises:
        ShapeError: tensors do not fit together, or cu_seqlens are inconsistent.
        UnsupportedError: a named `impl` that cannot run the call.

    Cost:
        One pass per sequence, and one device synchronisation.

    Example:
        >>> q = torch.randn(10, 2, 16)
        >>> cu = torch.tensor([0, 4, 10], dtype=torch.int32)
        >>> hyper_attention_varlen(q, q, q, cu, cu, 6, 6, is_causal=True).shape
        torch.Size([10, 2, 16])
    """
    name = "hyper_attention_varlen"
    check_config(name, config, HyperConfig)
    call = validate_varlen(name, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                           max_seqlen_k, is_causal=is_causal, scale=scale,
                           enable_gqa=enable_gqa)  # fmt: skip

    def one(q: Tensor, k: Tensor, v: Tensor, offset: int) -> Tensor:
        dense = Call(q, k, v, None, call.is_causal, call.scale, offset)
        start = seed_of_heads(seed, head_offset)
        return run_call(name, dense, config, projections, start, impl).output

    return run_each_sequence(name, call, one)


def implementations(call: Call, config: HyperConfig) -> tuple[ImplReport, ...]:
    """Triton kernels where they can run, then plain torch, then the dense definition."""
    return (
        ImplReport(Impl.TRITON, _triton_refusal(call, config), "gathers inside of fused kernels"),
        ImplReport(Impl.EAGER, None, "sub-quadratic, in plain torch"),
        ImplReport(Impl.REFERENCE, None, "dense"),
    )


def _triton_refusal(call: Call, config: HyperConfig) -> str | None:
    """Why the kernels cannot run a call; None if they can."""
    refusal = triton_refusal(call.query)
    if refusal is not None:
        return refusal
    if config.structure == "chunks":
        refusal = _chunks_refusal(call, config)
        if refusal is not None:
            return refusal
    elif call.key_lengths is not None:
        return "key_lengths with structure='recursion': every batch entry is cut differently"
    elif config.residual == "centroid":
        return "residual='centroid' with structure='recursion' has no Triton kernels"
    widest = max(call.query.shape[-1], call.value.shape[-1])
    if call.query.dtype is torch.float32 and widest > _WIDEST_SINGLE:
        return (
            f"float32 with a head dim of {widest}; the Triton kernels take up to "
            f"{_WIDEST_SINGLE} in float32 (256 in half precision), beyond it registers spill"
        )
    return None


def _chunks_refusal(call: Call, config: HyperConfig) -> str | None:
    """The same for structure="chunks"."""
    if not call.is_causal:
        return "not causal with structure='chunks': the Triton kernels are causal"
    if call.key_lengths is not None:
        return "key_lengths with structure='chunks': the Triton kernels take none"
    if config.residual not in ("centroid", "none"):
        return f"residual={config.residual!r} with structure='chunks' has no Triton kernels"
    for name in ("num_globals", "variance_term"):
        if getattr(config, name):
            return f"{name} with structure='chunks' has no Triton kernels"
    return None


def run_call(
    name: str,
    call: Call,
    config: HyperConfig,
    projections: Tensor | None,
    seed: int,
    impl: Impl | str,
    index: ChunkIndex | None = None,
) -> AttentionOutput:
    """A validated call; `index` is that of all full chunks, where it is known already."""
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise ShapeError(
            f"{name}: seed is {type(seed).__name__} {seed!r}; it must be an int, which makes the "
            "hash planes and samples. Pass e.g. seed=0."
        )
    planes = _planes(name, call, config, projections, seed)
    if index is None and not torch.compiler.is_compiling():
        cache = IndexCache.of_key(call.key)
        plain = call.is_causal and call.key_lengths is None and projections is None
        if cache is not None and plain and config.structure == "chunks" and not config.max_error:
            finished = cache.get(call.key, call.value, config, planes, seed)
            return stream_call(name, call, config, seed, impl, finished)
    chosen = choose_impl(name, impl, implementations(call, config))
    result = _estimate(call, config, planes, seed, chosen, index)
    if config.max_error is not None:
        from .fallback import exact_where_needed

        result = exact_where_needed(call, config, result, config.max_error, chosen)
    return result


def stream_call(
    name: str,
    call: Call,
    config: HyperConfig,
    seed: int,
    impl: Impl | str,
    finished: Finished,
) -> AttentionOutput:
    """Output and lse of a validated causal call whose full chunks are indexed already."""
    chosen = choose_impl(name, impl, implementations(call, config))
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in call[:3])
    few = call.query.shape[2] <= MOST_QUERIES
    if chosen is not Impl.REFERENCE and few and not needs_grad and call.query.numel():
        with torch.no_grad(), torch.autocast(call.query.device.type, enabled=False):
            return AttentionOutput(*decode_forward(call, config, finished.lookup, finished.columns))
    planes = _planes(name, call, config, None, seed)
    return _estimate(call, config, planes, seed, chosen, finished.lookup)


def estimate_exactly(call: Call, config: HyperConfig, chosen: Impl) -> AttentionOutput:
    """The same call with a window (or a leaf) over everything."""
    longest = max(1, call.key.shape[2], call.query.shape[2] + abs(call.query_offset))
    whole = replace(config, window=longest, min_length=longest, max_error=None, index="kmeans")
    return _estimate(call, whole, None, 0, chosen, None)


def _estimate(
    call: Call,
    config: HyperConfig,
    planes: Tensor | None,
    seed: int,
    chosen: Impl,
    index: ChunkIndex | None,
) -> AttentionOutput:
    if chosen is Impl.REFERENCE:
        with torch.autocast(call.query.device.type, enabled=False):
            return _reference(call, config, planes, seed)
    settings = settings_of(config)
    if index is None:
        inputs = (tensor.detach() for tensor in call[:3])  # the index has no gradient
        made = hyper_index(*inputs, call.key_lengths, planes, call.is_causal, call.query_offset,
                           *settings, seed, chosen.value)  # fmt: skip
    else:
        made = list(index)
    output, lse, opened = hyper_fwd(*call[:4], planes, made, None, call.is_causal, call.scale,
                                    call.query_offset, *settings, seed, chosen.value)  # fmt: skip
    control = control_call(call, config) if config.control_weight else None
    if control is None:
        return AttentionOutput(output, lse)
    modelled = control[0]
    part = hyper_fwd(*modelled[:4], planes, made, opened, True, modelled.scale, 0, *settings, seed,
                     Impl.EAGER.value)  # fmt: skip
    return apply_control(AttentionOutput(output, lse), control, AttentionOutput(*part[:2]),
                         config.control_weight)  # fmt: skip


def _reference(
    call: Call, config: HyperConfig, planes: Tensor | None, seed: int
) -> AttentionOutput:
    from .impl.common import chunk_index

    if config.structure == "chunks":
        with torch.no_grad():
            index = chunk_index(call, config, planes, seed)
            chosen = choose(call, config, index)
        plain = chunks_reference(call, config, index, chosen)
        control = control_call(call, config) if config.control_weight else None
        if control is None:
            return plain
        sampled = chunks_reference(control[0], config, index, chosen)
        return apply_control(plain, control, sampled, config.control_weight)
    parts = []
    for _, part in entries_of(call):
        with torch.no_grad():
            sorted_index = recursion_index(part, config, planes, seed)
        parts.append(recursion_reference(part, config, geometry_of(part, config), sorted_index))
    if len(parts) == 1:
        return parts[0]
    outputs = [part.output for part in parts] or [call.query.new_zeros(
        (0, *call.query.shape[1:3], call.value.shape[3]))]  # fmt: skip
    lses = [part.lse for part in parts] or [outputs[0].new_zeros((0, *call.query.shape[1:3]))]
    return AttentionOutput(torch.cat(outputs), torch.cat(lses))


def _planes(
    name: str, call: Call, config: HyperConfig, projections: Tensor | None, seed: int
) -> Tensor | None:
    kv_heads, dim = call.key.shape[1], call.key.shape[3]
    if config.index != "lsh":
        if projections is not None:
            raise ShapeError(
                f"{name}: projections were given, but index={config.index!r} has no hash planes. "
                "Use HyperConfig(index='lsh'), or leave projections out."
            )
        return None
    if projections is None:
        return draw_projections(seed, kv_heads, dim, config.num_projections, call.query.device)
    want = (kv_heads, dim, config.num_projections)
    if not isinstance(projections, Tensor) or tuple(projections.shape) != want:
        got = tuple(projections.shape) if isinstance(projections, Tensor) else repr(projections)
        raise ShapeError(
            f"{name}: projections is {got}; it must be a tensor of shape {want}, "
            "(H_kv, D, config.num_projections). Reshape it, or pass a seed."
        )
    if not projections.is_floating_point() or projections.device != call.query.device:
        raise ShapeError(
            f"{name}: projections is {projections.dtype} on {projections.device}; it must be a "
            f"float tensor on {call.query.device}. Cast or move it."
        )
    return projections.detach()
