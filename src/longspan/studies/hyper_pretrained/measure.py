"""Losses, and what an index catches of the attention mass, of a Llama-like model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError
from ...hf import patch
from ...hf.layers import attention_layers
from ...hyper import HyperConfig, hardness
from ...hyper.index.chunks import build_chunk_index, cluster_means
from ...mechanisms import mechanism_of_config

__all__ = ["document_rows", "layer_masses", "patched", "token_losses", "visited_share"]

_LOGITS_AT_ONCE = 512

#: Name -> (settings, whether the index sees keys before rotary embedding). Choices are by the mean
#: alone, which is what an index before rotary embedding has.
INDEXES: dict[str, tuple[HyperConfig, bool]] = {
    "LSH": (HyperConfig(index="lsh", center_keys=False, probe_spread=0), False),
    "LSH, centred": (HyperConfig(index="lsh", probe_spread=0), False),
    "pca": (HyperConfig(index="pca", probe_spread=0), False),
    "k-means": (HyperConfig(index="kmeans", probe_spread=0), False),
    "pca, before RoPE": (HyperConfig(index="pca", probe_spread=0), True),
    "k-means, before RoPE": (HyperConfig(index="kmeans", probe_spread=0), True),
}


def document_rows(tokenizer: Any, texts: Sequence[str], tokens: int) -> Tensor:
    """(documents, tokens): from one third into each text; texts that are too short are left out.

    Raises:
        ConfigError: no text is long enough.
    """
    rows = []
    for text in texts:
        part = text[len(text) // 3 :][: 8 * tokens]
        row = tokenizer(part, return_tensors="pt")["input_ids"][0, :tokens]
        if row.numel() == tokens:
            rows.append(row)
    if not rows:
        raise ConfigError(
            f"texts: {len(texts)} came, none with {tokens} tokens beyond its first third. Allowed: "
            "longer texts. Pass books, or a smaller --tokens."
        )
    return torch.stack(rows)


def patched(
    model: Any, config: Any, *, layers: str = "all", impl: str = "auto"
) -> contextlib.AbstractContextManager[Any]:
    """The model with `config` in some layers; exact attention leaves it as it is."""
    if mechanism_of_config(config).is_exact:
        return contextlib.nullcontext()
    return patch(model, config, layers=layers, impl=impl)


def visited_share(config: Any, length: int) -> float:
    """Share of the causal scores that a setting computes."""
    mechanism = mechanism_of_config(config)
    if mechanism.is_exact or mechanism.visited_fraction is None:
        return 1.0
    return float(mechanism.visited_fraction(config, length, length, is_causal=True))


@torch.no_grad()
def token_losses(model: Any, ids: Tensor, *, batch: int) -> Tensor:
    """(documents, tokens - 1), float32, nats."""
    rows = []
    for some in torch.split(ids, batch):
        hidden = model.model(input_ids=some, use_cache=False).last_hidden_state
        losses = [
            F.cross_entropy(
                model.lm_head(part).float().flatten(0, 1), goal.flatten(), reduction="none"
            ).view(len(some), -1)
            for part, goal in zip(
                torch.split(hidden[:, :-1], _LOGITS_AT_ONCE, 1),
                torch.split(some[:, 1:], _LOGITS_AT_ONCE, 1),
                strict=True,
            )
        ]
        rows.append(torch.cat(losses, 1))
    return torch.cat(rows)


@torch.no_grad()
def layer_masses(model: Any, ids: Tensor, layers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Mass that each index catches in some layers, on one document.

    Args:
        model: with torch's own attention.
        ids: (1, N).
        layers: their numbers among the layers with full attention; those that slide by themselves
            (Gemma 3) are not counted.

    Yields:
        Rows {"layer", "name", "captured_mass", "error", "heads"}.
    """
    calls = _capture(model, ids)
    for layer in layers:
        query, key, value, plain_key = calls[layer]
        for name, (config, is_unrotated) in INDEXES.items():
            index = None
            if is_unrotated:
                index = build_chunk_index(plain_key, value, config, None, 0)
                index = _with_means_of(index, key, config)
            stats = hardness(
                query, key, value, is_causal=True, enable_gqa=True, config=config, index=index
            )
            yield {
                "layer": layer,
                "name": name,
                "captured_mass": float(stats.captured_mass.mean()),
                "error": float(stats.error.mean()),
                "heads": {
                    "captured_mass": stats.captured_mass[0].tolist(),
                    "alpha": stats.alpha[0].tolist(),
                    "error": stats.error[0].tolist(),
                },
            }


def _capture(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each layer with full attention: query, key, value, and the key before rotation."""
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    plain: list[Tensor] = []
    handles = []
    original = F.scaled_dot_product_attention

    def listen(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **settings: Any) -> Tensor:
        heads = model.config.get_text_config().num_key_value_heads
        step = key.shape[1] // heads  # where transformers repeats keys for their groups
        rows = key[:, ::step]
        found.append((query, rows, value[:, ::step], _like(plain[-1], rows)))
        return original(query, key, value, *rest, **settings)

    layers = attention_layers(model)
    for layer in layers:
        last: Any = getattr(layer.module, "k_norm", None) or layer.module.k_proj
        handles.append(last.register_forward_hook(lambda module, args, out: plain.append(out)))
    F.scaled_dot_product_attention = listen
    try:
        model.model(input_ids=ids, use_cache=False)
    finally:
        F.scaled_dot_product_attention = original
        for handle in handles:
            handle.remove()
    return [call for call, layer in zip(found, layers, strict=True) if not layer.is_sliding]


def _like(plain: Tensor, key: Tensor) -> Tensor:
    """What the key projection (or the norm behind it) gave, as (B, H_kv, N, D)."""
    if plain.shape == key.shape:
        return plain
    batch, heads, length, dim = key.shape
    return plain.reshape(batch, length, heads, dim).transpose(1, 2)


def _with_means_of(index: Any, key: Tensor, config: HyperConfig) -> Any:
    """The clusters of `index` with the mean keys of other keys."""
    size, per_chunk = config.chunk_size, config.clusters_per_chunk
    batch, heads, length = index.labels.shape
    local = index.labels.reshape(-1, size).long()
    local = torch.where(local < 0, per_chunk, local % per_chunk)
    rows = key[:, :, :length].float().reshape(-1, size, key.shape[-1])
    means = cluster_means(rows, local, per_chunk)
    return index._replace(mean_key=means.reshape(batch, heads, -1, key.shape[-1]))
