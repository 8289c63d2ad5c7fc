"""The attention settings that are compared, as texts that `parse_config` reads."""

from __future__ import annotations

__all__ = ["SETTINGS", "SHOWN", "setting_text"]

_PAPER = (
    "structure=recursion,residual=uniform,num_samples=256,num_projections=7,num_sinks=0,"
    "probe_spread=0"
)

SETTINGS = {
    "exact": "exact",
    "default": "hyper",
    "k-means of 16, p=16": "hyper:index=kmeans,probe_spread=0",
    "k-means of 16, p=16, spread 2": "hyper:index=kmeans,probe_spread=2",
    "pca of 16, p=16": "hyper:index=pca,probe_spread=0",
    "pca of 16, p=24, spread 2": "hyper:index=pca,num_probes=24,probe_spread=2",
    "pca of 8, p=32, spread 2": "hyper:index=pca,cluster_size=8,num_probes=32,probe_spread=2",
    "pca of 16, chunks 1024, p=16, spread 2": "hyper:index=pca,chunk_size=1024,probe_spread=2",
    "LSH of 16, p=16": "hyper:index=lsh,probe_spread=0",
    "pca of 16, p=16, no columns": "hyper:index=pca,residual=none,probe_spread=2",
    "columns only": "hyper:index=pca,num_probes=0,probe_spread=0",
    "paper, LSH": f"hyper:{_PAPER},index=lsh,center_keys=false",
    "paper, k-means": f"hyper:{_PAPER},index=kmeans",
    "uniform samples only": "hyper:num_probes=0,probe_spread=0,residual=uniform,num_samples=32",
    "window 1024 + 4 sinks": "window:window=1024",
    "window 2048 + 4 sinks": "window:window=2048",
}

#: What every table has, and all that the slow ones have.
SHOWN = (
    "exact",
    "default",
    "paper, LSH",
    "paper, k-means",
    "window 1024 + 4 sinks",
    "window 2048 + 4 sinks",
)


def setting_text(name: str) -> str:
    """A named setting, or settings as they are typed."""
    return SETTINGS.get(name, name)
