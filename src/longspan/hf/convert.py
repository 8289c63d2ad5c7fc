"""Turn a pretrained model into one with Infini-attention: gates, plain keys, bounded streams."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import ConfigError, nearest_name
from ..infini.api import initial_gate
from ..infini.config import InfiniConfig
from ..types import Impl
from .parameters import PREFIX
from .patching import Patch, make_patch

__all__ = ["convert_infini"]

_TRAINED = ("everything", "gates")


def convert_infini(
    model: nn.Module,
    segment_length: int = 2048,
    *,
    layers: str | int | Iterable[int] = "all",
    update: str = "linear",
    local: str = "segment",
    first_segment: str = "local",
    feature_map: str = "elu",
    gate_start: str | float = "spread",
    train: str = "everything",
    impl: Impl | str = "auto",
) -> Patch:
    """Give a transformers model Infini-attention (arXiv:2404.07143), ready to be trained on.

    Each converted layer attends inside segments as before, and reads a memory of all segments
    before; a new parameter per query head, `longspan_gate`, says how much. A prompt of at most
    one segment gives what it gave before; longer ones are meaningless until the model is trained.

    Args:
        model: a decoder-only transformers model with rotary positions, also wrapped by peft.
        segment_length: tokens of a segment; at most what the model was trained on.
        layers: as in `patch`. "all": every full-attention layer; sliding-window layers stay.
        update, local, first_segment, feature_map: as in `InfiniConfig`. "gated_delta" runs with
            constant write strength 1 and no decay here.
        gate_start: what gates start from: "spread" (-3 to 3 over the heads of a layer), "zero",
            or a number, e.g. -10.0 for heads that are all but local.
        train: "everything", or "gates": the model's own weights are frozen until `undo`.
        impl: as in `infini_attention`.

    Returns:
        Patch: report, context manager, `undo()`. Without a `with` the model stays converted.

    Raises:
        ConfigError: a setting is out of range.
        PatchError: no layers, patched already, learned position vectors, or a rotary embedding
            that cannot be taken back (checked by running five tokens).

    Semantics:
        The memory gets queries and keys without positions: the model's own rotary function is run
        with -sin, and the square of its attention scaling divided out. From the second segment
        on, the local part is rotated by the place in the segment, so that angles never grow with
        the length of a stream (with local="sliding", and where no rotary module is found, the
        model's own positions run on). Padded rows begin their segments at their first real token.
        Generation needs `past_key_values=make_cache(model)`, whose layers hold an `InfiniState`.

    Training:
        `longspan.nn.gate_parameter_groups(model, lr=..., gate_lr=...)` puts gates into an
        optimizer group of their own, without decay; `longspan.nn.gate_statistics(model)` says
        where they stand. Train on inputs of many segments: gradients flow through the memory.
        `save_adapter` writes gates and settings, `save_pretrained` the weights.

    Example:
        >>> with convert_infini(model, segment_length=16, train="gates"):
        ...     names = [n for n, p in model.named_parameters() if p.requires_grad]
        >>> names[0]
        'model.layers.0.self_attn.longspan_gate'
    """
    if train not in _TRAINED:
        raise ConfigError(f"train: {train!r} came. {nearest_name(str(train), _TRAINED)}")
    config = InfiniConfig(
        segment_length=segment_length, update=update, local=local, first_segment=first_segment,
        feature_map=feature_map,
    )  # fmt: skip
    initial_gate(1, gate_start)
    settings: dict[str, Any] = {} if str(impl) == "auto" else {"impl": str(impl)}
    applied = make_patch(model, config, layers, verify=True, settings=settings)
    for name, parameter in model.named_parameters():
        if name.endswith(f"{PREFIX}gate"):
            start = initial_gate(parameter.shape[0], gate_start)
            parameter.data.copy_(start)
    if train == "gates":
        applied.freeze()
    return applied
