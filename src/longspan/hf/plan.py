"""Which layer runs what: settings from strings, layer selections, and the plan that holds both.

The one place besides the command line where strings become settings. Imports no transformers.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, nearest_name
from ..mechanisms import get_mechanism, mechanism_of_config

__all__ = ["LayerPlan", "format_config", "parse_config", "select_layers"]

_FORMAT = "longspan-plan-1"
_SELECTIONS = "'all', 'global', 'every', 'first:N', 'last:N', '0,3,5', an int or a list of ints"


def parse_config(text: str) -> Any:
    """Settings of a mechanism from a string such as "window:window=512,num_sinks=4".

    Args:
        text: `mechanism` or `mechanism:setting=value,setting=value`. Values are read as JSON
            (numbers, true, false, null, quoted strings); anything else is taken as a string.

    Returns:
        The config object; settings that are not named keep their defaults.

    Raises:
        ConfigError: unknown mechanism or setting (the message suggests the nearest name), a
            setting given twice, or a value that the config refuses.

    Example:
        >>> parse_config("window:window=512")
        WindowConfig(window=512, num_sinks=4)
    """
    name, _, rest = text.strip().partition(":")
    mechanism = get_mechanism(name.strip())
    settings: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, separator, value = (part.strip() for part in item.partition("="))
        if not separator:
            raise ConfigError(
                f"config: {text!r} has {item!r} where a setting was expected. "
                "Write mechanism:setting=value,setting=value."
            )
        if key in settings:
            raise ConfigError(f"config: {text!r} gives {key!r} twice. Keep one of the two.")
        settings[key] = _value(value)
    return config_from_dict({"mechanism": mechanism.name, "settings": settings})


def format_config(config: Any) -> str:
    """The string that `parse_config` reads as `config`; settings at their defaults are left out.

    Example:
        >>> format_config(WindowConfig(window=512))
        'window:window=512'
    """
    name = mechanism_of_config(config).name
    default = type(config)()
    parts = [
        f"{field.name}={_text(getattr(config, field.name))}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(default, field.name)
    ]
    return f"{name}:{','.join(parts)}" if parts else name


def config_to_dict(config: Any) -> dict[str, Any]:
    """{"mechanism": name, "settings": {...}}: all settings, ready for JSON."""
    return {
        "mechanism": mechanism_of_config(config).name,
        "settings": dataclasses.asdict(config),
    }


def config_from_dict(data: Mapping[str, Any]) -> Any:
    """Inverse of `config_to_dict`; settings left out keep their defaults."""
    mechanism = get_mechanism(data["mechanism"])
    known = [field.name for field in dataclasses.fields(mechanism.config_class)]
    for key in data["settings"]:
        if key not in known:
            raise ConfigError(
                f"config: {mechanism.name!r} has no setting {key!r}. {nearest_name(key, known)}"
            )
    return mechanism.config_class(**data["settings"])


def select_layers(
    selection: str | int | Iterable[int], num_layers: int, sliding: Iterable[int] = ()
) -> list[int]:
    """Layer indices that a selection names, in order.

    Args:
        selection: "all" or "global" (every full-attention layer), "every" (sliding-window layers,
            too), "first:N" or "last:N" (of the full-attention layers), "0,3,5", an int (negative
            counts from the end), or a list of ints. Indices may name sliding-window layers.
        num_layers: how many attention layers the model has.
        sliding: indices of its sliding-window layers.

    Raises:
        ConfigError: unknown selection, or an index or a count out of range.
    """
    local = set(sliding)
    full = [index for index in range(num_layers) if index not in local]
    if isinstance(selection, str):
        head, _, count = (part.strip() for part in selection.partition(":"))
        if selection in ("all", "global"):
            return full
        if selection == "every":
            return list(range(num_layers))
        if head in ("first", "last"):
            number = _count(selection, count, len(full))
            return full[:number] if head == "first" else full[len(full) - number :]
        text = selection
        try:
            selection = [int(part) for part in text.split(",")]
        except ValueError:
            raise ConfigError(
                f"layers: {text!r} is not known. Allowed: {_SELECTIONS}. "
                + nearest_name(text, ["all", "global", "every", "first:4", "last:4"])
            ) from None
    numbers = [selection] if isinstance(selection, int) else list(selection)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise ConfigError(
                f"layers: {number!r} is a {type(number).__name__}. Allowed: {_SELECTIONS}."
            )
        if not -num_layers <= number < num_layers:
            raise ConfigError(
                f"layers: {number} is out of range; the model has {num_layers} attention layers. "
                f"Use 0 to {num_layers - 1}."
            )
    return sorted({number % num_layers for number in numbers})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """Layer index -> settings; layers that are not named keep exact attention.

    configs: index among the attention layers -> config of a mechanism.

    Example:
        >>> plan = LayerPlan(configs={0: WindowConfig(window=512), 3: WindowConfig(window=64)})
        >>> LayerPlan.from_json(plan.to_json()) == plan
        True
    """

    configs: Mapping[int, Any]

    def __post_init__(self) -> None:
        for config in self.configs.values():
            mechanism_of_config(config)

    @classmethod
    def build(
        cls,
        layers: str | int | Iterable[int] | Mapping[Any, Any],
        config: Any,
        num_layers: int,
        sliding: Sequence[int] = (),
    ) -> LayerPlan:
        """Resolve selections against a model of `num_layers` attention layers.

        Args:
            layers: a selection, see `select_layers`, or a mapping from selections to settings
                (objects or strings); where two selections overlap, the later one holds.
            config: settings (object or string) for a plain selection; None with a mapping.
            num_layers, sliding: as in `select_layers`.
        """
        if isinstance(layers, Mapping):
            if config is not None:
                raise ConfigError(
                    f"config: {config!r} was given together with a mapping for layers, which "
                    "holds the settings itself. Pass config=None."
                )
            pairs = list(layers.items())
        else:
            pairs = [(layers, config)]
        chosen: dict[int, Any] = {}
        for selection, settings in pairs:
            settings = parse_config(settings) if isinstance(settings, str) else settings
            mechanism_of_config(settings)
            for index in select_layers(selection, num_layers, sliding):
                chosen[index] = settings
        return cls(configs=dict(sorted(chosen.items())))

    def to_json(self) -> str:
        """One JSON object with the format name and every setting of every layer."""
        layers = {str(index): config_to_dict(config) for index, config in self.configs.items()}
        return json.dumps({"format": _FORMAT, "layers": layers}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> LayerPlan:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: not a plan, or one with an unknown mechanism or setting.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"plan: not JSON ({error}). Pass what to_json() wrote.") from error
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ConfigError(f"plan: the format is not {_FORMAT!r}. Pass what to_json() wrote.")
        return cls(configs={int(i): config_from_dict(c) for i, c in data["layers"].items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json()` to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerPlan:
        """Read a file written by `save`."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _text(value: Any) -> str:
    return value if isinstance(value, str) and _value(value) == value else json.dumps(value)


def _count(selection: str, count: str, most: int) -> int:
    if not count.isdecimal() or not 1 <= int(count) <= most:
        raise ConfigError(
            f"layers: {selection!r} must name a number of layers from 1 to {most}, the number of "
            "full-attention layers of the model; sliding-window layers are named by index."
        )
    return int(count)
