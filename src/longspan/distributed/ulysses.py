"""Head exchange (DeepSpeed-Ulysses, arXiv:2309.14509): all tokens of some heads on each rank.

Heads are independent in every mechanism, so that this is exact for all of them: an all-to-all
brings each rank the whole sequence for its share of the heads, the mechanism's own function runs
on it, and an all-to-all brings the result back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError, UnsupportedError
from ..mechanisms import mechanism_of_config
from .checks import as_batch, as_packed, check_local, describe, verified
from .exchange import heads_to_sequence, sequence_to_heads
from .group import ContextGroup
from .layout import SequenceLayout

__all__ = ["ulysses_attention", "ulysses_attention_varlen"]

_WHOLE = ("key_lengths",)  # tensors that describe the whole sequence, equal on all ranks


def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: Any,
    *,
    group: ContextGroup,
    layout: SequenceLayout,
    is_causal: bool = False,
    **settings: Any,
) -> Any:
    """Any mechanism over a sequence that is spread over ranks, by exchanging heads.

    Args:
        query: (B, H, n, D), the tokens that `layout` gives this rank; H must be a multiple of the
            group's size.
        key: (B, H_kv, n, D); H_kv must be a multiple or a divisor of the group's size.
        value: (B, H_kv, n, D_v).
        config: settings of a mechanism; its type picks which.
        group: the ranks that share the sequence.
        layout: which rank holds which tokens; equal on all ranks.
        is_causal: as in the mechanism's function.
        **settings: the function's other keyword arguments, equal on all ranks. Tensors are cut by
            their shape: (H,) is one number per query head; (B, H, n, ...) and (B, H_kv, n, ...) are
            this rank's tokens, as query and key. `key_lengths` (B,) counts in the whole sequence.
            States (`initial_state`) hold this rank's heads, as returned.

    Returns:
        (B, H, n, D_v), this rank's tokens. Where the mechanism returns a NamedTuple, the same with
        this `output`; its state is that of this rank's key heads.

    Raises:
        ShapeError: the heads cannot be divided among the ranks, or a tensor is not this rank's.
        UnsupportedError: an argument that cannot be cut by heads, or torch's context-parallel
            manager is active.
        RankError: ranks differ in shapes, settings or layout (found before the first exchange), or
            one stopped.

    Semantics:
        Equals one process up to the order of sums inside matrix products; gradients, too. The
        gradient of a per-head parameter is that of this rank's heads and zero for the others; its
        sum over ranks is the whole.

    Cost:
        Per rank and call 2 H + 2 max(H_kv, size) heads of n tokens are moved, forward; the same
        again backward. Memory: the whole sequence for H / size heads.

    Example:
        out = ulysses_attention(q, k, v, InfiniConfig(), group=group, layout=layout, gate=gate)

    References:
        Jacobs et al., DeepSpeed Ulysses, 2023, arXiv:2309.14509.
    """
    function = mechanism_of_config(config).function
    return _run("ulysses_attention", function, query, key, value, config, group, layout,
                is_causal, settings, packed=False)  # fmt: skip


def ulysses_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: Any,
    *,
    group: ContextGroup,
    layout: SequenceLayout,
    is_causal: bool = False,
    **settings: Any,
) -> Tensor:
    """The same for packed documents; `layout.cu_seqlens` says where they are.

    Args:
        query: (n, H, D), the tokens that `layout` gives this rank of the packed sequence.
        key: (n, H_kv, D).
        value: (n, H_kv, D_v).
        config, group, layout, is_causal, **settings: as in `ulysses_attention`; tensors may be
            (H,), or (n, H, ...) and (n, H_kv, ...).

    Returns:
        (n, H, D_v), this rank's tokens.

    Raises:
        As `ulysses_attention`; also UnsupportedError for a mechanism without a packed form.
    """
    name = "ulysses_attention_varlen"
    mechanism = mechanism_of_config(config)
    if not mechanism.has_varlen:
        raise UnsupportedError(
            f"{name}: {mechanism.name} attention has no packed form. Run the documents one by one "
            "with ulysses_attention."
        )
    marks = layout.cu_seqlens or (0, layout.length)
    cu_seqlens = torch.tensor(marks, dtype=torch.int32, device=query.device)
    longest = max((document.length for document in layout.documents), default=0)

    def function(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Any:
        packed = {
            label: as_packed(t) if isinstance(t, Tensor) and t.ndim >= 3 else t
            for label, t in rest.items()
        }
        q, k, v = as_packed(q), as_packed(k), as_packed(v)
        result = mechanism.function_varlen(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, **packed
        )
        return as_batch(result)

    function.__signature__ = inspect.signature(mechanism.function_varlen)  # type: ignore[attr-defined]
    query, key, value = as_batch(query), as_batch(key), as_batch(value)
    settings = {
        label: as_batch(t) if isinstance(t, Tensor) and t.ndim >= 2 else t
        for label, t in settings.items()
    }
    return as_packed(
        _run(
            name,
            function,
            query,
            key,
            value,
            config,
            group,
            layout,
            is_causal,
            settings,
            packed=True,
        )
    )


def _run(
    name: str,
    function: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: Any,
    group: ContextGroup,
    layout: SequenceLayout,
    is_causal: bool,
    settings: dict[str, Any],
    *,
    packed: bool,
) -> Any:
    with verified(name, group) as call:
        inputs = {"query": query, "key": key, "value": value}
        check_local(name, group, layout, inputs)
        if not packed and layout.cu_seqlens is not None:
            raise UnsupportedError(
                f"{name}: layout has cu_seqlens, but a (B, H, n, D) call has no documents. Use "
                f"{name}_varlen, or a layout without them."
            )
        copies = _copies(name, query.shape[1], key.shape[1], group.size)
        tensors = {label: t for label, t in settings.items() if isinstance(t, Tensor)}
        plans = {label: _plan(name, label, tensor, query, key) for label, tensor in tensors.items()}
        shared = mechanism_of_config(config).shares_draws
        extra = _extra(name, function, group, key.shape[1], shared)
        plain = {
            label: value
            for label, value in settings.items()
            if not isinstance(value, Tensor) and not label.endswith("state")
        }
        plain |= {"config": config, "is_causal": is_causal, "layout": layout}
        call.update(describe(inputs | tensors, plain))

    def to_heads(tensor: Tensor, times: int) -> Tensor:
        return sequence_to_heads(tensor, group, layout, copies=times)

    own = {**settings, **extra, "config": config, "is_causal": is_causal}
    for label, tensor in tensors.items():
        if plans[label] == "heads":
            own[label] = tensor.tensor_split(group.size)[group.rank]
        elif plans[label] != "whole":
            own[label] = to_heads(tensor, copies if plans[label] == "key" else 1)
    result = function(to_heads(query, 1), to_heads(key, copies), to_heads(value, copies), **own)
    if isinstance(result, Tensor):
        return heads_to_sequence(result, group, layout)
    return result._replace(output=heads_to_sequence(result.output, group, layout))


def _copies(name: str, heads: int, kv_heads: int, size: int) -> int:
    """To how many ranks each key head goes."""
    if heads % size:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ShapeError(
            f"{name}: query has {heads} heads for {size} ranks; the heads must be a multiple of "
            f"the ranks. Use a group of {divisors} ranks, or ring_attention, which leaves heads "
            "together."
        )
    if kv_heads and kv_heads % size and size % kv_heads:
        raise ShapeError(
            f"{name}: key has {kv_heads} heads for {size} ranks; they must be a multiple or a "
            "divisor of the ranks. Repeat key and value heads, or use ring_attention."
        )
    return max(size // max(kv_heads, 1), 1)


def _plan(name: str, label: str, tensor: Tensor, query: Tensor, key: Tensor) -> str:
    """How an argument is cut: "whole", "heads", "query" or "key"."""
    if label in _WHOLE:
        return "whole"
    if tuple(tensor.shape) == (query.shape[1],):
        return "heads"
    for like, kind in ((query, "query"), (key, "key")):
        if tensor.ndim >= 3 and tensor.shape[:3] == like.shape[:3]:
            return kind
    heads, kv_heads, count = query.shape[1], key.shape[1], query.shape[2]
    raise UnsupportedError(
        f"{name}: {label} has shape {tuple(tensor.shape)}, which cannot be cut by heads. Allowed: "
        f"({heads},), one number per query head, or this rank's tokens (B, {heads}, {count}, ...) "
        f"or (B, {kv_heads}, {count}, ...). Leave it out, or pass a seed instead of random tensors."
    )


def _extra(
    name: str,
    function: Callable[..., Any],
    group: ContextGroup,
    kv_heads: int,
    shares_draws: bool = False,
) -> dict[str, Any]:
    """What a mechanism that draws random numbers per key head needs to draw those of its heads."""
    parameters = inspect.signature(function).parameters
    if "head_offset" in parameters:
        return {"head_offset": group.rank * kv_heads // group.size}
    if "seed" in parameters and group.size > 1 and not shares_draws:
        raise UnsupportedError(
            f"{name}: {function.__name__} draws random numbers but takes no head_offset, so that "
            "a rank would draw those of other heads and differ from one process. Use one rank."
        )
    return {}
