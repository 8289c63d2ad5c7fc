"""The operators behind HyperAttention: opaque to tracing, output and lse differentiable.

`hyper_index` makes what is known before the queries' choice, `hyper_fwd` chooses and attends,
`hyper_bwd` is the exact derivative with index and choice held fixed. Settings cross the border as
lists, because operators take plain types only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._validation import Call
from .config import HyperConfig
from .geometry import recursion
from .impl import common
from .impl.eager import eager_backward, eager_forward
from .impl.recursion import (
    entries_of,
    recursion_backward,
    recursion_forward,
    recursion_index,
)
from .plan import ChunkIndex, SortedIndex

__all__ = ["hyper_bwd", "hyper_fwd", "hyper_index", "settings_of"]

_NAMES = ("structure", "index", "residual")
_NUMBERS = (
    *("num_samples", "num_projections", "num_iterations", "window", "num_sinks", "chunk_size"),
    *("cluster_size", "num_probes", "num_globals", "block_size", "min_length"),
)
_FLAGS = ("center_keys", "variance_term")


def settings_of(config: HyperConfig) -> tuple[str, list[int], float]:
    """`names`, `numbers` and `spread` of the operators. max_error is not among them."""
    names = f"{config.structure},{config.index},{config.residual}"
    numbers = [
        config.num_samples, config.num_projections, config.num_iterations, config.window,
        config.num_sinks, config.chunk_size, config.cluster_size, config.num_probes,
        config.num_globals, config.block_size, config.min_length,
        int(config.center_keys), int(config.variance_term),
    ]  # fmt: skip
    return names, numbers, float(config.probe_spread)


def _config(names: str, numbers: list[int], spread: float) -> HyperConfig:
    fields: dict[str, Any] = dict(zip(_NAMES, names.split(","), strict=True))
    numbers = [int(x) for x in numbers]  # under torch.compile a setting may come as a symbol
    fields.update(zip(_NUMBERS, numbers, strict=False))
    fields.update((flag, bool(x)) for flag, x in zip(_FLAGS, numbers[-2:], strict=True))
    return HyperConfig(**fields, probe_spread=spread)


@torch.library.custom_op("longspan::hyper_index", mutates_args=())
def hyper_index(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    projections: Tensor | None,
    is_causal: bool,
    query_offset: int,
    names: str,
    numbers: list[int],
    spread: float,
    seed: int,
    impl: str,
) -> list[Tensor]:
    """The fields of a `ChunkIndex` or a `SortedIndex`; nothing for a padded recursion."""
    config = _config(names, numbers, spread)
    call = Call(query, key, value, key_lengths, is_causal, 1.0, query_offset)
    with torch.autocast(query.device.type, enabled=False):
        if config.structure == "chunks":
            return list(common.chunk_index(call, config, projections, seed))
        if key_lengths is not None:  # each entry has its own geometry: made where it is used
            return []
        if impl == "triton":
            from .impl.triton.index import triton_index

            return list(triton_index(call, config, projections, seed))
        return list(recursion_index(call, config, projections, seed))


@hyper_index.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    projections: Tensor | None,
    is_causal: bool,
    query_offset: int,
    names: str,
    numbers: list[int],
    spread: float,
    seed: int,
    impl: str,
) -> list[Tensor]:
    config = _config(names, numbers, spread)
    batch, heads, length, dim = key.shape
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    sampled = config.residual not in ("centroid", "none")
    drawn = config.num_samples if sampled else 0

    def whole(*shape: int) -> Tensor:
        return query.new_empty((batch, heads, *shape), dtype=torch.int32)

    def real(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return query.new_empty((batch, heads, *shape), dtype=dtype)

    if config.structure == "chunks":
        chunks = length // config.chunk_size
        ordered, clusters = chunks * config.chunk_size, chunks * config.clusters_per_chunk
        return [
            whole(ordered), whole(clusters), whole(clusters), whole(ordered),
            whole(chunks, config.num_globals), real(clusters, dim, dtype=wide),
            whole(chunks * drawn), real(chunks * drawn),
            real(clusters if spread else 0, dim, dtype=wide),
        ]  # fmt: skip
    if key_lengths is not None:
        return []
    geometry = recursion(query.shape[2], length, is_causal, query_offset, config.block_size,
                         config.min_length)  # fmt: skip
    nodes = len(geometry.nodes)
    order = query.new_empty((*query.shape[:2], geometry.query_bases[-1]), dtype=torch.int32)
    return [order, whole(geometry.key_bases[-1]), whole(nodes, drawn), real(nodes, drawn),
            whole(nodes, drawn)]  # fmt: skip


@torch.library.custom_op("longspan::hyper_fwd", mutates_args=())
def hyper_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    projections: Tensor | None,
    index: list[Tensor],
    chosen: Tensor | None,
    is_causal: bool,
    scale: float,
    query_offset: int,
    names: str,
    numbers: list[int],
    spread: float,
    seed: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, H, N_q, D_v), lse (B, H, N_q), and what was opened (B, H, N_q, P) int32."""
    config = _config(names, numbers, spread)
    call = Call(query, key, value, key_lengths, is_causal, scale, query_offset)
    with torch.autocast(query.device.type, enabled=False):
        if config.structure == "chunks":
            if impl == "triton":
                from .impl.triton.chunks_forward import triton_chunks_forward

                return triton_chunks_forward(call, config, ChunkIndex(*index), chosen)
            return eager_forward(call, config, ChunkIndex(*index), chosen)
        none = query.new_zeros((*query.shape[:3], 0), dtype=torch.int32)
        if impl == "triton":
            from .impl.triton.forward import triton_forward

            return *triton_forward(call, config, SortedIndex(*index)), none
        output = query.new_zeros((*query.shape[:3], value.shape[-1]))
        lse = query.new_full(query.shape[:3], float("-inf"), dtype=common.wide_dtype(call))
        for entries, part in entries_of(call):
            sorted_index = (
                SortedIndex(*index) if index else recursion_index(part, config, projections, seed)
            )
            output[entries], lse[entries] = recursion_forward(part, config, sorted_index)
        return output, lse, none


@hyper_fwd.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    projections: Tensor | None,
    index: list[Tensor],
    chosen: Tensor | None,
    is_causal: bool,
    scale: float,
    query_offset: int,
    names: str,
    numbers: list[int],
    spread: float,
    seed: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    config = _config(names, numbers, spread)
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    probes = 0
    if config.structure == "chunks":
        clusters = key.shape[2] // config.chunk_size * config.clusters_per_chunk
        probes = min(config.num_probes, clusters)
    return (
        query.new_empty((*query.shape[:3], value.shape[-1])),
        query.new_empty(query.shape[:3], dtype=wide),
        query.new_empty((*query.shape[:3], probes), dtype=torch.int32),
    )


@torch.library.custom_op("longspan::hyper_bwd", mutates_args=())
def hyper_bwd(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
    chosen: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    projections: Tensor | None,
    index: list[Tensor],
    is_causal: bool,
    scale: float,
    query_offset: int,
    names: str,
    numbers: list[int],
    spread: float,
    seed: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous."""
    config = _config(names, numbers, spread)
    call = Call(query, key, value, key_lengths, is_causal, scale, query_offset)
    with torch.autocast(query.device.type, enabled=False):
        if config.structure == "chunks" and impl == "triton":
            from .impl.triton.chunks_backward import triton_chunks_backward

            return triton_chunks_backward(call, config, ChunkIndex(*index), chosen, grad_output,
                                          grad_lse, output, lse)  # fmt: skip
        if config.structure == "chunks":
            return eager_backward(call, config, ChunkIndex(*index), chosen, grad_output, grad_lse,
                                  output, lse)  # fmt: skip
        if impl == "triton":
            from .impl.triton.backward import triton_backward

            return triton_backward(call, config, SortedIndex(*index), grad_output, grad_lse,
                                   output, lse)  # fmt: skip
        dq, dk, dv = (tensor.new_zeros(tensor.shape) for tensor in (query, key, value))
        for entries, part in entries_of(call):
            sorted_index = (
                SortedIndex(*index) if index else recursion_index(part, config, projections, seed)
            )
            length = part.key.shape[2]
            grads = recursion_backward(
                part, config, sorted_index, grad_output[entries],
                None if grad_lse is None else grad_lse[entries], output[entries], lse[entries],
            )  # fmt: skip
            dq[entries], dk[entries, :, :length], dv[entries, :, :length] = grads
        return dq, dk, dv


@hyper_bwd.register_fake
def _(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
    chosen: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return dq, dk, dv


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    query, key, value, key_lengths, projections, index, _, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.num_index = len(index)
    ctx.save_for_backward(*output, query, key, value, key_lengths, projections, *index)


def _backward(
    ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    output, lse, chosen, *inputs = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    grads = hyper_bwd(grad_output, grad_lse, output, lse, chosen, *inputs[:5], list(inputs[5:]),
                      *ctx.settings)  # fmt: skip
    return *grads, None, None, [None] * ctx.num_index, *(None,) * 9


hyper_fwd.register_autograd(_backward, setup_context=_setup_context)
