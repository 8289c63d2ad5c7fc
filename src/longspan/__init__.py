"""longspan: affordable attention at long context, one contract for five mechanisms.

Public names are resolved on first use; importing the package needs torch only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ._explain import Explanation, explain
    from ._front import attention
    from ._merge import merge, merge_stick_breaking
    from .conv_basis.api import (
        conv_basis_apply,
        conv_basis_attention,
        conv_basis_attention_varlen,
        conv_basis_attention_with_lse,
        conv_basis_check,
        conv_basis_recover,
    )
    from .conv_basis.basis import ConvBasis, ConvBasisStats
    from .conv_basis.config import ConvBasisConfig
    from .conv_basis.toeplitz import toeplitz_attention, toeplitz_attention_with_lse
    from .errors import (
        ConfigError,
        LongspanError,
        LongspanWarning,
        MissingExtraError,
        PatchError,
        RankError,
        ShapeError,
        UnsupportedError,
    )
    from .exact.api import exact_attention, exact_attention_varlen, exact_attention_with_lse
    from .exact.config import ExactConfig
    from .hyper.api import hyper_attention, hyper_attention_varlen, hyper_attention_with_lse
    from .hyper.config import HyperConfig
    from .hyper.state import HyperState, hyper_attention_chunk
    from .infini.api import (
        InfiniOutput,
        infini_attention,
        infini_attention_chunk,
        infini_attention_varlen,
    )
    from .infini.config import InfiniConfig
    from .infini.state import InfiniState
    from .sdpa import patched_sdpa
    from .stick_breaking.api import (
        StickBreakingOutput,
        stick_breaking_attention,
        stick_breaking_attention_varlen,
        stick_breaking_attention_with_remainder,
    )
    from .stick_breaking.config import StickBreakingConfig
    from .stick_breaking.state import (
        StickBreakingChunk,
        StickBreakingState,
        stick_breaking_attention_chunk,
    )
    from .stick_breaking.stats import StickBreakingStats, stick_breaking_attention_stats
    from .types import AttentionOutput, Impl
    from .window.api import window_attention, window_attention_varlen, window_attention_with_lse
    from .window.config import WindowConfig
    from .window.state import WindowState

_LAZY = {
    "attention": "_front",
    "merge": "_merge",
    "merge_stick_breaking": "_merge",
    "ConvBasis": "conv_basis.basis",
    "ConvBasisConfig": "conv_basis.config",
    "ConvBasisStats": "conv_basis.basis",
    "conv_basis_apply": "conv_basis.api",
    "conv_basis_attention": "conv_basis.api",
    "conv_basis_attention_varlen": "conv_basis.api",
    "conv_basis_attention_with_lse": "conv_basis.api",
    "conv_basis_check": "conv_basis.api",
    "conv_basis_recover": "conv_basis.api",
    "toeplitz_attention": "conv_basis.toeplitz",
    "toeplitz_attention_with_lse": "conv_basis.toeplitz",
    "ConfigError": "errors",
    "LongspanError": "errors",
    "LongspanWarning": "errors",
    "MissingExtraError": "errors",
    "PatchError": "errors",
    "RankError": "errors",
    "ShapeError": "errors",
    "UnsupportedError": "errors",
    "exact_attention": "exact.api",
    "exact_attention_varlen": "exact.api",
    "exact_attention_with_lse": "exact.api",
    "ExactConfig": "exact.config",
    "Explanation": "_explain",
    "explain": "_explain",
    "hyper_attention": "hyper.api",
    "hyper_attention_varlen": "hyper.api",
    "hyper_attention_with_lse": "hyper.api",
    "HyperConfig": "hyper.config",
    "HyperState": "hyper.state",
    "hyper_attention_chunk": "hyper.state",
    "InfiniConfig": "infini.config",
    "InfiniOutput": "infini.api",
    "InfiniState": "infini.state",
    "infini_attention": "infini.api",
    "infini_attention_chunk": "infini.api",
    "infini_attention_varlen": "infini.api",
    "patched_sdpa": "sdpa",
    "StickBreakingChunk": "stick_breaking.state",
    "StickBreakingConfig": "stick_breaking.config",
    "StickBreakingOutput": "stick_breaking.api",
    "StickBreakingState": "stick_breaking.state",
    "StickBreakingStats": "stick_breaking.stats",
    "stick_breaking_attention": "stick_breaking.api",
    "stick_breaking_attention_chunk": "stick_breaking.state",
    "stick_breaking_attention_stats": "stick_breaking.stats",
    "stick_breaking_attention_varlen": "stick_breaking.api",
    "stick_breaking_attention_with_remainder": "stick_breaking.api",
    "AttentionOutput": "types",
    "Impl": "types",
    "window_attention": "window.api",
    "window_attention_varlen": "window.api",
    "window_attention_with_lse": "window.api",
    "WindowConfig": "window.config",
    "WindowState": "window.state",
}
_SUBMODULES = ("distributed", "hf", "mechanisms", "models", "nn", "testing")

__all__ = [
    "AttentionOutput",
    "ConfigError",
    "ConvBasis",
    "ConvBasisConfig",
    "ConvBasisStats",
    "ExactConfig",
    "Explanation",
    "HyperConfig",
    "HyperState",
    "Impl",
    "InfiniConfig",
    "InfiniOutput",
    "InfiniState",
    "LongspanError",
    "LongspanWarning",
    "MissingExtraError",
    "PatchError",
    "RankError",
    "ShapeError",
    "StickBreakingChunk",
    "StickBreakingConfig",
    "StickBreakingOutput",
    "StickBreakingState",
    "StickBreakingStats",
    "UnsupportedError",
    "WindowConfig",
    "WindowState",
    "__version__",
    "attention",
    "conv_basis_apply",
    "conv_basis_attention",
    "conv_basis_attention_varlen",
    "conv_basis_attention_with_lse",
    "conv_basis_check",
    "conv_basis_recover",
    "exact_attention",
    "exact_attention_varlen",
    "exact_attention_with_lse",
    "explain",
    "hyper_attention",
    "hyper_attention_chunk",
    "hyper_attention_varlen",
    "hyper_attention_with_lse",
    "infini_attention",
    "infini_attention_chunk",
    "infini_attention_varlen",
    "merge",
    "merge_stick_breaking",
    "patched_sdpa",
    "stick_breaking_attention",
    "stick_breaking_attention_chunk",
    "stick_breaking_attention_stats",
    "stick_breaking_attention_varlen",
    "stick_breaking_attention_with_remainder",
    "toeplitz_attention",
    "toeplitz_attention_with_lse",
    "window_attention",
    "window_attention_varlen",
    "window_attention_with_lse",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_SUBMODULES})
