"""Which share of the scores the layers of a model visit, patched or by themselves."""

from __future__ import annotations

from typing import Any

from ..errors import PatchError

__all__ = ["count_full_layers", "own_shares", "patched_shares", "sliding_share"]


def sliding_share(length: int, window: int) -> float:
    """Share of the causal scores of `length` tokens inside a window that counts the query."""
    width = min(window, length)
    visited = width * (width + 1) // 2 + (length - width) * width
    return visited / (length * (length + 1) // 2)


def own_shares(model: Any, length: int) -> dict[int, float]:
    """Layer index -> share of the causal scores that the unpatched layer computes.

    1 for full attention, less for layers that slide by themselves (Gemma 3, Mistral). Empty for a
    model whose layers are not known.
    """
    from ..hf.layers import attention_layers

    try:
        layers = attention_layers(model)
    except PatchError:
        return {}
    config = model.config.get_text_config()
    shares = {}
    for layer in layers:
        window = getattr(layer.module, "sliding_window", None)
        window = int(window or getattr(config, "sliding_window", None) or 0)
        slides = layer.is_sliding and window > 0
        shares[layer.order] = sliding_share(length, window) if slides else 1.0
    return shares


def patched_shares(report: Any) -> dict[int, float]:
    """Layer index -> share that the calls of the patched layer visited; empty without a patch."""
    if report is None:
        return {}
    return {
        layer.layer: layer.visited_fraction
        for layer in report.layers
        if layer.reason is None and layer.visited_fraction is not None
    }


def count_full_layers(model: Any) -> int:
    """Number of layers that see everything, which are those that `layers="all"` patches."""
    from ..hf.layers import attention_layers

    return sum(not layer.is_sliding for layer in attention_layers(model))
