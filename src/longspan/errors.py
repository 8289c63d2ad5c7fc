"""The exception tree. A message says: which argument, what came, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "LongspanError",
    "LongspanWarning",
    "MissingExtraError",
    "PatchError",
    "RankError",
    "ShapeError",
    "UnsupportedError",
    "nearest_name",
]


class LongspanError(Exception):
    """Base class of every error that longspan raises on purpose."""


class ConfigError(LongspanError, ValueError):
    """A setting is invalid in itself."""


class ShapeError(LongspanError, ValueError):
    """Tensors do not fit together (shape, dtype or device)."""


class UnsupportedError(LongspanError, NotImplementedError):
    """A valid request that this mechanism or implementation cannot honour."""


class PatchError(LongspanError, RuntimeError):
    """A model cannot be patched, or was changed while it was patched."""


class RankError(LongspanError, RuntimeError):
    """A process of a distributed group stopped, or calls with something else than the others."""


class MissingExtraError(LongspanError, ImportError):
    """An optional dependency is missing; the message names the extra to install."""

    @classmethod
    def for_module(cls, feature: str, module: str, extra: str) -> MissingExtraError:
        """The standard message for `feature`, which needs `module` from the extra `extra`."""
        return cls(
            f"{feature} needs the package {module!r}, which is not installed. "
            f"Install it with: pip install 'longspan[{extra}]'"
        )


class LongspanWarning(UserWarning):
    """Something the user should change; given once per cause."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the known name nearest to `name` and lists all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Allowed: {', '.join(names)}."
