"""What a comparison runs: which settings by default, and how a request becomes a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..mechanisms import MECHANISMS, mechanism_of_config

__all__ = [
    "COMPARE_DEFAULTS",
    "NATIVE_DEFAULTS",
    "Candidate",
    "default_attentions",
    "plan_candidates",
]

# Settings that a comparison shows when none are asked for, as a function of the length: mechanism
# name -> specs. A mechanism that is not listed is shown once, with the defaults of its config.
COMPARE_DEFAULTS: dict[str, Callable[[int], tuple[str, ...]]] = {
    "exact": lambda length: ("exact",),
    "window": lambda length: (
        f"window:window={max(1, length // 8)}",
        f"window:window={max(1, length // 4)}",
    ),
}


# The same for models that were trained with a mechanism; "exact" is then the model's own.
NATIVE_DEFAULTS: dict[str, Callable[[int], tuple[str, ...]]] = {
    "stick_breaking": lambda length: (
        "stick_breaking:early_stop=6e-5",
        "stick_breaking:early_stop=0.01",
        f"stick_breaking:window={max(1, length // 4)}",
        f"stick_breaking:window={max(1, length // 16)}",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One line of a comparison.

    label: the spec as it was asked for, e.g. "window:window=512".
    mechanism: registry name. config: its settings, or None for the model's own exact attention.
    """

    label: str
    mechanism: str
    config: Any

    @property
    def settings(self) -> dict[str, Any]:
        """All settings as plain values; empty for the model's own attention."""
        return dataclasses.asdict(self.config) if self.config is not None else {}


def default_attentions(length: int, *, native: str | None = None) -> list[str]:
    """Specs of every registered mechanism that is meaningful on a pretrained model.

    Args:
        length: tokens to read.
        native: mechanism that the model was trained with, if not softmax: its own variants are
            shown instead.
    """
    if native is not None:
        return ["exact", *_variants(native, length)]
    specs: list[str] = []
    for name, mechanism in MECHANISMS.items():
        if mechanism.on_pretrained:
            specs += COMPARE_DEFAULTS.get(name, lambda _, name=name: (name,))(length)
    return specs


def plan_candidates(specs: Sequence[str], *, native: str | None = None) -> list[Candidate]:
    """Parse specs; exact attention comes first whether asked for or not, repeats are dropped.

    The plain word "exact" means the attention the model came with, untouched: it is what a user
    has, and what every ratio refers to.

    Raises:
        ConfigError: unknown mechanism or setting, or a mechanism that needs training first.
    """
    candidates = [Candidate(label="exact", mechanism="exact", config=None)]
    for spec in specs:
        label = "".join(spec.split())
        if label == "exact" or any(label == other.label for other in candidates):
            continue
        from ..hf.plan import parse_config

        config = parse_config(label)
        mechanism = mechanism_of_config(config)
        if native is not None and mechanism.name != native:
            raise ConfigError(
                f"attention: {label!r} came; this model was trained with {native}, and only its "
                f"variants mean something on it. Allowed: {native} with other settings, e.g. "
                f"{next(iter(_variants(native, 4096)), native)!r}."
            )
        if native is None and not mechanism.on_pretrained:
            usable = ", ".join(name for name, m in MECHANISMS.items() if m.on_pretrained)
            raise ConfigError(
                f"attention: {label!r} came; {mechanism.name} means nothing on a pretrained model "
                f"that was not trained with it. Allowed: {usable}. Train a model with it first."
            )
        candidates.append(Candidate(label=label, mechanism=mechanism.name, config=config))
    return candidates


def _variants(native: str, length: int) -> tuple[str, ...]:
    return NATIVE_DEFAULTS[native](length) if native in NATIVE_DEFAULTS else ()
