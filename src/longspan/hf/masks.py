"""The mask function registered with transformers, and what its result says about a batch.

`longspan_mask` returns None, or a boolean (B, T) tensor: True where a key is a real token. The
queries are its last N_q columns, and keys after column T are the unused tail of a static cache.
Nothing here has N_q x N_k elements.

While compiling, the position of the first query may be a tensor (static caches). Then the mask
has one column for each key and is uint8, which says: all queries are real, and they are the last
N_q real tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .compat import mask_parts

__all__ = [
    "Layout",
    "layout_of_bounds",
    "layout_of_documents",
    "layout_of_mask",
    "longspan_mask",
]

_PLAIN = (
    "and_masks.",
    "causal_mask_function",
    "sliding_window_overlay.",
    "packed_sequence_mask_function.",
    "remap_positions_for_packed_sequence.",
)
_UNKNOWN = object()


class Layout(NamedTuple):
    """Where the real tokens of a batch are, as one packed call.

    query_index, key_index: rows of the flattened (B * N_q) and (B * N_k) tokens that take part,
        sequence by sequence; None if all do, in order.
    cu_seqlens_q, cu_seqlens_k: (S + 1,), int32.
    max_seqlen_q, max_seqlen_k: longest sequence.
    lengths: (queries, keys) of each sequence, on the host, for the report.
    """

    query_index: Tensor | None
    key_index: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    lengths: tuple[tuple[int, int], ...]


def longspan_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """What transformers calls once per forward pass to make the mask that every layer receives.

    Args:
        batch_size, q_length, kv_length: sizes; kv_length counts the unused tail of static caches.
        q_offset: tokens before the first query; a tensor for static caches.
        kv_offset: tokens before the first key (sliding caches have dropped them).
        mask_function: checked to be causal, with or without a sliding window or packing.
        attention_mask: (B, tokens so far), boolean.
        use_vmap: true if the model lays a mask of its own over the causal one.
        device: where to put a mask that is made from nothing.

    Returns:
        None if every key is a real token, else a mask as the module describes.

    Raises:
        UnsupportedError: a mask that is not causal, or shorter than the tokens so far.
    """
    _check_mask_function(mask_function, use_vmap)
    compiling = torch.compiler.is_compiling()
    if isinstance(q_offset, Tensor):
        if compiling:
            return _traced_static_mask(
                batch_size, q_length, kv_length, q_offset, attention_mask, device
            )
        q_offset = int(q_offset)
    used = min(kv_length, q_offset + q_length - kv_offset)
    if attention_mask is None:
        if used == kv_length:
            return None
        return torch.ones((batch_size, used), dtype=torch.bool, device=device)
    if attention_mask.shape[1] < kv_offset + used:
        raise UnsupportedError(
            f"attention_mask: it has {attention_mask.shape[1]} columns but {kv_offset + used} "
            "tokens were seen, those in the cache included. Pass a mask over all of them."
        )
    mask = attention_mask[:, kv_offset : kv_offset + used].to(torch.bool)
    if not compiling and used == kv_length and bool(mask.all()):
        return None
    return mask


def layout_of_mask(mask: Tensor, n_q: int) -> Layout:
    """The layout of a padded batch from its mask (B, N_k); the queries are its last columns.

    Made once per mask and kept on the tensor, so that the layers of a model share it: finding
    the real tokens costs a device synchronisation.
    """
    if (kept := _recall(mask, n_q)) is not _UNKNOWN:
        return cast(Layout, kept)
    queries = mask[:, mask.shape[1] - n_q :]
    sides = []
    for side in (queries, mask):
        counts = side.sum(1, dtype=torch.int32)
        sides.append((side.flatten().nonzero().squeeze(1), _running_total(counts), counts.tolist()))
    (q_index, cu_q, q_counts), (k_index, cu_k, k_counts) = sides
    layout = Layout(
        q_index, k_index, cu_q, cu_k, max(q_counts), max(k_counts),
        tuple(zip(q_counts, k_counts, strict=True)),
    )  # fmt: skip
    _remember(mask, n_q, layout)
    return layout


def layout_of_documents(position_ids: Tensor, batch: int) -> Layout | None:
    """The documents of a packed batch: one begins wherever position_ids do not rise by one.

    None if every row is one document. Kept on the tensor, as in `layout_of_mask`.
    """
    if (kept := _recall(position_ids, batch)) is not _UNKNOWN:
        return cast(Layout | None, kept)
    layout = None
    starts = position_ids.diff(dim=1) != 1
    if bool(starts.any()):
        rows, n = batch, position_ids.shape[1]
        first = torch.ones((rows, 1), dtype=torch.bool, device=starts.device)
        marks = torch.cat((first, starts.expand(rows, -1)), 1).flatten().nonzero().squeeze(1)
        end = torch.full((1,), rows * n, dtype=marks.dtype, device=marks.device)
        cu = torch.cat((marks, end)).to(torch.int32)
        layout = layout_of_bounds(cu, cu)
    _remember(position_ids, batch, layout)
    return layout


def layout_of_bounds(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Layout:
    """The layout of a batch whose bounds are given; read on the host unless compiling."""
    lengths: tuple[tuple[int, int], ...] = ()
    if not torch.compiler.is_compiling():
        sides = (cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist())
        lengths = tuple(zip(*sides, strict=True))
        max_seqlen_q, max_seqlen_k = max(sides[0]), max(sides[1])
    assert max_seqlen_q is not None, "tracing cannot read the longest sequence from a tensor"
    assert max_seqlen_k is not None, "tracing cannot read the longest sequence from a tensor"
    return Layout(
        None, None, cu_seqlens_q.to(torch.int32), cu_seqlens_k.to(torch.int32),
        max_seqlen_q, max_seqlen_k, lengths,
    )  # fmt: skip


def _check_mask_function(mask_function: Callable[..., Any] | None, use_vmap: bool) -> None:
    odd = ["a mask laid over the causal one"] if use_vmap else []
    if mask_function is not None and not torch.compiler.is_compiling():
        odd += [name for name in mask_parts(mask_function) if not name.startswith(_PLAIN)]
    if odd:
        raise UnsupportedError(
            f"attention_mask: the model asks for {odd[0]!r}, which is not causal attention over "
            "padded or packed tokens. Only causal models and inputs are supported; leave this "
            "model or input unpatched."
        )


def _traced_static_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Tensor,
    attention_mask: Tensor | None,
    device: torch.device | str,
) -> Tensor:
    """The uint8 form: one column for each key of a static cache, without reading a value."""
    columns = torch.arange(kv_length, device=device)
    end = q_offset + q_length
    mask = (columns < end).expand(batch_size, -1)
    if attention_mask is not None:
        given = attention_mask[:, :kv_length].to(torch.bool)
        padding = kv_length - given.shape[1]
        mask = mask & torch.nn.functional.pad(given, (0, padding))
        queries = (columns >= q_offset) & (columns < end)
        torch._assert_async(
            (mask | ~queries).all(),
            "attention_mask hides a query token in a compiled step with a static cache; run the "
            "prefill of padded batches without torch.compile",
        )
    return mask.to(torch.uint8)


def _remember(tensor: Tensor, key: int, layout: Layout | None) -> None:
    if not tensor.is_inference():  # these do not count their changes in place
        tensor._longspan_layout = (tensor._version, key, layout)  # type: ignore[attr-defined]


def _recall(tensor: Tensor, key: int) -> object:
    kept = getattr(tensor, "_longspan_layout", None)
    if kept is None or kept[:2] != (tensor._version, key):
        return _UNKNOWN
    return kept[2]


def _running_total(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
