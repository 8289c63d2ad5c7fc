"""Forward of the default mode (chunks): means, choice, near part with columns, opened clusters.

| | |
|---|---|
| dtypes | float16, bfloat16, float32 (accumulation in float32) |
| head dim, value dim | 1 to 256 (float32: 128), may differ; tiles are padded to a power of two |
| architectures | sm_80 and later |
| causal, cross lengths, query_offset, grouped heads | yes |
| not causal, key_lengths | no |
| residual | "centroid", "none" |
| probe_spread | yes |
| num_globals, variance_term | no |

Mean keys and values are rounded to the dtype of the call before the queries meet them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...._triton.launch import KernelConfig
from ...._validation import Call
from ...config import HyperConfig
from ...plan import ChunkIndex
from .chunks_choose import triton_choose
from .chunks_means import cluster_means
from .chunks_near import near_forward
from .chunks_opened import add_opened
from .tiles import kernel_input

__all__ = ["triton_chunks_forward"]


def triton_chunks_forward(
    call: Call,
    config: HyperConfig,
    index: ChunkIndex,
    chosen: Tensor | None = None,
    kernels: dict[str, KernelConfig] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, H, N_q, D_v), lse (B, H, N_q) float32 and chosen (B, H, N_q, P) int32."""
    batch, heads, n_q, _ = call.query.shape
    clusters = index.counts.shape[2]
    probes = min(config.num_probes, clusters)
    width = call.value.shape[-1]
    if call.query.numel() == 0 or call.key.shape[2] == 0:
        return (
            call.query.new_zeros((batch, heads, n_q, width)),
            call.query.new_full((batch, heads, n_q), float("-inf")).float(),
            index.counts.new_full((batch, heads, n_q, probes), -1),
        )
    tiles = kernels or {}
    query, key, value = (kernel_input(t) for t in call[:3])
    call = call._replace(query=query, key=key, value=value)
    means = cluster_means(key, value, index)
    if chosen is None:
        chosen = triton_choose(call, config, means, index.variance, tiles.get("choose"))
    else:
        chosen = chosen.clone(memory_format=torch.contiguous_format)  # operators must not alias
    output = query.new_empty((batch, heads, n_q, value.shape[-1]))
    lse = near_forward(call, config, means, output, tiles.get("near"))
    add_opened(call, config, index, means, chosen, output, lse, tiles.get("opened"))
    return output[..., :width].contiguous(), lse, chosen
