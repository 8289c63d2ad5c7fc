"""Settings of HyperAttention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, nearest_name

__all__ = ["INDICES", "RESIDUALS", "STRUCTURES", "HyperConfig"]

STRUCTURES = ("chunks", "recursion")
INDICES = ("kmeans", "pca", "lsh")
RESIDUALS = ("centroid", "uniform", "stratified", "value_norm", "none")


@dataclass(frozen=True, kw_only=True, slots=True)
class HyperConfig:
    """What the approximation is. The defaults are ours; `HyperConfig.paper()` is the paper's.

    structure: "chunks": keys near to the query exact, the far ones clustered inside of chunks of
        consecutive keys, of which each query opens the best clusters. Strictly causal, streams.
        "recursion": the paper's halves of halves with exact leaves; queries and keys are sorted
        by hash and the i-th block of queries meets the i-th block of keys.
    index: how similar keys are found. "kmeans": Lloyd's algorithm; "pca": a balanced tree, each
        node halved at the median of its widest direction, clusters of exactly equal size;
        "lsh": sign hashes in Gray-code order, cut into equal pieces.
    center_keys: hash keys (and, in the recursion, queries against them) after subtracting the mean
        key, which softmax does not see. False in the paper.
    residual: what stands for the far keys that are not visited. "centroid": per cluster one column
        of mean key and mean value, weighted by its count; "uniform", "stratified" (one draw per
        run of equal length in sorted order), "value_norm" (drawn in proportion to |v|^2): sampled
        keys, weighted by the inverse of their probability; "none": nothing.
    num_samples: sampled keys per chunk, or per node of the recursion.
    variance_term: centroid columns get half the variance of their scores added (diagonal).
    num_projections: hash planes of "lsh"; 2 ** num_projections clusters for "kmeans" in the
        recursion.
    num_iterations: steps of Lloyd's algorithm.

    Of "chunks":
    window: the last `window` keys up to the query's own are exact (not causal: |p - j| < window);
        so is the rest of a chunk that the window touches.
    num_sinks: the first keys, exact for every query.
    chunk_size: keys that are clustered together, a multiple of cluster_size.
    cluster_size: mean number of keys of a cluster; a power of two.
    num_probes: clusters that each query opens, i.e. visits key by key: those with the largest
        scale * q . mean_key + log(count) (+ probe_spread times the standard deviation).
    probe_spread: adds that many standard deviations of a cluster's scores to what clusters are
        chosen by, from the variance of its keys (the mean over dimensions d and d + D/2, which
        rotary embedding turns together: a text whose positions are all shifted chooses the same).
        Finds clusters with one excellent key. 2 measured best; 0 chooses by the mean alone.
    num_globals: keys of each chunk that every later query visits: the ones farthest from the mean
        of their cluster.

    Of "recursion":
    block_size: sorted keys that a block of sorted queries meets.
    min_length: leaves of this many keys are exact.

    control_weight: above 0, the convolution as a control variate of the sampled residual
        (structure "chunks", whole causal sequences; elsewhere it does nothing): the error that the
        same samples make on the mean model of Conv-Basis, which is known exactly, is taken off with
        this weight. The estimate stays unbiased; whether its variance falls depends on the head.
        At most 1.
    control_rope_base: base of the rotary embedding of query and key, for that model; None: none.

    max_error: heads whose estimated relative error is larger are computed exactly; None: never.

    Raises:
        ConfigError: a field is of the wrong type or out of range, or two contradict each other.
    """

    structure: str = "chunks"
    index: str = "pca"
    center_keys: bool = True
    residual: str = "centroid"
    num_samples: int = 32
    variance_term: bool = False
    num_projections: int = 8
    num_iterations: int = 4
    window: int = 256
    num_sinks: int = 4
    chunk_size: int = 512
    cluster_size: int = 16
    num_probes: int = 16
    probe_spread: float = 2.0
    num_globals: int = 0
    block_size: int = 256
    min_length: int = 2048
    control_weight: float = 0.0
    control_rope_base: float | None = None
    max_error: float | None = None

    @classmethod
    def paper(cls, **settings: Any) -> HyperConfig:
        """HyperAttention as published: sortLSH, diagonal blocks, uniform samples, exact leaves.

        Unlike the public code: samples that a row's block already holds are not counted again,
        and leaves are aligned to multiples of min_length (equal where the length is a power of
        two times it). Keyword arguments override.
        """
        paper: dict[str, Any] = {
            "structure": "recursion",
            "index": "lsh",
            "center_keys": False,
            "residual": "uniform",
            "num_samples": 256,
            "num_projections": 7,
            "num_sinks": 0,
            "probe_spread": 0.0,
        }
        return cls(**{**paper, **settings})

    @property
    def clusters_per_chunk(self) -> int:
        """Clusters of one chunk ("chunks")."""
        return self.chunk_size // self.cluster_size

    def __post_init__(self) -> None:
        for name, allowed in (
            ("structure", STRUCTURES),
            ("index", INDICES),
            ("residual", RESIDUALS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(
                    f"HyperConfig: {name} is {value!r}. {nearest_name(str(value), allowed)}"
                )
        for name in ("center_keys", "variance_term"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"HyperConfig: {name} is {getattr(self, name)!r}; it must be True or False."
                )
        for name, least, most in _RANGES:
            _check_int(name, getattr(self, name), least, most)
        if self.cluster_size & (self.cluster_size - 1):
            below = 1 << (self.cluster_size.bit_length() - 1)
            raise ConfigError(
                f"HyperConfig: cluster_size is {self.cluster_size}; it must be a power of two. "
                f"Nearest valid: {below if self.cluster_size - below < below // 2 else 2 * below}."
            )
        if self.chunk_size % self.cluster_size:
            fit = max(1, round(self.chunk_size / self.cluster_size)) * self.cluster_size
            raise ConfigError(
                f"HyperConfig: chunk_size is {self.chunk_size}, no multiple of cluster_size "
                f"{self.cluster_size}. Nearest valid: {fit}."
            )
        ratio = self.clusters_per_chunk
        if self.index == "pca" and self.structure == "chunks" and ratio & (ratio - 1):
            raise ConfigError(
                f"HyperConfig: index='pca' halves a chunk, but chunk_size {self.chunk_size} is "
                f"{ratio} times cluster_size; it must be a power of two times. "
                f"Nearest valid: {self.cluster_size * (1 << max(0, round(math.log2(ratio))))}."
            )
        if self.structure == "recursion":
            if self.index == "pca":
                raise ConfigError(
                    "HyperConfig: index='pca' works for structure='chunks' only. "
                    "Use 'lsh' or 'kmeans' with structure='recursion'."
                )
            if self.num_sinks or self.num_globals:
                raise ConfigError(
                    f"HyperConfig: num_sinks is {self.num_sinks} and num_globals "
                    f"{self.num_globals}; structure='recursion' has neither. Set both to 0."
                )
        if self.variance_term and self.residual != "centroid":
            raise ConfigError(
                f"HyperConfig: variance_term needs residual='centroid', got {self.residual!r}. "
                "Set variance_term=False."
            )
        if self.num_globals + self.num_sinks >= self.chunk_size:
            raise ConfigError(
                f"HyperConfig: num_globals {self.num_globals} and num_sinks {self.num_sinks} "
                f"leave nothing of a chunk of {self.chunk_size}. Use a larger chunk_size."
            )
        self._check_control()
        spread = self.probe_spread
        if isinstance(spread, bool) or not isinstance(spread, (int, float)) or not spread >= 0:
            raise ConfigError(
                f"HyperConfig: probe_spread is {spread!r}; it must be a number >= 0. "
                "Nearest valid: 0.0."
            )
        if self.max_error is not None and (
            isinstance(self.max_error, bool)
            or not isinstance(self.max_error, (int, float))
            or not self.max_error >= 0
        ):
            raise ConfigError(
                f"HyperConfig: max_error is {self.max_error!r}; it must be None or a number >= 0. "
                "Nearest valid: None."
            )

    def _check_control(self) -> None:
        weight, base = self.control_weight, self.control_rope_base
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1:
            raise ConfigError(
                f"HyperConfig: control_weight is {weight!r}; it must be a number from 0 (none) to "
                "1. Nearest valid: 0.0."
            )
        sampled = self.residual not in ("centroid", "none")
        if weight and not (sampled and self.structure == "chunks"):
            raise ConfigError(
                f"HyperConfig: control_weight is {weight} with structure={self.structure!r} and "
                f"residual={self.residual!r}; a control variate needs structure='chunks' and a "
                "sampled residual. Set residual='uniform' or control_weight=0.0."
            )
        if base is not None and (
            isinstance(base, bool) or not isinstance(base, (int, float)) or not base > 1
        ):
            raise ConfigError(
                f"HyperConfig: control_rope_base is {base!r}; it must be None or a number above 1, "
                "e.g. 10000.0."
            )


_RANGES = (
    ("num_samples", 1, None),
    ("num_projections", 1, 16),
    ("num_iterations", 0, None),
    ("window", 1, None),
    ("num_sinks", 0, None),
    ("chunk_size", 1, None),
    ("cluster_size", 1, None),
    ("num_probes", 0, None),
    ("num_globals", 0, None),
    ("block_size", 1, None),
    ("min_length", 1, None),
)


def _check_int(name: str, value: object, least: int, most: int | None) -> None:
    allowed = f"an int >= {least}" if most is None else f"an int from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(
            f"HyperConfig: {name} is {type(value).__name__} {value!r}; it must be {allowed}. "
            f"Nearest valid: {_nearest(value, least, most)}."
        )
    if value < least or (most is not None and value > most):
        raise ConfigError(
            f"HyperConfig: {name} is {value}; it must be {allowed}. "
            f"Nearest valid: {_nearest(value, least, most)}."
        )


def _nearest(value: object, least: int, most: int | None) -> int:
    try:
        near = max(least, round(float(value)))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return least
    return near if most is None else min(near, most)
