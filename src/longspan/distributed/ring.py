"""Ring attention: queries stay with their rank, keys go to them; heads stay together.

What moves depends on the mechanism: exact attention sends all keys round, stick-breaking sends them
nearest first and stops when no stick is left, windows fetch only what they see.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._select import choose_impl
from .._triton.launch import capability
from .._validation import Call, validate
from ..errors import UnsupportedError
from ..exact.api import exact_attention_with_lse
from ..exact.api import implementations as exact_implementations
from ..exact.config import ExactConfig
from ..mechanisms import mechanism_of_config
from ..stick_breaking.api import StickBreakingOutput, stick_breaking_attention_with_remainder
from ..stick_breaking.call import check_call
from ..stick_breaking.config import StickBreakingConfig
from ..stick_breaking.remainder import give_to_own_value
from ..types import AttentionOutput, Impl
from ..window.api import window_attention_with_lse
from ..window.config import WindowConfig
from .chain import ChainInputs, stick_breaking_chain
from .checks import as_batch, as_packed, check_local, describe, verified
from .exact_ring import exact_ring
from .group import ContextGroup
from .halo import Reach, neighbour_attention
from .layout import SequenceLayout
from .tiles import local_lengths

__all__ = [
    "ring_attention",
    "ring_attention_varlen",
    "ring_attention_with_lse",
    "ring_attention_with_remainder",
]


class _Task(NamedTuple):
    """A checked call of this rank."""

    name: str
    call: Call
    config: Any
    group: ContextGroup
    layout: SequenceLayout
    logit_bias: Tensor | None
    impl: str
    recompute: bool


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: Any = ExactConfig(),
    *,
    group: ContextGroup,
    layout: SequenceLayout,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    logit_bias: Tensor | None = None,
    recompute: bool = True,
    impl: Impl | str = "auto",
) -> Tensor:
    """Exact, window or stick-breaking self-attention over a sequence that is spread over ranks.

    Args:
        query: (B, H, n, D), the tokens that `layout` gives this rank; n may differ between ranks.
        key: (B, H_kv, n, D), of the same tokens.
        value: (B, H_kv, n, D_v).
        config: ExactConfig, WindowConfig or StickBreakingConfig.
        group: the ranks that share the sequence.
        layout: which rank holds which tokens; equal on all ranks.
        is_causal, scale, enable_gqa: as in the mechanism's function.
        key_lengths: (B,), int32, valid keys of each entry of the whole sequence.
        logit_bias: (H,), of stick-breaking only; its gradient is this rank's share, and the sum
            over ranks is the whole.
        recompute: of stick-breaking only. True computes parts again in the backward; False keeps
            them, which saves a forward pass and needs the memory of one output, and of the keys,
            per chunk of keys that was visited.
        impl: as in the mechanism's function, for the parts computed here.

    Returns:
        (B, H, n, D_v), this rank's tokens, in `query.dtype`.

    Raises:
        ShapeError: a tensor is not this rank's share.
        UnsupportedError: another mechanism (use ulysses_attention), documents in a dense call, or
            torch's context-parallel manager is active.
        RankError: ranks differ in shapes, settings or layout (found before the first exchange), or
            one stopped.

    Semantics:
        Exact: parts join by lse in float32, and gradients are those of the whole softmax.
        Window, and stick-breaking with `config.window`: the rows that a rank's queries see are
        fetched, then the mechanism's own kernels run once. Stick-breaking: parts join nearest
        first; with `early_stop` a row stops at the first chunk that leaves it less than that
        share, so results depend on the layout within the mechanism's bound.

    Cost:
        Bytes received per rank, N tokens, R ranks, b = bytes of a key and its value in all key
        heads: exact and stick-breaking forward N b (R - 1) / R, backward three times that in half
        precision (keys again, their float32 gradients); window (window + num_sinks) b. They move
        while a part is computed. "zigzag" gives every rank the same work when causal. Memory: two
        ranks' keys, whatever R is; stick-breaking recomputes its parts in the backward.

    Example:
        out = ring_attention(q, k, v, group=group, layout=layout, is_causal=True)

    References:
        Liu et al., Ring Attention with Blockwise Transformers, 2023, arXiv:2310.01889.
    """
    name = "ring_attention"
    task = _checked(name, query, key, value, config, group, layout, is_causal, scale, enable_gqa,
                    key_lengths, logit_bias, impl, packed=False, recompute=recompute)  # fmt: skip
    return _run(task)[0]


def ring_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: Any = ExactConfig(),
    *,
    group: ContextGroup,
    layout: SequenceLayout,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    logit_bias: Tensor | None = None,
    recompute: bool = True,
    impl: Impl | str = "auto",
) -> Tensor:
    """The same for packed documents; `layout.cu_seqlens` says where they are.

    Args:
        query: (n, H, D), the tokens that `layout` gives this rank of the packed sequence.
        key: (n, H_kv, D).
        value: (n, H_kv, D_v).
        config, group, layout, is_causal, scale, enable_gqa, logit_bias, recompute, impl: as in
            `ring_attention`.

    Returns:
        (n, H, D_v), this rank's tokens.

    Cost:
        Keys travel as in `ring_attention`; one call for each document that begins in a chunk of
        this rank, and one for each chunk that a document reaches into.
    """
    name = "ring_attention_varlen"
    query, key, value = as_batch(query), as_batch(key), as_batch(value)
    task = _checked(name, query, key, value, config, group, layout, is_causal, scale,
                    enable_gqa, None, logit_bias, impl, packed=True,
                    recompute=recompute)  # fmt: skip
    return as_packed(_run(task)[0])


def ring_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: ExactConfig | WindowConfig = ExactConfig(),
    *,
    group: ContextGroup,
    layout: SequenceLayout,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    impl: Impl | str = "auto",
) -> AttentionOutput:
    """As `ring_attention` for exact and window attention, with the log-sum-exp of the scores.

    Returns:
        AttentionOutput: output (B, H, n, D_v), lse (B, H, n), both differentiable.
    """
    name = "ring_attention_with_lse"
    if isinstance(config, StickBreakingConfig):
        raise UnsupportedError(
            f"{name}: stick-breaking has no log-sum-exp. Use ring_attention_with_remainder."
        )
    task = _checked(name, query, key, value, config, group, layout, is_causal, scale, enable_gqa,
                    key_lengths, None, impl, packed=False)  # fmt: skip
    return AttentionOutput(*_run(task))


def ring_attention_with_remainder(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: StickBreakingConfig = StickBreakingConfig(),
    *,
    group: ContextGroup,
    layout: SequenceLayout,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    logit_bias: Tensor | None = None,
    recompute: bool = True,
    impl: Impl | str = "auto",
) -> StickBreakingOutput:
    """As `ring_attention` for stick-breaking, with the log of what is left of the stick.

    Returns:
        StickBreakingOutput: output (B, H, n, D_v), log_rest (B, H, n), both differentiable.
    """
    name = "ring_attention_with_remainder"
    if not isinstance(config, StickBreakingConfig):
        raise UnsupportedError(
            f"{name}: config is a {type(config).__name__}; only StickBreakingConfig has a "
            "remainder. Use ring_attention_with_lse."
        )
    task = _checked(name, query, key, value, config, group, layout, is_causal, scale, enable_gqa,
                    key_lengths, logit_bias, impl, packed=False, recompute=recompute)  # fmt: skip
    return StickBreakingOutput(*_run(task))


def _checked(
    name: str, query: Tensor, key: Tensor, value: Tensor, config: Any, group: ContextGroup,
    layout: SequenceLayout, is_causal: bool, scale: float | None, enable_gqa: bool,
    key_lengths: Tensor | None, logit_bias: Tensor | None, impl: Impl | str, *, packed: bool,
    recompute: bool = True,
) -> _Task:  # fmt: skip
    with verified(name, group) as shared:
        mechanism = mechanism_of_config(config)
        if not isinstance(config, (ExactConfig, WindowConfig, StickBreakingConfig)):
            raise UnsupportedError(
                f"{name}: {mechanism.name} attention has no ring form; allowed are exact, window "
                "and stick_breaking. Use ulysses_attention, which is exact for every mechanism."
            )
        if not packed and layout.cu_seqlens is not None:
            raise UnsupportedError(
                f"{name}: layout has cu_seqlens, but a (B, H, n, D) call has no documents. Use "
                "ring_attention_varlen, or a layout without them."
            )
        check_local(name, group, layout, {"query": query, "key": key, "value": value})
        call = validate(name, query, key, value, is_causal=is_causal, scale=scale,
                        enable_gqa=enable_gqa, key_lengths=key_lengths)  # fmt: skip
        bias = None
        if isinstance(config, StickBreakingConfig):
            bias = check_call(name, call, config, logit_bias)
        elif logit_bias is not None:
            raise UnsupportedError(
                f"{name}: logit_bias was given, but {mechanism.name} attention has none. Drop it."
            )
        chosen = choose_impl(name, impl, mechanism.implementations(call, config))
        if chosen is Impl.REFERENCE and isinstance(config, ExactConfig):
            raise UnsupportedError(
                f'{name}(impl="reference"): the parts of a ring come from torch\'s kernels. Use '
                "impl='auto', or ulysses_attention, which runs the reference."
            )
        tensors = {
            "query": call.query,
            "key": call.key,
            "value": call.value,
            "key_lengths": key_lengths,
            "logit_bias": logit_bias,
        }
        settings = {"is_causal": is_causal, "scale": call.scale, "config": config,
                    "layout": layout, "impl": str(impl), "recompute": recompute}  # fmt: skip
        shared.update(describe(tensors, settings))
    return _Task(name, call, config, group, layout, bias, chosen.value, recompute)


def _run(task: _Task) -> tuple[Tensor, Tensor]:
    config = task.config
    if isinstance(config, ExactConfig):
        return _exact(task, config)
    if isinstance(config, WindowConfig):
        return _window(task, config)
    return _stick_breaking(task, config)


def _exact(task: _Task, config: ExactConfig) -> tuple[Tensor, Tensor]:
    call = task.call
    if task.group.size == 1 and task.layout.cu_seqlens is None:
        return exact_attention_with_lse(
            call.query, call.key, call.value, is_causal=call.is_causal, scale=call.scale,
            enable_gqa=True, key_lengths=call.key_lengths, config=config,
        )  # fmt: skip
    backend = exact_backend(task.name, call, config)
    with torch.autocast(call.query.device.type, enabled=False):
        return exact_ring(call, task.group, task.layout, backend)


def exact_backend(name: str, call: Call, config: ExactConfig) -> str:
    """The kernel of the parts; one that returns lse. On Hopper cuDNN, if it takes the call."""
    query, cudnn = call.query, ExactConfig(backend="cudnn")
    is_hopper = query.is_cuda and capability(query.device.index or 0) == (9, 0)
    takes_it = exact_implementations(call, cudnn, needs_lse=True)[0].refusal is None
    if config.backend == "auto" and is_hopper and takes_it:
        config = cudnn
    report = exact_implementations(call, config, needs_lse=True)[0]
    if report.refusal is not None:
        raise UnsupportedError(f"{name}: {report.refusal}. Use ExactConfig(backend='auto').")
    return report.note.removeprefix("backend ")


def _window(task: _Task, config: WindowConfig) -> tuple[Tensor, Tensor]:
    call = task.call

    def one(
        query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, offset: int
    ) -> tuple[Tensor, Tensor]:
        return window_attention_with_lse(
            query, key, value, is_causal=call.is_causal, scale=call.scale, enable_gqa=True,
            query_offset=offset, key_lengths=lengths, config=config, impl=task.impl,
        )  # fmt: skip

    before = config.window - 1
    reach = Reach(config.num_sinks, before, 0 if call.is_causal else before)
    return neighbour_attention(call.query, call.key, call.value, call.key_lengths, reach,
                               task.group, task.layout, one)  # fmt: skip


def _stick_breaking(task: _Task, config: StickBreakingConfig) -> tuple[Tensor, Tensor]:
    call = task.call
    if config.window is None:
        inputs = ChainInputs(call.query, call.key, call.value, task.logit_bias, call.key_lengths)
        with torch.autocast(call.query.device.type, enabled=False):
            output, log_rest = stick_breaking_chain(
                inputs, config, task.group, task.layout, call.scale, task.impl, task.recompute
            )
        if config.remainder == "value":
            output = _give_to_own_value(task, output, log_rest)
        return output, log_rest

    def one(
        query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, offset: int
    ) -> tuple[Tensor, Tensor]:
        return stick_breaking_attention_with_remainder(
            query, key, value, scale=call.scale, enable_gqa=True, query_offset=offset,
            key_lengths=lengths, logit_bias=task.logit_bias, config=config, impl=task.impl,
        )  # fmt: skip

    reach = Reach(0, config.window, 0)
    return neighbour_attention(call.query, call.key, call.value, call.key_lengths, reach,
                               task.group, task.layout, one)  # fmt: skip


def _give_to_own_value(task: _Task, output: Tensor, log_rest: Tensor) -> Tensor:
    """What is left of the stick to the value at the query's own position, which is here."""
    call, parts, start = task.call, [], 0
    for span in task.layout.spans(task.group.rank):
        rows = slice(start, start + span.length)
        own = call._replace(
            query=call.query[:, :, rows],
            key=call.key[:, :, rows],
            value=call.value[:, :, rows],
            key_lengths=local_lengths(call.key_lengths, (span,)),
        )
        parts.append(give_to_own_value(output[:, :, rows], log_rest[:, :, rows], own))
        start = rows.stop
    return torch.cat(parts, 2) if parts else output
