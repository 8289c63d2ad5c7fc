"""The compared models: one transformer, other memories, and the controls."""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...exact.config import ExactConfig
from ...infini.config import InfiniConfig
from ...models.layers import Attention, Block
from ...models.transformer import Transformer, TransformerState
from ...models.transformer_config import TransformerConfig

__all__ = ["VARIANTS", "Variant", "build_model", "gate_shares", "hidden_after", "set_segments"]

_SHUT = -1000.0  # its sigmoid is 0: the memory is never read
_OPEN = 1000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """name: of the variant. label: in the report. update: rule of the memory; None for full
    attention. local: gates are held shut. detached: no gradient through the memory. prefilled:
    training sequences begin behind a memory of filler (not the paper's protocol).
    """

    name: str
    label: str
    update: str | None = "linear"
    local: bool = False
    detached: bool = False
    prefilled: bool = False


_TABLE = (
    Variant(name="linear", label="Infini, linear"),
    Variant(name="local", label="gates held local", local=True),
    Variant(name="full", label="full attention", update=None),
    Variant(name="prefilled", label="Infini, linear, trained behind filled memories",
            prefilled=True),
    Variant(name="delta", label="Infini, delta", update="delta"),
    Variant(name="detached", label="Infini, linear, memory detached", detached=True),
    Variant(name="delta-corrected", label="Infini, corrected delta", update="delta_corrected"),
)  # fmt: skip

#: In the order in which they are trained: what says most comes first.
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _TABLE}


def build_model(
    variant: Variant, sizes: dict[str, int], *, vocab_size: int, segment: int, seed: int
) -> Transformer:
    """A model with random weights; the same for all variants of a seed, gates apart.

    Matrices are drawn with standard deviation 1 / sqrt(inputs), embeddings with 1 / sqrt(width):
    at a width of 128 the transformer's own 0.02 starts attention flat and learning late.
    """
    attention: Any = ExactConfig()
    if variant.update is not None:
        attention = InfiniConfig(segment_length=segment, update=variant.update)
    shape: dict[str, Any] = {**sizes}
    config = TransformerConfig(vocab_size=vocab_size, attention=attention, **shape)
    model = Transformer(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and not name.startswith("head"):
                writes = name.endswith(("attention.out.weight", "mlp.down.weight"))
                std = weight.shape[1] ** -0.5 / ((2 * config.layers) ** 0.5 if writes else 1.0)
                weight.normal_(0.0, std, generator=generator)
            elif name.endswith("longspan_gate") and variant.local:
                weight.fill_(_SHUT).requires_grad_(False)
    if variant.detached:
        for block in model.blocks:
            attention_layer = cast(Block, block).attention
            attention_layer.forward = types.MethodType(_detached, attention_layer)  # type: ignore[method-assign]
    return model


def set_segments(model: Transformer, segment: int) -> None:
    """Change the segment length of all layers; no weight depends on it."""
    for block in cast(list[Block], model.blocks):
        mechanism = block.attention.mechanism
        if isinstance(mechanism.config, InfiniConfig):
            mechanism.config = dataclasses.replace(mechanism.config, segment_length=segment)
            mechanism.settings["config"] = mechanism.config
    if isinstance(model.config.attention, InfiniConfig):
        attention = dataclasses.replace(model.config.attention, segment_length=segment)
        model.config = dataclasses.replace(model.config, attention=attention)


def hidden_after(
    model: Transformer, ids: Tensor, state: TransformerState | None
) -> tuple[Tensor, TransformerState]:
    """`Transformer.hidden` of the next tokens of a stream, and the state after them."""
    seen = state.seen if state else 0
    positions = torch.arange(seen, seen + ids.shape[1], device=ids.device)
    rotation = model._rotation(_local(model, positions))
    x = model.embedding(ids)
    layers = []
    before = state.layers if state else [None] * len(model.blocks)
    for block, layer in zip(cast(list[Block], model.blocks), before, strict=True):
        x, after = block.stream(x, rotation, layer)
        layers.append(after)
    return model.norm(x), TransformerState(layers=tuple(layers), seen=seen + ids.shape[1])


def gate_shares(model: Transformer) -> list[list[float]]:
    """sigmoid(gate) by layer and head; empty for full attention."""
    return [
        torch.sigmoid(gate.detach().double()).tolist()
        for name, gate in model.named_parameters()
        if name.endswith("longspan_gate")
    ]


def _local(model: Transformer, positions: Tensor) -> Tensor:
    """Positions that start anew in each segment: differences inside stay, angles stay small."""
    attention = model.config.attention
    if isinstance(attention, InfiniConfig):
        return positions % attention.segment_length
    return positions


def _detached(self: Attention, x: Tensor, rotation: Any, documents: Any) -> Tensor:
    """Attention.forward whose reads of the memory give keys and values no gradient.

    Two calls, one that is all local and one that is all memory, are mixed by the gate; rows of
    the first segment have no memory, and both are the local part there.
    """
    (q, k, v), plain = self._heads(x, rotation)
    segment = self.mechanism.config.segment_length
    gate = self.longspan_gate
    assert isinstance(gate, nn.Parameter)
    local = self.mechanism.whole(q, k, v, None, {**plain, "gate": torch.full_like(gate, _SHUT)})
    memory = self.mechanism.whole(
        q, k.detach(), v.detach(), None,
        {"memory_query": plain["memory_query"], "memory_key": plain["memory_key"].detach(),
         "gate": torch.full_like(gate, _OPEN)},
    )  # fmt: skip
    share = torch.sigmoid(gate)[:, None, None].to(local.dtype)
    has_memory = torch.arange(x.shape[1], device=x.device)[:, None] >= segment
    mixed = torch.where(has_memory, share * memory + (1 - share) * local, local)
    return self._join(mixed)
