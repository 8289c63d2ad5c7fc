"""Public functions of Conv-Basis attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._select import choose_impl
from .._triton.launch import triton_refusal
from .._validation import Call, check_config, validate, validate_varlen
from .._varlen import run_each_sequence
from ..errors import ConfigError, ShapeError, UnsupportedError
from ..exact.api import exact_attention_with_lse
from ..types import AttentionOutput, Impl, ImplReport
from .basis import ConvBasis, ConvBasisStats
from .config import ConvBasisConfig
from .impl.recover import exact_keys, shifted_columns

__all__ = [
    "conv_basis_apply",
    "conv_basis_attention",
    "conv_basis_attention_varlen",
    "conv_basis_attention_with_lse",
    "conv_basis_check",
    "conv_basis_recover",
    "implementations",
    "visited_fraction",
]


def conv_basis_attention(
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
    config: ConvBasisConfig = ConvBasisConfig(),
    seed: int = 0,
    impl: Impl | str = "auto",
) -> Tensor:
    """Causal softmax attention whose scores are read as few Toeplitz matrices.

    Recover splits the keys into at most k segments; inside a segment every column of the scores
    is taken to be the same function of the lag, c_g(i - j), read off its first column. Then
    output_i = sum_j exp(c_g(j)(i - j)) v_j / sum_j exp(c_g(j)(i - j)), by FFT. This is the
    paper's sum of k sub-convolutions, exponentiated and normalised [1], written without its
    subtractions. A check on sampled rows sends the heads that are not like this to exact attention.

    Scores of pretrained models hardly ever are: see the documentation before using it on one.

    Args:
        query: (B, H, N, D), float16 / bfloat16 / float32 / float64.
        key: (B, H_kv, N, D), dtype and device of `query`; H must be a multiple of H_kv.
        value: (B, H_kv, N, D_v).
        attn_mask: None, or a boolean right-padding mask (B or 1, 1, 1, N).
        dropout_p: must be 0.0.
        is_causal: must be True, the default: the scores must be lower triangular.
        scale: multiplies the scores. Default: D ** -0.5.
        enable_gqa: H may be a multiple of H_kv.
        query_offset: index, in keys, of the first query. Other than 0: exact attention.
        key_lengths: (B,), int32, valid keys per batch entry; the rest is padding on the right.
        config: `ConvBasisConfig()`.
        seed: picks the rows of the check.
        impl: "auto" picks per device and dtype, see `longspan.explain`; a named one runs or raises.

    Returns:
        (B, H, N, D_v) in `query.dtype`; rows without visible keys are zero.

    Raises:
        ShapeError: tensors do not fit together.
        UnsupportedError: `is_causal=False` (use `toeplitz_attention`), another `attn_mask`,
            dropout, a named `impl` that cannot run the call, or a head above `max_tv` with
            `on_violation="raise"`.

    Semantics:
        Exact attention is computed, and `longspan.explain` says so, where N_k < min_length, where
        query_offset is not 0, and where N_q is not N_k: a column cannot be read without the
        queries before. recover="binary" and "segment" and the check look at the whole
        sequence, so an early row may depend on later tokens through the choice of the segments
        and of the heads; recover="grid" with check_rows=0 keeps strict causality given N. Gradient:
        exact derivative of the approximation with the segments held fixed; of exact attention in
        heads that fell back, and in all with gradient="exact".

    Cost:
        Time O(H (k N D + k T D log N + N log N D)), memory O(N) beside the inputs in chunks of
        heads; the check adds O(H check_rows N D). One device synchronisation for the range
        guard and one for the check.

    Differs from the paper:
        Positive segments instead of signed differences (same sum, no cancellation), blocked FFT
        with a scale per block, starts in the last T columns are found, fewer than k segments are
        allowed, scores are scaled by D ** -0.5.

    Example:
        >>> q = torch.randn(1, 2, 128, 64)
        >>> conv_basis_attention(q, q, q, config=ConvBasisConfig(num_bases=4)).shape
        torch.Size([1, 2, 128, 64])

    References:
        [1] Liang et al., Conv-Basis: A New Paradigm for Efficient Attention Inference and Gradient
            Computation in Transformers, Findings of EMNLP 2025, arXiv:2405.05219.
    """
    name = "conv_basis_attention"
    check_config(name, config, ConvBasisConfig)
    call = _validated(name, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                      query_offset, key_lengths)  # fmt: skip
    return _run(name, call, config, seed, impl).output


def conv_basis_attention_with_lse(
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
    config: ConvBasisConfig = ConvBasisConfig(),
    seed: int = 0,
    impl: Impl | str = "auto",
) -> AttentionOutput:
    """Conv-Basis attention and the log-sum-exp of its scores, both differentiable.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, query_offset,
            key_lengths, config, seed, impl: as in `conv_basis_attention`.

    Returns:
        AttentionOutput: output (B, H, N, D_v) in `query.dtype`, lse (B, H, N) in float32
        (float64 for float64 inputs), natural log, of the modelled scores.

    Raises:
        ShapeError, UnsupportedError: as `conv_basis_attention`.

    Cost:
        As `conv_basis_attention`.

    Example:
        >>> q = torch.randn(1, 2, 128, 64)
        >>> conv_basis_attention_with_lse(q, q, q).lse.shape
        torch.Size([1, 2, 128])
    """
    name = "conv_basis_attention_with_lse"
    check_config(name, config, ConvBasisConfig)
    call = _validated(name, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                      query_offset, key_lengths)  # fmt: skip
    return _run(name, call, config, seed, impl)


def conv_basis_attention_varlen(
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
    config: ConvBasisConfig = ConvBasisConfig(),
    seed: int = 0,
    impl: Impl | str = "auto",
) -> Tensor:
    """Conv-Basis attention inside each of several packed sequences; each has its own segments.

    Args:
        query: (total_q, H, D); the sequences one after the other.
        key: (total_k, H_kv, D).
        value: (total_k, H_kv, D_v).
        cu_seqlens_q, cu_seqlens_k: (S + 1,), int32: 0, then the running totals of the lengths.
        max_seqlen_q, max_seqlen_k: longest sequence, or any upper bound; Python ints.
        is_causal, scale, enable_gqa, config, seed, impl: as in `conv_basis_attention`.

    Returns:
        (total_q, H, D_v) in `query.dtype`.

    Raises:
        ShapeError: tensors do not fit together, or cu_seqlens are inconsistent.
        UnsupportedError: as `conv_basis_attention`.

    Cost:
        One pass per sequence, as `conv_basis_attention`; reading cu_seqlens synchronises once.

    Example:
        >>> q = torch.randn(10, 2, 16)
        >>> cu = torch.tensor([0, 4, 10], dtype=torch.int32)
        >>> conv_basis_attention_varlen(q, q, q, cu, cu, 6, 6).shape
        torch.Size([10, 2, 16])
    """
    name = "conv_basis_attention_varlen"
    check_config(name, config, ConvBasisConfig)
    call = validate_varlen(name, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                           max_seqlen_k, is_causal=is_causal, scale=scale,
                           enable_gqa=enable_gqa)  # fmt: skip
    _check_causal(name, is_causal)

    def one(q: Tensor, k: Tensor, v: Tensor, offset: int) -> Tensor:
        return _run(name, Call(q, k, v, None, True, call.scale, offset), config, seed, impl).output

    return run_each_sequence(name, call, one)


def conv_basis_recover(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    config: ConvBasisConfig = ConvBasisConfig(),
) -> ConvBasis:
    """Find the Toeplitz pieces of the causal scores, to look at them or to apply them.

    Args:
        query: (B, H, N, D).
        key: (B, H_kv, N, D).
        scale, enable_gqa, key_lengths, config: as in `conv_basis_attention`; min_length, the
            check and the gradient setting play no role.

    Returns:
        ConvBasis. Its kernels are differentiable, its starts are not.

    Raises:
        ShapeError: tensors do not fit together, or query and key differ in length.

    Semantics:
        If the scores are within noise = eps of a matrix of k sub-convolutions whose borders
        change T leading entries by threshold = delta or more in sum, and eps <= delta / (5 T),
        recover="binary" finds exactly these borders, and every modelled score is within 2 eps.

    Cost:
        O(H k (N D + T D log N)), no device synchronisation.

    Example:
        >>> q = torch.randn(1, 2, 64, 8)
        >>> basis = conv_basis_recover(q, q, config=ConvBasisConfig(num_bases=3))
        >>> basis.starts.shape, basis.log_kernels.shape
        (torch.Size([1, 2, 3]), torch.Size([1, 2, 3, 64]))
    """
    name = "conv_basis_recover"
    check_config(name, config, ConvBasisConfig)
    call = validate(name, query, key, key, is_causal=True, scale=scale, enable_gqa=enable_gqa,
                    key_lengths=key_lengths)  # fmt: skip
    if query.shape[2] != key.shape[2]:
        raise ShapeError(
            f"{name}: query has {query.shape[2]} tokens but key has {key.shape[2]}. They must be "
            "equal: a column of scores is read from the queries after its key."
        )
    chosen = Impl.EAGER if triton_refusal(query) else Impl.TRITON
    return _basis(call, config, chosen)


def conv_basis_apply(basis: ConvBasis, value: Tensor) -> Tensor:
    """Attention of a recovered basis over any values.

    Args:
        basis: from `conv_basis_recover`.
        value: (B, H_kv, N, D_v).

    Returns:
        (B, H, N, D_v) in `value.dtype`; rows without visible keys are zero.

    Raises:
        ShapeError: `value` has another batch size, length, or a number of heads that does not
            divide that of the basis.

    Cost:
        O(H N D_v log N), plus near_window + num_sinks scores a row.

    Example:
        >>> q = torch.randn(1, 2, 64, 8)
        >>> basis = conv_basis_recover(q, q)
        >>> conv_basis_apply(basis, torch.randn(1, 2, 64, 5)).shape
        torch.Size([1, 2, 64, 5])
    """
    batch, heads, _, n = basis.log_kernels.shape
    fits = isinstance(value, Tensor) and value.ndim == 4
    if not fits or value.shape[0] != batch or value.shape[2] != n or heads % value.shape[1]:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(
            f"conv_basis_apply: value is {got}; it must be ({batch}, H_kv, {n}, D_v), H_kv a "
            f"divisor of {heads}. Pass the values of the tokens that the basis was made from."
        )
    return basis.apply(value).output


def conv_basis_check(
    basis: ConvBasis, query: Tensor, key: Tensor, *, check_rows: int = 64, seed: int = 0
) -> ConvBasisStats:
    """Compare the weights of a basis with the exact ones on sampled rows.

    Args:
        basis: from `conv_basis_recover`.
        query: (B, H, N, D), as given there.
        key: (B, H_kv, N, D), as given there.
        check_rows: number of rows, half of them in the later half of each sequence. At least 1.
        seed: picks them.

    Returns:
        ConvBasisStats.

    Raises:
        ConfigError: check_rows below 1.
        ShapeError: query or key do not fit the basis.

    Cost:
        O(H check_rows N D), plus one pass of the engine with one column.

    Example:
        >>> q = torch.randn(1, 2, 64, 8)
        >>> stats = conv_basis_check(conv_basis_recover(q, q), q, q, check_rows=8)
        >>> stats.p95.shape, bool((stats.distances <= 1).all())
        (torch.Size([1, 2]), True)
    """
    from .impl.certificate import sample_distances

    if isinstance(check_rows, bool) or not isinstance(check_rows, int) or check_rows < 1:
        raise ConfigError(
            f"conv_basis_check: check_rows is {check_rows!r}; it must be an int >= 1, e.g. 64."
        )
    batch, heads, _, n = basis.log_kernels.shape
    for label, tensor in (("query", query), ("key", key)):
        if tensor.ndim != 4 or tensor.shape[0] != batch or tensor.shape[2] != n or (
            label == "query" and tensor.shape[1] != heads
        ):  # fmt: skip
            raise ShapeError(
                f"conv_basis_check: {label} is {tuple(tensor.shape)}; the basis was made from "
                f"{batch} entries, {heads} heads and {n} tokens. Pass the same tensors."
            )
    ones = query.new_ones((batch, key.shape[1], n, 1))
    lse = basis.apply(ones).lse
    with torch.no_grad():
        rows, distances, residual = sample_distances(
            query, key, basis.lengths, basis.log_kernels, basis.starts, basis.key_offset,
            basis.row_offset, lse, basis.scale, basis.near, basis.num_sinks, check_rows, seed,
        )  # fmt: skip
    return ConvBasisStats(
        rows=rows, distances=distances, residual=residual, num_bases=basis.num_bases
    )


def implementations(call: Call, config: ConvBasisConfig) -> tuple[ImplReport, ...]:
    """Triton for the search of the borders, torch's FFT and products for the rest; dense."""
    why = _why_exact(call, config)
    note = f"exact attention: {why}" if why else "torch's FFT and matrix products"
    refusal = triton_refusal(call.query)
    half = call.query.dtype in (torch.float16, torch.bfloat16)
    if refusal is None and config.recover != "binary" and not half:
        refusal = "in float32 only recover='binary' has a Triton kernel (the search)"
    if refusal is None and why:
        refusal = f"the call is computed by exact attention ({why})"
    return (
        ImplReport(
            Impl.TRITON,
            refusal,
            "half precision: search, columns and engine on tensor cores; float32: the search",
        ),
        ImplReport(Impl.EAGER, None, note),
        ImplReport(Impl.REFERENCE, None, note if why else "dense weights"),
    )


def visited_fraction(
    config: ConvBasisConfig, n_q: int, n_k: int, *, is_causal: bool, query_offset: int = 0
) -> float:
    """Share of the visible scores that are computed from queries and keys, at most 1.

    Columns, probes, exact band and sinks, and the rows of the check; 1.0 where the call is exact.
    A head that falls back to exact attention is not counted: that is known at run time only.
    """
    visible = n_q * (n_q + 1) // 2
    if n_q != n_k or query_offset != 0 or n_k < config.min_length or visible == 0:
        return 1.0
    columns = 0 if config.recover == "means" else config.num_bases * n_q
    rounds = math.ceil(math.log2(n_k + 1))
    probes = config.num_bases * config.probe_length * rounds if config.recover == "binary" else 0
    near = min(exact_keys(config) + config.num_sinks, n_q) * n_q
    checked = 0 if config.on_violation == "return" else config.check_rows * n_q
    return min(1.0, (columns + probes + near + checked) / visible)


def _validated(
    name: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None,
    dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool, query_offset: int,
    key_lengths: Tensor | None,
) -> Call:  # fmt: skip
    call = validate(name, query, key, value, attn_mask=attn_mask, dropout_p=dropout_p,
                    is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
                    query_offset=query_offset, key_lengths=key_lengths)  # fmt: skip
    _check_causal(name, is_causal)
    return call


def _check_causal(name: str, is_causal: bool) -> None:
    if not is_causal:
        raise UnsupportedError(
            f"{name}: is_causal is False; only True is supported, because Conv-Basis is defined "
            "for lower-triangular scores. Pass is_causal=True, or use "
            "longspan.toeplitz_attention, which takes two-sided kernels."
        )


def _why_exact(call: Call, config: ConvBasisConfig) -> str | None:
    n_q, n_k = call.query.shape[2], call.key.shape[2]
    if call.query_offset != 0 or n_q != n_k:
        return "the queries of earlier tokens are not in the call (query_offset, or N_q != N_k)"
    if n_k < config.min_length:
        return f"{n_k} keys are fewer than min_length = {config.min_length}"
    if call.query.numel() == 0 or call.value.numel() == 0:
        return "an input is empty"
    if config.recover == "means" and config.rope_base and call.query.shape[-1] % 2:
        return "rotary embeddings need an even head dim"
    return None


def _run(
    name: str, call: Call, config: ConvBasisConfig, seed: int, impl: Impl | str
) -> AttentionOutput:
    chosen = choose_impl(name, impl, implementations(call, config))
    if _why_exact(call, config):
        return exact_attention_with_lse(
            call.query, call.key, call.value, is_causal=True, scale=call.scale, enable_gqa=True,
            query_offset=call.query_offset, key_lengths=call.key_lengths,
            impl="reference" if chosen is Impl.REFERENCE else "auto",
        )  # fmt: skip
    with torch.autocast(call.query.device.type, enabled=False):
        if chosen is Impl.REFERENCE:
            from .impl.reference import conv_basis_reference

            basis = _basis(call, config, Impl.EAGER)
            part = conv_basis_reference(call, basis)
        else:
            basis = _basis(call, config, chosen)
            part = basis.apply(call.value, "auto" if chosen is Impl.TRITON else "eager")
        return _with_fallback(call, basis, part, config, seed, chosen)


def _basis(call: Call, config: ConvBasisConfig, chosen: Impl) -> ConvBasis:
    from .impl.means import mean_model
    from .ops import find_starts, score_columns

    batch, n = call.key.shape[0], call.key.shape[2]
    device = call.query.device
    lengths = torch.full((batch,), n, device=device)
    if call.key_lengths is not None:
        lengths = call.key_lengths.long().clamp(0, n)
    starts = find_starts(
        call.query.detach(), call.key.detach(), lengths, call.scale, config.num_bases,
        config.probe_length, config.threshold, config.noise, config.recover, config.near_window,
        config.num_sinks, chosen.value,
    )  # fmt: skip
    near = exact_keys(config)
    key_offset = row_offset = None
    if config.recover == "means":
        typical = max(1, round(math.sqrt(max(near, 1) * n)))
        kernels, key_offset, row_offset = mean_model(
            call.query, call.key, lengths, call.scale, config.rope_base, typical
        )
    elif chosen is Impl.TRITON and call.query.dtype in (torch.float16, torch.bfloat16):
        kernels = score_columns(call.query, call.key, starts, call.scale)
    else:
        kernels = shifted_columns(call.query, call.key, starts, call.scale)
    keeps = near > 0
    return ConvBasis(
        starts=starts, log_kernels=kernels, key_offset=key_offset, row_offset=row_offset,
        lengths=lengths, is_padded=call.key_lengths is not None,
        near=near, num_sinks=config.num_sinks, scale=call.scale,
        query=call.query if keeps else None, key=call.key if keeps else None,
    )  # fmt: skip


def _with_fallback(
    call: Call,
    basis: ConvBasis,
    part: AttentionOutput,
    config: ConvBasisConfig,
    seed: int,
    impl: Impl,
) -> AttentionOutput:
    from .ops import exact_heads, find_violations

    checks = config.check_rows > 0 and config.on_violation != "return"
    if checks:
        offsets = (basis.key_offset, basis.row_offset)
        detached = [None if t is None else t.detach() for t in offsets]
        chosen = find_violations(
            call.query.detach(), call.key.detach(), basis.lengths, basis.log_kernels.detach(),
            basis.starts, *detached, part.lse.detach(), call.scale, basis.near, basis.num_sinks,
            config.check_rows, config.max_tv, config.on_violation, seed,
            "auto" if impl is Impl.TRITON else "eager",
        )  # fmt: skip
    else:
        chosen = torch.zeros(call.query.shape[:2], dtype=torch.bool, device=call.query.device)
    may_be_exact = checks and config.on_violation == "exact"
    if may_be_exact and config.gradient != "exact" and not torch.compiler.is_compiling():
        may_be_exact = bool(chosen.any())  # no head: spare the copies
    if may_be_exact or config.gradient == "exact":
        output, lse = exact_heads(call.query, call.key, call.value, call.key_lengths, *part,
                                  chosen, call.scale, config.gradient == "exact")  # fmt: skip
        return AttentionOutput(output, lse)
    return part
