"""Run a transformers model with every sequence spread over ranks, and undo it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..distributed.group import ContextGroup
from ..distributed.layout import SequenceLayout
from ..distributed.spread import attend_across_ranks
from ..errors import UnsupportedError
from ..exact.config import ExactConfig
from ..infini.config import InfiniConfig
from ..window.config import WindowConfig
from .attention import ROUTE, refuse_changes
from .compat import get_implementation, set_implementation
from .layers import attention_layers
from .plan import LayerPlan, parse_config

__all__ = ["ACROSS_RANKS", "context_parallel"]

ACROSS_RANKS = "longspan_across_ranks"
_TASK = "_longspan_across_ranks"  # attribute of an attention module inside `context_parallel`


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """What one layer runs."""

    name: str
    scheme: str
    config: Any
    settings: dict[str, Any]


@contextmanager
def context_parallel(
    model: nn.Module,
    config: Any = ExactConfig(),
    layers: str | int | Iterable[int] | Mapping[Any, Any] = "all",
    *,
    group: ContextGroup,
    layout: SequenceLayout,
    scheme: str = "ring",
    key_lengths: Tensor | None = None,
    **settings: Any,
) -> Iterator[None]:
    """Context in which a transformers model takes this rank's tokens of each sequence.

    Args:
        model: a decoder-only transformers model that is not patched.
        config: settings of a mechanism, or a string, for the selected layers.
        layers: as in `patch`; the others run exact attention, or their own sliding window.
        group, layout: who shares the sequences, and how.
        scheme: "ring", "ulysses" or "clusters" (HyperAttention), for the selected layers; the
            others take the ring.
        key_lengths: (B,), int32: valid tokens of whole sequences, padding on the right.
        **settings: keyword arguments of every call of the mechanism, e.g. `seed=0`.

    Raises:
        PatchError: no attention layers that are known.
        ConfigError: unknown settings, selection or scheme.
        UnsupportedError: Infini-attention, whose memory must not hold rotated keys; inside, what
            cannot be honoured: an attention mask (say `key_lengths`), a cache, dropout.

    Semantics:
        Inside, call the model with `input_ids` and `position_ids` of `shard_batch` and with
        use_cache=False. Logits are those of this rank's tokens. All ranks make the same calls.

    Example:
        batch = shard_batch(input_ids, layout, group.rank)
        with context_parallel(model, group=group, layout=layout):
            logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids,
                           use_cache=False).logits
    """
    found = attention_layers(model)
    if any(hasattr(layer.module, ROUTE) for layer in found):
        raise UnsupportedError(
            "context_parallel: model is patched. Undo the patch and pass its config here."
        )
    config = parse_config(config) if isinstance(config, str) else config
    sliding = [layer.order for layer in found if layer.is_sliding]
    plan = LayerPlan.build(layers, config, len(found), sliding)
    _refuse_rotated_memory(plan)
    common: dict[str, Any] = {"group": group, "layout": layout}
    if key_lengths is not None:
        common["key_lengths"] = key_lengths
    configs = list({id(layer.module.config): layer.module.config for layer in found}.values())
    before = [(c, get_implementation(c)) for c in configs]
    AttentionInterface.register(ACROSS_RANKS, _attention)
    AttentionMaskInterface.register(ACROSS_RANKS, _no_mask)
    try:
        for layer in found:
            chosen = layer.order in plan.configs
            task = _Task(
                name=layer.name,
                scheme=scheme if chosen else "ring",
                config=plan.configs.get(layer.order, ExactConfig()),
                settings=common | (settings if chosen else {}),
            )
            object.__setattr__(layer.module, _TASK, task)
        for one in configs:
            set_implementation(one, ACROSS_RANKS)
        yield
    finally:
        for one, name in before:
            set_implementation(one, name)
        for layer in found:
            layer.module.__dict__.pop(_TASK, None)


def _refuse_rotated_memory(plan: LayerPlan) -> None:
    """Infini-attention must not store keys that the model has rotated, nor run without gates."""
    if any(isinstance(config, InfiniConfig) for config in plan.configs.values()):
        raise UnsupportedError(
            "context_parallel: config is an InfiniConfig, but here layers have no gates, and keys "
            "come rotated, which must not enter the memory. Use longspan.hf.convert_infini on one "
            "process, or spread_transformer with scheme='state_passing' for a "
            "longspan.models.Transformer."
        )


def _no_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """The mask of transformers: none; what would need one is refused."""
    if attention_mask is not None:
        raise UnsupportedError(
            f"attention_mask: a mask of shape {tuple(attention_mask.shape)} came to a model whose "
            "sequences are spread over ranks, where it cannot say what it means. Drop it, and "
            "pass key_lengths to context_parallel."
        )


def _attention(
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
    task: _Task = getattr(module, _TASK)
    refuse_changes(module, task.name, is_causal, kwargs)
    if attention_mask is not None or dropout != 0.0:
        what = "attention_mask" if attention_mask is not None else f"dropout of {dropout}"
        raise UnsupportedError(
            f"{task.name}: {what} came to a model whose sequences are spread over ranks, which "
            "has no such thing. Leave it out; key_lengths of context_parallel says padding."
        )
    config, scheme = task.config, task.scheme
    if sliding_window is not None:
        config, scheme = _within_window(task, sliding_window), "ring"
    output = attend_across_ranks(
        scheme, query, key, value, config, scale=scaling, **task.settings
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


def _within_window(task: _Task, sliding_window: int) -> WindowConfig:
    """Settings of a layer that itself sees only the last `sliding_window` keys."""
    if isinstance(task.config, ExactConfig):
        return WindowConfig(window=sliding_window, num_sinks=0)
    if isinstance(task.config, WindowConfig) and task.config.num_sinks == 0:
        return replace(task.config, window=min(task.config.window, sliding_window))
    raise UnsupportedError(
        f"sliding_window: {task.name} sees the last {sliding_window} keys, which {task.config} "
        "cannot keep to. Leave the layer alone (layers='all' does)."
    )
