"""What the benchmark runs: mechanisms of the registry, their settings, shapes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, nearest_name
from ..mechanisms import MECHANISMS, mechanism_of_config

__all__ = [
    "BENCH_DEFAULTS",
    "DTYPES",
    "PASSES",
    "Case",
    "Shape",
    "check_dtype",
    "default_specs",
    "plan_cases",
    "plan_shapes",
]

PASSES = ("forward", "backward")
DTYPES = ("float16", "bfloat16", "float32", "float64")

# Settings that are timed when none are asked for; a mechanism that is not listed is timed with the
# defaults of its config. Exact attention is always timed, as the baseline.
BENCH_DEFAULTS: dict[str, tuple[str, ...]] = {"exact": (), "window": ("window:window=1024",)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Inputs and pass of a measurement; causal, one sequence length for queries and keys."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    dtype: str
    pass_name: str

    def row(self) -> dict[str, Any]:
        """The flat keys of a row."""
        fields = dataclasses.asdict(self)
        fields["pass"] = fields.pop("pass_name")
        return {**fields, "is_causal": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A mechanism with settings. label: the spec as it was asked for."""

    label: str
    mechanism: str
    config: Any


def check_dtype(name: str) -> str:
    """Refuse the name of a dtype that attention does not take."""
    if name not in DTYPES:
        raise ConfigError(f"dtype: {name!r} came. {nearest_name(name, DTYPES)}")
    return name


def default_specs() -> list[str]:
    """Specs of every registered mechanism but exact attention."""
    specs: list[str] = []
    for name in MECHANISMS:
        specs += BENCH_DEFAULTS.get(name, (name,))
    return specs


def plan_cases(specs: Sequence[str]) -> list[Case]:
    """Parse specs; "exact" is left out, because it is the baseline of every shape."""
    from ..hf.plan import parse_config

    cases = []
    for spec in specs:
        label = "".join(spec.split())
        if label != "exact":
            config = parse_config(label)
            name = mechanism_of_config(config).name
            cases.append(Case(label=label, mechanism=name, config=config))
    return cases


def plan_shapes(
    lengths: Sequence[int],
    head_dims: Sequence[int],
    passes: Sequence[str],
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    dtype: str,
) -> list[Shape]:
    """All combinations, shortest first.

    Raises:
        ConfigError: a number below 1, heads that do not divide, an unknown pass.
    """
    for name, values in [
        ("lengths", lengths),
        ("head_dims", head_dims),
        ("batch", [batch]),
        ("heads", [heads]),
        ("kv_heads", [kv_heads]),
    ]:
        if any(value < 1 for value in values):
            raise ConfigError(
                f"{name}: {min(values)} came. Allowed: 1 or more. Pass positive whole numbers."
            )
    if heads % kv_heads:
        raise ConfigError(
            f"kv_heads: {kv_heads} came. Allowed: a divisor of heads = {heads}. "
            f"Pass for example {heads}."
        )
    unknown = [name for name in passes if name not in PASSES]
    if unknown:
        raise ConfigError(
            f"passes: {unknown[0]!r} came. Allowed: {', '.join(PASSES)}. "
            "Pass one of them, or both with a comma between them."
        )
    return [
        Shape(
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            length=length,
            head_dim=head_dim,
            dtype=dtype,
            pass_name=pass_name,
        )
        for pass_name, head_dim, length in itertools.product(passes, head_dims, sorted(lengths))
    ]
