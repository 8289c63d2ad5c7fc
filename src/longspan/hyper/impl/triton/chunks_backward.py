"""Backward of the default mode (chunks): the exact derivative with index and choice held fixed.

In this order: delta; dq of near keys, sinks and columns; dk and dv of near keys and sinks; the
gradients of the columns; then, cluster by cluster, what the queries that opened it add. No atomics,
so the bits repeat. Takes what `chunks_forward.py` takes.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...._triton.launch import KernelConfig
from ...._validation import Call
from ...config import HyperConfig
from ...plan import ChunkIndex
from .backward import _hyper_delta_bwd_kernel
from .chunks_means import cluster_means
from .chunks_near_bwd import column_backward, near_key_backward, near_query_backward
from .chunks_opened_bwd import opened_backward
from .configs import DELTA_ROWS
from .tiles import block_dim, grid_of, kernel_input

__all__ = ["triton_chunks_backward"]


def triton_chunks_backward(
    call: Call,
    config: HyperConfig,
    index: ChunkIndex,
    chosen: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
    kernels: dict[str, KernelConfig] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, in the dtype of the call."""
    batch, heads, n_q, _ = call.query.shape
    widths = [t.shape[-1] for t in call[:3]]
    if call.query.numel() == 0 or call.key.shape[2] == 0:
        dq, dk, dv = (t.new_zeros(t.shape) for t in call[:3])
        return dq, dk, dv
    tiles = kernels or {}
    query, key, value = (kernel_input(t) for t in call[:3])
    call = call._replace(query=query, key=key, value=value)
    up, out = kernel_input(grad_output), kernel_input(output)
    delta = torch.empty((batch, heads, n_q), dtype=torch.float32, device=query.device)
    value_dim = value.shape[-1]
    given = None if grad_lse is None else grad_lse.float().contiguous()
    _hyper_delta_bwd_kernel[grid_of(triton.cdiv(n_q, DELTA_ROWS), batch, heads)](
        out, up, given, delta, *out.stride()[:3], *up.stride()[:3], heads, n_q,
        VALUE_DIM=value_dim, BLOCK_M=DELTA_ROWS, BLOCK_DV=block_dim(value_dim),
        HAS_DLSE=given is not None, num_warps=4,
    )  # fmt: skip
    lse, chosen = lse.contiguous(), chosen.contiguous()
    means = cluster_means(key, value, index)
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format)
                  for t in (query, key, value))  # fmt: skip
    near_query_backward(call, config, means, up, lse, delta, dq, tiles.get("near_query"))
    near_key_backward(call, config, means, up, lse, delta, dk, dv, tiles.get("near_key"))
    d_mean = means.key, means.value  # not read without columns
    if config.residual == "centroid":
        d_mean = (torch.empty_like(means.key, dtype=torch.float32),
                  torch.empty_like(means.value, dtype=torch.float32))  # fmt: skip
        column_backward(call, config, means, up, lse, delta, d_mean, tiles.get("column"))
    opened_backward(call, config, index, means, chosen, up, lse, delta, d_mean, (dq, dk, dv),
                    tiles.get("opened_bwd"))  # fmt: skip
    dq, dk, dv = (
        t[..., :width].contiguous() for t, width in zip((dq, dk, dv), widths, strict=True)
    )
    return dq, dk, dv
