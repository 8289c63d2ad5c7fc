"""The attention function registered with transformers: one for a whole model, routed per layer."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..errors import LongspanWarning, UnsupportedError
from ..exact.api import exact_attention
from ..exact.config import ExactConfig
from ..mechanisms import get_mechanism
from ..window.config import WindowConfig
from .cache_layer import holder_of
from .calls import Request, run_dense, run_masked, run_packed
from .compat import context_parallel_reason
from .infini_calls import run_infini
from .masks import Layout, layout_of_bounds, layout_of_documents, longspan_mask
from .report import Route
from .rotation import HANDED_OVER

__all__ = ["IMPLEMENTATION", "ROUTE", "longspan_attention", "register"]

IMPLEMENTATION = "longspan"  # transformers reads meaning into flash, sdpa, paged, "/" and "|"
ROUTE = "_longspan_route"  # attribute of a patched attention module

_CHANGES_MATHEMATICS = (
    "softcap", "s_aux", "sinks", "position_bias", "head_mask", "layer_head_mask", "score_mod",
    "block_mask",
)  # fmt: skip
_WARNED: set[str] = set()


def register() -> None:
    """Make `attn_implementation="longspan"` known to transformers; `patch` does it by itself.

    A model that uses the name without being patched runs exact attention. Calling it again
    changes nothing.

    Example:
        >>> register()
        >>> model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="longspan")
    """
    AttentionInterface.register(IMPLEMENTATION, longspan_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, longspan_mask)


def longspan_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, by the mechanism that the layer was patched with.

    Args:
        module: the attention module; patched ones carry a route.
        query: (B, H, N_q, D), rotated.
        key, value: (B, H_kv, N_k, D), not repeated, the cache included.
        attention_mask: what `longspan_mask` returned, or a 4-D mask that the user made.
        dropout, scaling, sliding_window, is_causal, **kwargs: as the model hands them over.

    Returns:
        ((B, N_q, H, D_v), None).

    Raises:
        UnsupportedError: something that would change the result cannot be honoured.
    """
    route: Route = getattr(module, ROUTE, _EXACT)
    _check(module, route, dropout, is_causal, kwargs)
    custom = attention_mask is not None and attention_mask.ndim == 4
    if route.rotation is not None and not custom:
        return _run_with_memory(
            Request(module, route, query, key, value, scaling),
            attention_mask,
            sliding_window,
            kwargs,
        )
    if sliding_window is not None and not custom:  # a 4-D mask holds the window already
        route = _within_window(route, sliding_window, key.shape[2])
    request = Request(module, route, query, key, value, scaling)
    holder = holder_of(key)
    if holder is not None and attention_mask is not None and not custom:
        attention_mask = holder.mask_of_keys(attention_mask)
    if attention_mask is not None and custom:
        output = _run_custom(request, attention_mask, dropout)
    elif attention_mask is not None:
        _refuse_dropout(route, dropout, "a padded batch")
        output = run_masked(request, attention_mask)
    else:
        layout = _documents(query, key, kwargs)
        if layout is None:
            output = run_dense(request, dropout)
        else:
            _refuse_dropout(route, dropout, "packed documents")
            output = run_packed(request, layout)
    if holder is not None:
        holder.trim(None if custom else attention_mask)
    return output.transpose(1, 2).contiguous(), None


def _run_custom(request: Request, attention_mask: Tensor, dropout: float) -> Tensor:
    route = request.route
    if not route.mechanism.is_exact:
        raise UnsupportedError(
            f"attention_mask: a 4-D mask reached {route.name}, which runs {route.mechanism.name!r}."
            " Patched layers take a 2-D padding mask (B, N), packed position_ids, or none. Pass "
            "one of these, or leave the layer unpatched."
        )
    n_q, n_k = request.query.shape[2], request.key.shape[2]
    route.count(((n_q, n_k),) * request.query.shape[0])
    return exact_attention(
        request.query, request.key, request.value, attention_mask, dropout, False,
        scale=request.scale, enable_gqa=True,
    )  # fmt: skip


def _run_with_memory(
    request: Request, mask: Tensor | None, sliding_window: int | None, kwargs: dict[str, Any]
) -> tuple[Tensor, None]:
    route = request.route
    if sliding_window is not None:
        raise UnsupportedError(
            f"sliding_window: {route.name} sees the last {sliding_window} keys of the model's own "
            f"window, which {route.mechanism.name!r} cannot keep to. Leave the layer unpatched "
            "(layers='all' does)."
        )
    layout = _documents(request.query, request.key, kwargs) if mask is None else None
    output = run_infini(request, kwargs.get(HANDED_OVER), mask, layout)
    return output.transpose(1, 2).contiguous(), None


def _documents(query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> Layout | None:
    """Packed documents, from cu_seq_lens or from position_ids; None if there are none."""
    batch, n_q, n_k = query.shape[0], query.shape[2], key.shape[2]
    cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if cu_q is not None and cu_k is not None:
        longest_q, longest_k = kwargs.get("max_length_q"), kwargs.get("max_length_k")
        longest_q = n_q if longest_q is None else int(longest_q)
        longest_k = n_k if longest_k is None else int(longest_k)
        return layout_of_bounds(cu_q, cu_k, longest_q, longest_k)
    position_ids = kwargs.get("position_ids")
    if n_q != n_k or n_q == 1 or position_ids is None or position_ids.ndim != 2:
        return None
    if position_ids.shape[1] != n_q:
        return None
    if torch.compiler.is_compiling():
        torch._assert_async(
            (position_ids.diff(dim=1) == 1).all(),
            "packed documents (position_ids that restart) inside torch.compile need "
            "cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k as well",
        )
        return None
    return layout_of_documents(position_ids, batch)


def _within_window(route: Route, sliding_window: int, n_k: int) -> Route:
    """The route for a layer that itself sees only the last `sliding_window` keys."""
    if sliding_window >= n_k:
        return route
    if route.mechanism.is_exact:
        window = WindowConfig(window=sliding_window, num_sinks=0)
        return replace(
            route, config=window, function=_WINDOW.function,
            function_varlen=_WINDOW.function_varlen, visited_fraction=_everything,
        )  # fmt: skip
    if isinstance(route.config, WindowConfig) and route.config.num_sinks == 0:
        return replace(route, config=replace(route.config, window=min(
            route.config.window, sliding_window)))  # fmt: skip
    raise UnsupportedError(
        f"sliding_window: {route.name} sees the last {sliding_window} of {n_k} keys, which "
        f"{route.mechanism.name!r} with {route.config} cannot keep to. Leave the layer unpatched "
        "(layers='all' does), or use WindowConfig(num_sinks=0)."
    )


def _check(
    module: nn.Module, route: Route, dropout: float, is_causal: bool | None, kwargs: dict[str, Any]
) -> None:
    refuse_changes(module, route.name, is_causal, kwargs)
    if not route.mechanism.is_exact:
        _refuse_dropout(route, dropout, f"{route.mechanism.name!r}")
    if torch.compiler.is_compiling():
        return
    reason = context_parallel_reason()
    if reason is not None:
        raise UnsupportedError(
            f"{route.name}: {reason} is active, so this process holds one shard of the sequence "
            "and would attend to that shard only. Leave context parallelism, or use "
            "longspan.distributed, which exchanges heads or keys explicitly."
        )
    if kwargs.get("output_attentions"):
        _warn_once(
            "output_attentions=True: attention weights are never formed, None is returned for "
            "them. Use attn_implementation='eager' to see weights."
        )


def refuse_changes(
    module: nn.Module, layer: str, is_causal: bool | None, kwargs: dict[str, Any]
) -> None:
    """Raise for what a model asks of an attention function and longspan's has not."""
    for name in _CHANGES_MATHEMATICS:
        if kwargs.get(name) is not None:
            raise UnsupportedError(
                f"{name}: {layer} was called with it, but longspan's attention has no such "
                "term, and without it the result would be wrong. Use this model with "
                "attn_implementation='eager' or 'sdpa' instead."
            )
    if kwargs.get("cache") is not None:
        raise UnsupportedError(
            f"cache: {layer} was called with a paged cache (continuous batching), which is "
            "not supported. Use generate() instead of generate_batch()."
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise UnsupportedError(
            f"is_causal: {layer} is not causal (an encoder or cross attention); only causal "
            "self-attention is supported. Use another attn_implementation for this module."
        )


def _refuse_dropout(route: Route, dropout: float, what: str) -> None:
    if dropout:
        raise UnsupportedError(
            f"dropout: {route.name} has attention dropout {dropout}, which {what} cannot honour; "
            "only 0.0 is supported. Set attention_dropout=0.0 in the model's config, or call "
            "model.eval()."
        )


def _warn_once(text: str) -> None:
    if text not in _WARNED:
        _WARNED.add(text)
        warnings.warn(text, LongspanWarning, stacklevel=2)


def _everything(*_: Any, **__: Any) -> float:
    return 1.0  # of the scores that the model's own sliding window lets see


_WINDOW = Route.to(get_mechanism("window"), WindowConfig(), layer=-1, name="window")
_EXACT = Route.to(
    get_mechanism("exact"), ExactConfig(), layer=-1, name="attention", reason="not patched"
)
