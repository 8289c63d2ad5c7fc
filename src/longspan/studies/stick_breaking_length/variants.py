"""The models that are compared, and how each reads texts beyond its training length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...exact.config import ExactConfig
from ...models.rope_scaling import RopeScaling
from ...stick_breaking.config import StickBreakingConfig

__all__ = ["READINGS", "VARIANTS", "Reading", "Variant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A trained model: what differs from the others in its TransformerConfig."""

    name: str
    label: str
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A way to evaluate a trained variant; scaling(length, trained) gives its RopeScaling."""

    name: str
    label: str
    variant: str
    scaling: Callable[[int, int], RopeScaling | None] = lambda length, trained: None


def _scale(method: str) -> Callable[[int, int], RopeScaling | None]:
    def scaling(length: int, trained: int) -> RopeScaling | None:
        if length <= trained:
            return None
        return RopeScaling(method=method, factor=length / trained, trained_length=trained)

    return scaling


_EXACT = ExactConfig()

VARIANTS = {
    v.name: v
    for v in (
        Variant(
            name="stick-breaking",
            label="stick-breaking",
            settings={"positions": "none", "attention": StickBreakingConfig()},
        ),
        Variant(name="rope", label="RoPE", settings={"positions": "rope", "attention": _EXACT}),
        Variant(name="fox", label="FoX", settings={"positions": "forget", "attention": _EXACT}),
        Variant(name="alibi", label="ALiBi", settings={"positions": "alibi", "attention": _EXACT}),
        Variant(name="nope", label="NoPE", settings={"positions": "none", "attention": _EXACT}),
    )
}

READINGS = (
    Reading(name="stick-breaking", label="stick-breaking", variant="stick-breaking"),
    Reading(name="rope", label="RoPE", variant="rope"),
    Reading(name="rope-yarn", label="RoPE + YaRN", variant="rope", scaling=_scale("yarn")),
    Reading(name="rope-ntk", label="RoPE + NTK", variant="rope", scaling=_scale("ntk")),
    Reading(name="fox", label="FoX", variant="fox"),
    Reading(name="alibi", label="ALiBi", variant="alibi"),
    Reading(name="nope", label="NoPE", variant="nope"),
)
