"""Settings of the reference transformer, checked when built, kept as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, nearest_name
from ..exact.config import ExactConfig
from ..mechanisms import get_mechanism, mechanism_of_config
from .rope_scaling import RopeScaling

__all__ = ["POSITIONS", "TransformerConfig"]

POSITIONS = ("rope", "none", "alibi", "forget")
_BIASED = ("alibi", "forget")
_FORMAT = "longspan-transformer-1"


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """A decoder-only transformer: sizes, positions, and the attention of each layer.

    vocab_size: tokens 0 .. vocab_size - 1.
    width: of the residual stream.
    layers, heads: how many.
    kv_heads: heads of key and value; default heads. Must divide heads.
    head_dim: default width / heads. Even for "rope".
    mlp_width: inner width of SwiGLU; default 8/3 width, rounded up to a multiple of 64.
    positions: "rope" turns queries and keys (base `rope_base`), "none" leaves order to causality
        and to the mechanism (stick-breaking needs no more), "alibi" adds -slope * distance to the
        scores, "forget" the logs of learned forget gates between key and query (FoX); both go
        with exact attention only.
    rope_scaling: for texts longer than those of training, or None.
    attention: config of a mechanism for all layers, or a tuple with one for each.
    attention_seed: for mechanisms with random inputs; layer l uses attention_seed + l.
    qk_norm: RMSNorm of queries and keys, per head, before positions.
    tie_embeddings: the output projection is the embedding.
    norm_eps: inside RMSNorm.

    Raises:
        ConfigError: a setting is invalid, or does not go with another one.
    """

    vocab_size: int
    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    positions: str = "rope"
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    attention: Any = field(default_factory=ExactConfig)
    attention_seed: int = 0
    qk_norm: bool = False
    tie_embeddings: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_width"):
            value = getattr(self, name)
            optional = name in ("kv_heads", "head_dim", "mlp_width")
            if (value is None and not optional) or (value is not None and not _is_count(value)):
                raise ConfigError(
                    f"TransformerConfig: {name} is {value!r}; it must be an int of at least 1"
                    f"{' or None' if optional else ''}."
                )
        if self.positions not in POSITIONS:
            raise ConfigError(
                f"TransformerConfig: positions is {self.positions!r}. "
                f"{nearest_name(str(self.positions), POSITIONS)}"
            )
        if self.heads % self.num_kv_heads:
            raise ConfigError(
                f"TransformerConfig: heads is {self.heads} and kv_heads {self.kv_heads}; kv_heads "
                "must divide heads. Change one of them."
            )
        if self.head_dim is None and self.width % self.heads:
            raise ConfigError(
                f"TransformerConfig: width is {self.width} and heads {self.heads}; heads must "
                "divide width unless head_dim is given. Give head_dim."
            )
        if self.positions == "rope" and self.head_size % 2:
            raise ConfigError(
                f"TransformerConfig: head_dim is {self.head_size}; RoPE turns pairs, so it must be "
                f"even. Nearest valid: {self.head_size + 1}."
            )
        if self.rope_scaling is not None and self.positions != "rope":
            raise ConfigError(
                f"TransformerConfig: rope_scaling is {self.rope_scaling!r} but positions is "
                f"{self.positions!r}; only 'rope' has frequencies to scale. Leave it at None."
            )
        if isinstance(self.attention, tuple) and len(self.attention) != self.layers:
            raise ConfigError(
                f"TransformerConfig: attention has {len(self.attention)} configs for {self.layers} "
                "layers; it must be one config, or a tuple with one per layer."
            )
        for layer in range(self.layers):
            mechanism = mechanism_of_config(self.attention_of(layer))
            if self.positions in _BIASED and not mechanism.name == "exact":
                raise ConfigError(
                    f"TransformerConfig: positions is {self.positions!r} but layer {layer} has "
                    f"{mechanism.name} attention, which takes no bias on scores. Only exact "
                    "attention does; use positions='rope' or 'none'."
                )

    @property
    def num_kv_heads(self) -> int:
        """Heads of key and value."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def mlp_size(self) -> int:
        """Inner width of SwiGLU."""
        return self.mlp_width or -(-8 * self.width // (3 * 64)) * 64

    def attention_of(self, layer: int) -> Any:
        """The attention config of a layer."""
        return self.attention[layer] if isinstance(self.attention, tuple) else self.attention

    def to_json(self) -> str:
        """All settings; `from_json` reads them back."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        attention = self.attention
        settings["attention"] = (
            [_spell(config) for config in attention]
            if isinstance(attention, tuple)
            else _spell(attention)
        )
        if self.rope_scaling is None:
            del settings["rope_scaling"]  # as models saved before it existed
        else:
            settings["rope_scaling"] = dataclasses.asdict(self.rope_scaling)
        return json.dumps({"format": _FORMAT, **settings}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> TransformerConfig:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: no such JSON, or a setting this version does not know.
        """
        try:
            settings = json.loads(text)
            found = settings.pop("format", None)
            if found != _FORMAT:
                raise ConfigError(
                    f"TransformerConfig: the JSON has format {found!r}; allowed is {_FORMAT!r}. "
                    "Give a config.json that Transformer.save wrote."
                )
            attention = settings["attention"]
            settings["attention"] = (
                tuple(map(_read, attention)) if isinstance(attention, list) else _read(attention)
            )
            if settings.get("rope_scaling") is not None:
                settings["rope_scaling"] = RopeScaling(**settings["rope_scaling"])
            return cls(**settings)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"TransformerConfig: the JSON cannot be read ({error}). Allowed: a config.json "
                "that Transformer.save of this version wrote. Save the model again."
            ) from error


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _spell(config: Any) -> dict[str, Any]:
    return {"mechanism": mechanism_of_config(config).name, **dataclasses.asdict(config)}


def _read(settings: dict[str, Any]) -> Any:
    settings = dict(settings)
    return get_mechanism(settings.pop("mechanism")).config_class(**settings)
