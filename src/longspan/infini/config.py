"""Settings of Infini-attention."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError, nearest_name

__all__ = ["FEATURE_MAPS", "FIRST_SEGMENTS", "LOCALS", "UPDATES", "InfiniConfig"]

UPDATES = ("linear", "delta", "delta_corrected", "gated_delta")
FIRST_SEGMENTS = ("local", "gated")
LOCALS = ("segment", "sliding")
FEATURE_MAPS = ("elu", "dpfp")


@dataclass(frozen=True, kw_only=True, slots=True)
class InfiniConfig:
    """Infini-attention (arXiv:2404.07143): what is computed.

    segment_length: tokens of a segment, N; at least 1.
    update: how a finished segment is written into the memory.
        "linear": M += sigma(K)^T V.
        "delta": the paper's: M += sigma(K)^T (V - sigma(K) M / sigma(K) z). A binding that is
            written again is read back at half its value, because z counts it twice.
        "delta_corrected": the same, but z grows only by the part of a key that it does not cover
            yet (arXiv:2407.04841), so a binding that is written again stays what it was.
        "gated_delta": a gated delta rule, token by token, over keys of length one
            (arXiv:2412.06464), with `write_gate` and `log_decay`. Not of the paper: an alternative
            memory behind the same state. It has no normaliser; queries have length one.
    first_segment: what rows do that have no memory yet. "local": attend locally, without the
        gate, so that a short input is plain attention. "gated": the memory reads as zero and the
        local part is scaled by 1 - g.
    local: "segment": a query sees the keys of its own segment. "sliding": also those of the
        segment before, which enters the memory one segment later.
    feature_map: sigma. "elu": ELU(x) + 1 as in the paper. "dpfp": products of neighbouring
        rectified coordinates, 6 D features (arXiv:2102.11174 with nu = 3); makes the memory six
        times as large and refuses the Triton kernels. Not used by "gated_delta".

    Raises:
        ConfigError: a field is out of range.
    """

    segment_length: int = 2048
    update: str = "linear"
    first_segment: str = "local"
    local: str = "segment"
    feature_map: str = "elu"

    def __post_init__(self) -> None:
        n = self.segment_length
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ConfigError(
                f"InfiniConfig: segment_length is {n!r}; it must be an int >= 1, the tokens of a "
                "segment. Use e.g. 2048."
            )
        for name, allowed in (
            ("update", UPDATES),
            ("first_segment", FIRST_SEGMENTS),
            ("local", LOCALS),
            ("feature_map", FEATURE_MAPS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(
                    f"InfiniConfig: {name} is {value!r}. {nearest_name(str(value), allowed)}"
                )

    @property
    def lag(self) -> int:
        """Finished segments that are still seen exactly, and are not in the memory yet."""
        return 1 if self.local == "sliding" else 0

    @property
    def has_normaliser(self) -> bool:
        """Whether reads divide by sigma(q) z."""
        return self.update != "gated_delta"

    def feature_dim(self, head_dim: int) -> int:
        """Rows of the memory for keys of `head_dim`."""
        if self.feature_map == "dpfp" and self.has_normaliser:
            return 6 * head_dim
        return head_dim
