"""Run the reference transformer with every sequence spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedError, nearest_name
from .group import ContextGroup
from .layout import SequenceLayout
from .ring import ring_attention, ring_attention_varlen
from .ulysses import ulysses_attention, ulysses_attention_varlen

__all__ = ["SCHEMES", "attend_across_ranks", "spread_transformer"]

SCHEMES = ("ring", "ulysses", "state_passing", "clusters")


def attend_across_ranks(
    scheme: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: Any,
    *,
    group: ContextGroup,
    layout: SequenceLayout,
    **settings: Any,
) -> Tensor:
    """Causal self-attention by a scheme, for packed or plain layouts, with one return type.

    Args:
        scheme: "ring", "ulysses", "state_passing" (Infini-attention) or "clusters"
            (HyperAttention).
        query, key, value: (B, H or H_kv, n, D); B is 1 for packed documents.
        config, group, layout, **settings: as in `ring_attention` and `ulysses_attention`.

    Returns:
        (B, H, n, D_v).

    Raises:
        ConfigError: unknown scheme. Else as the scheme's function.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"scheme is {scheme!r}. {nearest_name(str(scheme), SCHEMES)}")
    common: dict[str, Any] = {
        "group": group, "layout": layout, "is_causal": True, "enable_gqa": True, **settings
    }  # fmt: skip
    if scheme == "state_passing":
        from .state_passing import infini_attention_across_ranks

        passed: Tensor = infini_attention_across_ranks(
            query, key, value, config=config, **common
        ).output
        return passed
    if scheme == "clusters":
        from .clusters import hyper_attention_across_ranks

        return hyper_attention_across_ranks(query, key, value, config=config, **common).output
    if layout.cu_seqlens is None:
        dense: Any = ring_attention if scheme == "ring" else ulysses_attention
        result = dense(query, key, value, config, **common)
        return result if isinstance(result, Tensor) else result.output
    packed: Any = ring_attention_varlen if scheme == "ring" else ulysses_attention_varlen
    common.pop("key_lengths", None)

    def pack(item: Any) -> Any:
        tokens = isinstance(item, Tensor) and item.ndim >= 3
        return item.squeeze(0).transpose(0, 1) if tokens else item

    q, k, v = (pack(tensor) for tensor in (query, key, value))
    common = {name: pack(item) for name, item in common.items()}
    joined: Tensor = packed(q, k, v, config, **common).transpose(0, 1).unsqueeze(0)
    return joined


@contextmanager
def spread_transformer(
    model: nn.Module,
    *,
    group: ContextGroup,
    layout: SequenceLayout,
    scheme: str = "ring",
    key_lengths: Tensor | None = None,
) -> Iterator[None]:
    """Context in which `model(token_ids)` takes this rank's tokens and returns their logits.

    Args:
        model: a `longspan.models.Transformer`, also one that FSDP2 shards.
        group, layout: who shares the sequences, and how.
        scheme: "ring" (exact, window, stick-breaking), "ulysses" (every mechanism),
            "state_passing" (Infini-attention) or "clusters" (HyperAttention).
        key_lengths: (B,), valid tokens of whole sequences.

    Raises:
        ConfigError: unknown scheme.
        UnsupportedError: ALiBi, or a bias of keys, which the schemes do not carry.

    Semantics:
        Token ids are (B, n) also for packed documents (B = 1): the layout has their bounds. The
        backward must run inside the block, too, if gradient checkpointing is on. Parameters need
        their gradients summed over the ranks: see `global_mean`.

    Example:
        with spread_transformer(model, group=group, layout=layout):
            logits = model(batch.input_ids)
    """
    if scheme not in SCHEMES:
        raise ConfigError(
            f"spread_transformer: scheme is {scheme!r}. {nearest_name(str(scheme), SCHEMES)}"
        )
    settings: dict[str, Any] = {"group": group, "layout": layout}
    if key_lengths is not None:
        settings["key_lengths"] = key_lengths
    before = []
    rotation = model._rotation
    try:
        for block in model.blocks:  # type: ignore[union-attr]
            attention: Any = block.attention
            before.append((attention, attention.mechanism))
            attention.mechanism = _AcrossRanks(attention.mechanism, scheme, settings)
        model._rotation = lambda positions: rotation(  # type: ignore[operator,assignment]
            layout.position_ids(group.rank, positions.device)
        )
        yield
    finally:
        for attention, mechanism in before:
            attention.mechanism = mechanism
        if "_rotation" in model.__dict__:
            del model.__dict__["_rotation"]


class _AcrossRanks:
    """Stands in for the mechanism of a layer."""

    def __init__(self, inner: Any, scheme: str, settings: dict[str, Any]) -> None:
        if getattr(inner, "alibi", False):
            raise UnsupportedError(
                "spread_transformer: the model has ALiBi, whose bias the schemes do not carry. "
                "Use positions='rope' or 'none'."
            )
        own = {k: v for k, v in inner.settings.items() if k not in ("enable_gqa", "config")}
        self._settings = {**settings, **own, **inner.random}
        self._scheme, self._config = scheme, inner.config
        self.takes_plain = inner.takes_plain

    def whole(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_forget: Tensor | None = None,
        owned: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """(B, H, n, D): this rank's tokens."""
        if log_forget is not None:
            raise UnsupportedError(
                "spread_transformer: the model puts a bias on keys (a forgetting gate), which the "
                "schemes do not carry. Use a model without one."
            )
        settings = {**self._settings, **(owned or {})}
        return attend_across_ranks(self._scheme, query, key, value, self._config, **settings)

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError(
            f"spread_transformer: {name} is not there for sequences over ranks. Pass (B, n) token "
            "ids of this rank; packed documents belong into the layout."
        )
