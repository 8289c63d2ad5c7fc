"""How far back each head reads: the distance at which its stick, or its softmax mass, is spent.

The model runs once, unchanged, under a mode that looks at every attention call and measures its
queries and keys. A stick-breaking head has spent its stick after d keys if the rest is below a
threshold; a softmax head, for comparison, if the mass beyond its d nearest keys is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError
from ..stick_breaking.impl.common import Settings
from ..stick_breaking.stats import SPAN_THRESHOLDS, effective_spans

__all__ = ["span_profile"]

_BLOCK_ELEMENTS = 1 << 22  # softmax weights at a time
_QUANTILES = (0.1, 0.5, 0.9)


def span_profile(
    model: Callable[..., Any],
    tokens: Tensor,
    *,
    thresholds: Sequence[float] = SPAN_THRESHOLDS,
    first_query: int | None = None,
) -> list[dict[str, Any]]:
    """Spans of every head of every layer over one text.

    Args:
        model: a module that is called with `tokens`: a transformers model (as it is, with
            attn_implementation="sdpa", or patched), or one built from `longspan.nn`.
        tokens: what the model takes: (B, N) token ids, or (B, N, width) vectors.
        thresholds: shares of the stick or of the mass, each in (0, 1).
        first_query: measure queries from this one on. Default: the middle of each sequence, so
            that every measured query has at least half of the text to read.

    Returns:
        One row per attention call (in the order of the layers), head and threshold: `layer`,
        `head`, `mechanism` ("stick_breaking" or "softmax"), `threshold`, quantiles `p10`, `p50`,
        `p90` and `mean` of the span in keys, `unspent` (share of queries whose rest never falls
        below; their span is all the keys they see), `num_queries`, `visible` (mean number of
        keys a query sees).

    Raises:
        ConfigError: a threshold outside (0, 1), `first_query` outside the text, or the model made
            no attention call that can be measured.

    Semantics:
        A softmax head counts its own token as the nearest key, a stick-breaking head the token
        before it (its own with `attend_current`). Calls by `impl="reference"` are not seen.

    Example:
        >>> layer = longspan.nn.StickBreakingAttention(16, 2)
        >>> rows = span_profile(layer, torch.randn(1, 64, 16), thresholds=(0.5,))
        >>> [(row["layer"], row["head"], row["threshold"]) for row in rows]
        [(0, 0, 0.5), (0, 1, 0.5)]
    """
    for threshold in thresholds:
        if not 0 < threshold < 1:
            raise ConfigError(
                f"span_profile: thresholds holds {threshold!r}; every one must lie strictly "
                "between 0 and 1: a share of the stick."
            )
    length = tokens.shape[1]
    if first_query is not None and not 0 <= first_query < length:
        raise ConfigError(
            f"span_profile: first_query is {first_query}; the text has {length} tokens. Allowed: "
            f"0 to {length - 1}."
        )
    recorder = _Recorder(tuple(thresholds), first_query)
    takes = inspect.signature(getattr(model, "forward", model)).parameters
    settings = {"use_cache": False} if "use_cache" in takes else {}
    with torch.no_grad(), recorder:
        model(tokens, **settings)
    if not recorder.calls:
        raise ConfigError(
            "span_profile: the model made no attention call that can be measured. Load a softmax "
            'model with attn_implementation="sdpa"; patch others with longspan.hf.patch.'
        )
    return [
        row
        for layer, call in enumerate(recorder.calls)
        for row in _rows(layer, call, tuple(thresholds))
    ]


class _Spans(NamedTuple):
    mechanism: str
    spans: Tensor  # (thresholds, B, H, queries) int32
    is_spent: Tensor  # (thresholds, B, H, queries) bool
    visible: float


class _Recorder(TorchFunctionMode):
    """Measures attention calls on their way; what they compute is not changed."""

    def __init__(self, thresholds: tuple[float, ...], first_query: int | None) -> None:
        super().__init__()
        self.thresholds, self.first_query = thresholds, first_query
        self.calls: list[_Spans] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            with torch.autocast(args[0].device.type, enabled=False):
                self.calls.append(self._softmax(*args, **kwargs))
        elif func is torch.ops.longspan.stick_breaking_fwd.default:
            query, key, value, *fields = args
            with torch.autocast(query.device.type, enabled=False):  # spans in float32
                self.calls.append(self._stick(query, key, value, Settings(*fields[:-2])))
        return func(*args, **kwargs)

    def _first(self, n_q: int) -> int:
        return n_q // 2 if self.first_query is None else min(self.first_query, n_q - 1)

    def _stick(self, query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> _Spans:
        if settings.cu_seqlens_q is not None:
            raise ConfigError(
                "span_profile: the model packs sequences. Give it one text without padding."
            )
        first = self._first(query.shape[2])
        settings = settings._replace(query_offset=settings.query_offset + first)
        query = query[:, :, first:]
        spans, is_spent = effective_spans(query, key, value, settings, self.thresholds)
        limit = torch.arange(query.shape[2]) + settings.query_offset + settings.attend_current
        visible = limit.clamp(0, key.shape[2])
        if settings.window is not None:
            visible = visible.clamp(max=settings.window)
        return _Spans("stick_breaking", spans, is_spent, float(visible.double().mean()))

    def _softmax(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> _Spans:
        """Weights block by block; nothing but integers is kept."""
        del value, dropout_p, enable_gqa
        n_q, n_k = query.shape[-2], key.shape[-2]
        first = self._first(n_q)
        groups = query.shape[1] // key.shape[1]
        key = key.float().repeat_interleave(groups, 1)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        step = max(_BLOCK_ELEMENTS // (query.shape[0] * query.shape[1] * n_k), 1)
        parts, visible = [], 0.0
        for start in range(first, n_q, step):
            rows = torch.arange(start, min(start + step, n_q), device=query.device)
            scores = scale * query[:, :, rows].float() @ key.mT
            if is_causal:
                hidden = torch.arange(n_k, device=rows.device) > rows.unsqueeze(-1)
                scores = scores.masked_fill(hidden, float("-inf"))
            if attn_mask is not None:
                mask = attn_mask.expand(*attn_mask.shape[:-2], n_q, n_k)[..., rows, :]
                if mask.dtype is torch.bool:
                    scores = scores.masked_fill(~mask, float("-inf"))
                else:
                    scores = scores + mask
            seen = scores > -1e30  # additive masks use the lowest number of their dtype
            visible += float(seen.sum()) / (seen.shape[0] * seen.shape[1])
            parts.append(_mass_spans(torch.softmax(scores, -1), seen, self.thresholds))
        spans = torch.cat([s for s, _ in parts], -1)
        is_spent = torch.cat([s for _, s in parts], -1)
        return _Spans("softmax", spans, is_spent, visible / max(n_q - first, 1))


def _mass_spans(
    weights: Tensor, seen: Tensor, thresholds: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Number of nearest visible keys that leave less mass than each threshold beyond them."""
    beyond = weights.double().cumsum(-1) - weights  # mass of the keys farther than each
    spans, is_spent = [], []
    for threshold in thresholds:
        enough = ((beyond >= threshold) & seen).sum(-1, dtype=torch.int32)
        spans.append(enough + 1)
        is_spent.append(torch.ones_like(enough, dtype=torch.bool))
    return torch.stack(spans), torch.stack(is_spent)


def _rows(layer: int, call: _Spans, thresholds: tuple[float, ...]) -> list[dict[str, Any]]:
    rows = []
    for head in range(call.spans.shape[2]):
        for index, threshold in enumerate(thresholds):
            spans = call.spans[index, :, head].flatten().double()
            low, middle, high = torch.quantile(spans, spans.new_tensor(_QUANTILES)).tolist()
            rows.append(
                {
                    "kind": "spans",
                    "layer": layer,
                    "head": head,
                    "mechanism": call.mechanism,
                    "threshold": threshold,
                    "p10": low,
                    "p50": middle,
                    "p90": high,
                    "mean": float(spans.mean()),
                    "unspent": 1.0 - float(call.is_spent[index, :, head].double().mean()),
                    "num_queries": spans.numel(),
                    "visible": call.visible,
                }
            )
    return rows
