"""Settings of exact attention."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError, nearest_name

__all__ = ["BACKENDS", "ExactConfig"]

BACKENDS = ("auto", "flash", "cudnn", "efficient", "cpu", "chunked")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactConfig:
    """Exact softmax attention: which kernel of torch computes it.

    backend: "auto" takes the fastest that accepts the call. "flash", "cudnn" and "efficient" are
        torch's CUDA kernels, "cpu" its CPU flash kernel, "chunked" plain torch in O(N) memory on
        any device and dtype. A named backend runs or raises.
    """

    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(
                f"ExactConfig: backend is {self.backend!r}. {nearest_name(self.backend, BACKENDS)}"
            )
