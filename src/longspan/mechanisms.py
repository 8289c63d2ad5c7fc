"""The only registry: what exists, where it lives, what it can do.

Names are resolved lazily, so that reading this table imports neither torch nor a mechanism. The
command line, the Hugging Face layer, benchmarks, conformance tests and docs tables loop over it;
Python users call the functions directly.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError, nearest_name

__all__ = ["MECHANISMS", "Mechanism", "get_mechanism", "mechanism_of_config"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mechanism:
    """One attention mechanism: where its parts are and what it can do.

    `package` holds `config.py`, `api.py` and so on; the function names follow from `name`:
    `<name>_attention`, `<name>_attention_varlen`, and for the softmax family
    `<name>_attention_with_lse`. `api.py` also has `implementations(call, config)`, which reports
    for each implementation whether it can run a call, and `visited_fraction(config, n_q, n_k,
    is_causal=..., query_offset=...)`, the share of the visible scores that are computed.
    """

    name: str
    summary: str
    paper: str
    package: str
    config_name: str
    merge: str = "softmax"  # algebra of its partial results: "softmax", "stick_breaking", "none"
    is_exact: bool = False  # equals softmax attention for every setting
    is_causal_only: bool = False
    on_pretrained: bool = True  # meaningful on a pretrained softmax model without training
    has_varlen: bool = True
    has_backward: bool = True
    state_name: str | None = None  # class in `state.py` of what streams with bounded memory
    has_triton: bool = False
    shares_draws: bool = False  # what `seed` makes is the same for all heads
    has_parameters: bool = False  # learns tensors of its own: `initial_parameters` in `api.py`

    @property
    def config_class(self) -> type[Any]:
        """The frozen dataclass of its settings."""
        return self._load("config", self.config_name)  # type: ignore[no-any-return]

    @property
    def function(self) -> Callable[..., Any]:
        """`<name>_attention`."""
        return self._load("api", f"{self.name}_attention")  # type: ignore[no-any-return]

    @property
    def function_with_lse(self) -> Callable[..., Any]:
        """`<name>_attention_with_lse` (softmax family only)."""
        return self._load("api", f"{self.name}_attention_with_lse")  # type: ignore[no-any-return]

    @property
    def function_varlen(self) -> Callable[..., Any]:
        """`<name>_attention_varlen`."""
        return self._load("api", f"{self.name}_attention_varlen")  # type: ignore[no-any-return]

    @property
    def implementations(self) -> Callable[..., Any]:
        """`implementations(call, config) -> tuple[ImplReport, ...]`, preferred first."""
        return self._load("api", "implementations")  # type: ignore[no-any-return]

    @property
    def visited_fraction(self) -> Callable[..., float]:
        """Share of the visible scores that a call computes."""
        return self._load("api", "visited_fraction")  # type: ignore[no-any-return]

    @property
    def state_class(self) -> type[Any] | None:
        """Class of the streaming state, or None."""
        return self._load("state", self.state_name) if self.state_name else None

    @property
    def initial_parameters(self) -> Callable[..., dict[str, Any]]:
        """`initial_parameters(config, heads=, kv_heads=, head_dim=)`: keyword of the function ->
        tensor to start training from. Only where `has_parameters`."""
        return self._load("api", "initial_parameters")  # type: ignore[no-any-return]

    def _load(self, module: str, attribute: str) -> Any:
        return getattr(importlib.import_module(f".{self.package}.{module}", __package__), attribute)


_TABLE = (
    Mechanism(
        name="exact",
        summary="softmax attention by torch's fastest kernel, with lse, offsets and packing",
        paper="arXiv:2205.14135",
        package="exact",
        config_name="ExactConfig",
        is_exact=True,
    ),
    Mechanism(
        name="window",
        summary="sliding window and attention sinks, exact over the keys it visits",
        paper="arXiv:2309.17453",
        package="window",
        config_name="WindowConfig",
        state_name="WindowState",
        has_triton=True,
    ),
    Mechanism(
        name="hyper",
        summary="far keys only where an index finds large scores, centroids for the rest",
        paper="arXiv:2310.05869",
        package="hyper",
        config_name="HyperConfig",
        state_name="HyperState",
        has_triton=True,
    ),
    Mechanism(
        name="stick_breaking",
        summary="keys take shares of a stick, nearest first: no positions, exact, early stop",
        paper="arXiv:2410.17980",
        package="stick_breaking",
        config_name="StickBreakingConfig",
        merge="stick_breaking",
        is_causal_only=True,
        on_pretrained=False,
        state_name="StickBreakingState",
        has_triton=True,
    ),
    Mechanism(
        name="conv_basis",
        summary="scores as few Toeplitz matrices, by FFT; heads unlike that fall back to exact",
        paper="arXiv:2405.05219",
        package="conv_basis",
        config_name="ConvBasisConfig",
        is_causal_only=True,
        has_triton=True,
        shares_draws=True,
    ),
    Mechanism(
        name="infini",
        summary="causal attention in segments, and a gated memory of constant size of all before",
        paper="arXiv:2404.07143",
        package="infini",
        config_name="InfiniConfig",
        merge="none",
        is_causal_only=True,
        on_pretrained=False,
        state_name="InfiniState",
        has_triton=True,
        has_parameters=True,
    ),
)

MECHANISMS: dict[str, Mechanism] = {mechanism.name: mechanism for mechanism in _TABLE}


def get_mechanism(name: str) -> Mechanism:
    """The mechanism called `name`; an unknown name raises ConfigError with the nearest one."""
    try:
        return MECHANISMS[name]
    except KeyError:
        raise ConfigError(
            f"mechanism: {name!r} is not known. {nearest_name(name, MECHANISMS)}"
        ) from None


def mechanism_of_config(config: object) -> Mechanism:
    """The mechanism whose config class `config` belongs to; raises ConfigError otherwise."""
    return mechanism_of_config_class(type(config))


def mechanism_of_config_class(config_class: type) -> Mechanism:
    """The mechanism with this config class; raises ConfigError otherwise."""
    for mechanism in MECHANISMS.values():
        if config_class.__name__ == mechanism.config_name and issubclass(
            config_class, mechanism.config_class
        ):
            return mechanism
    known = [mechanism.config_name for mechanism in MECHANISMS.values()]
    raise ConfigError(
        f"config: a {config_class.__name__} belongs to no mechanism. "
        f"{nearest_name(config_class.__name__, known)}"
    )
