"""How one layer's call is made: dense, packed, or in shapes that tracing can follow."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..exact.config import ExactConfig
from ..window.api import window_attention_varlen
from ..window.config import WindowConfig
from .masks import Layout, layout_of_mask
from .report import Route

__all__ = [
    "Request",
    "flat",
    "put_back",
    "real_first",
    "run_dense",
    "run_masked",
    "run_packed",
    "take",
]


class Request(NamedTuple):
    """One layer's call: query (B, H, N_q, D), key and value (B, H_kv, N_k, D)."""

    module: nn.Module
    route: Route
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the mechanism's function."""
        owned = self.route.arguments(self.module)
        return {"is_causal": True, "scale": self.scale, "enable_gqa": True, **owned}


def run_dense(request: Request, dropout: float = 0.0) -> Tensor:
    """No padding: the last query sees the last key, whatever N_q is. (B, H, N_q, D_v)."""
    query, key, value = request.query, request.key, request.value
    n_q, n_k = query.shape[2], key.shape[2]
    request.route.count(() if torch.compiler.is_compiling() else ((n_q, n_k),) * query.shape[0])
    return _tensor(request.route.function(
        query, key, value, None, dropout, query_offset=n_k - n_q, **request.arguments,
    ))  # fmt: skip


def run_masked(request: Request, mask: Tensor) -> Tensor:
    """A padded batch: left, right, both or in between. Rows of padding are zero. (B, H, N_q, D_v).

    Args:
        request: the call.
        mask: (B, T), as `longspan_mask` makes it.
    """
    n_q, n_k = request.query.shape[2], request.key.shape[2]
    if mask.dtype is torch.uint8:
        everyone = torch.ones_like(mask[:, :n_q], dtype=torch.bool)
        return _run_fixed_shapes(request, everyone, mask.bool())
    if mask.shape[1] > n_k:
        raise UnsupportedError(
            f"attention_mask: {request.route.name} has {n_k} keys but the mask covers "
            f"{mask.shape[1]} tokens. Caches that drop keys take padded batches only if they come "
            "from longspan.hf.make_cache; use it, or a DynamicCache."
        )
    used = mask.shape[1]  # the rest is the unused tail of a static cache
    request = request._replace(key=request.key[:, :, :used], value=request.value[:, :, :used])
    compiling = torch.compiler.is_compiling()
    if not compiling and request.route.function_varlen is not None:
        return run_packed(request, layout_of_mask(mask, n_q))
    if n_q == used:
        return _run_aligned(request, mask)
    if request.route.function_varlen is None:
        raise UnsupportedError(
            f"attention_mask: {request.route.mechanism.name!r} has no packed form, so a padded "
            f"batch must bring all its tokens at once; {request.route.name} got {n_q} queries "
            f"for {used} keys. Generate with one sequence at a time, or without a cache."
        )
    return _run_fixed_shapes(request, mask[:, used - n_q :], mask)


def run_packed(request: Request, layout: Layout) -> Tensor:
    """The real tokens as one packed call, put back in place. (B, H, N_q, D_v)."""
    batch, heads, n_q, _ = request.query.shape
    request.route.count(layout.lengths)
    query = _pick(flat(request.query), layout.query_index)
    if query.shape[0] == 0:
        return request.query.new_zeros(batch, heads, n_q, request.value.shape[3])
    key = _pick(flat(request.key), layout.key_index)
    value = _pick(flat(request.value), layout.key_index)
    output: Tensor = _varlen(
        request, query, key, value, layout.cu_seqlens_q, layout.cu_seqlens_k,
        layout.max_seqlen_q, layout.max_seqlen_k,
    )  # fmt: skip
    if layout.query_index is not None:
        empty = output.new_zeros(batch * n_q, *output.shape[1:])
        output = empty.index_copy(0, layout.query_index, output)
    return output.reshape(batch, n_q, *output.shape[1:]).transpose(1, 2)


def _run_aligned(request: Request, mask: Tensor) -> Tensor:
    """N_q = N_k: move the padding to the right end of each row and pass key_lengths."""
    request.route.count(_row_lengths(mask))
    order = real_first(mask)
    query, key, value = (take(t, order) for t in (request.query, request.key, request.value))
    lengths = mask.sum(1, dtype=torch.int32)
    output = _tensor(request.route.function(
        query, key, value, None, 0.0, query_offset=0, key_lengths=lengths, **request.arguments,
    ))  # fmt: skip
    return put_back(output, order, mask)


def _run_fixed_shapes(request: Request, query_mask: Tensor, key_mask: Tensor) -> Tensor:
    """The packed call without leaving tokens out: shapes do not depend on the mask.

    Each row becomes two sequences, its real tokens and its padding, whose result is discarded.
    """
    request.route.count(())
    batch, _, n_q, _ = request.query.shape
    n_k = request.key.shape[2]
    query_order, key_order = real_first(query_mask), real_first(key_mask)
    query = flat(take(request.query, query_order))
    key, value = (flat(take(t, key_order)) for t in (request.key, request.value))
    bounds = [_bounds(mask) for mask in (query_mask, key_mask)]
    output = _varlen(request, query, key, value, bounds[0], bounds[1], n_q, n_k)
    output = output.reshape(batch, n_q, *output.shape[1:]).transpose(1, 2)
    return put_back(output, query_order, query_mask)


def _varlen(
    request: Request, query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor,
    longest_q: int, longest_k: int,
) -> Tensor:  # fmt: skip
    route, arguments = request.route, request.arguments
    if route.function_varlen is None:
        raise UnsupportedError(
            f"position_ids: {route.mechanism.name!r} has no packed form, so {route.name} cannot "
            "keep packed documents apart. Pass one document per row, with an attention_mask."
        )
    function = route.function_varlen
    half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    if isinstance(route.config, ExactConfig) and torch.compiler.is_compiling() and not half:
        # Torch has no packed kernel for these inputs, and reading the bounds breaks the graph;
        # a window over everything is exact attention, by an operator that tracing can follow.
        function = window_attention_varlen
        arguments["config"] = WindowConfig(window=longest_k, num_sinks=0)
    return _tensor(function(query, key, value, cu_q, cu_k, longest_q, longest_k, **arguments))


def _bounds(mask: Tensor) -> Tensor:
    """(2B + 1,) int32: in each row of N tokens a sequence of the real ones, then of the rest."""
    batch, n = mask.shape
    starts = torch.arange(batch, device=mask.device, dtype=torch.int32) * n
    inner = torch.stack((starts, starts + mask.sum(1, dtype=torch.int32)), 1).flatten()
    return torch.cat((inner, torch.full_like(starts[:1], batch * n)))


def real_first(mask: Tensor) -> Tensor:
    """(B, N): the columns of each row, real tokens first, each kind in order."""
    return torch.argsort(mask.logical_not().to(torch.uint8), dim=1, stable=True)


def take(tensor: Tensor, order: Tensor) -> Tensor:
    """The columns of (B, H, N, D) in this order, (B, N)."""
    index = order[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index)


def put_back(output: Tensor, order: Tensor, mask: Tensor) -> Tensor:
    """Undo `take`; columns that the mask (B, N) hides become zero."""
    output = take(output, torch.argsort(order, dim=1))
    return torch.where(mask[:, None, :, None], output, 0.0)


def flat(tensor: Tensor) -> Tensor:
    """(B, H, N, D) to (B * N, H, D)."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _pick(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else rows.index_select(0, index)


def _row_lengths(mask: Tensor) -> tuple[tuple[int, int], ...]:
    if torch.compiler.is_compiling():
        return ()
    return tuple((n, n) for n in mask.sum(1).tolist())


def _tensor(result: Any) -> Tensor:
    """The output of a mechanism; those with a state return it in a NamedTuple."""
    return result if isinstance(result, Tensor) else result.output
