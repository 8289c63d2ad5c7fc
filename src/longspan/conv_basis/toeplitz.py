"""The engine on its own: softmax attention whose scores depend on the lag."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError
from ..types import AttentionOutput

__all__ = ["toeplitz_attention", "toeplitz_attention_with_lse"]


def toeplitz_attention(
    log_kernel: Tensor,
    value: Tensor,
    *,
    is_causal: bool = True,
    num_queries: int | None = None,
    query_offset: int = 0,
    key_offset: Tensor | None = None,
    row_offset: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Softmax attention with scores c(i - j) + key_offset_j, in almost linear time.

    The row i stands at key index p = i + query_offset; its lag to key j is p - j.
    output_i = sum_j w_ij v_j / sum_j w_ij, w_ij = exp(c_g(j)(p - j) + key_offset_j). Relative
    position biases (ALiBi, T5) without content, Toeplitz layers and far-field tails have this form.

    Args:
        log_kernel: (B, H, L) or, with groups, (B, H, G, L): c in nats, float16 to float64; -inf
            hides a lag. Causal: entry l is lag l. Otherwise L is odd and the middle entry is
            lag 0, entries before it are keys to the right. Lags beyond it are hidden.
        value: (B, H_kv, N_k, D_v), H a multiple of H_kv.
        is_causal: keys after p are hidden. Default: True.
        num_queries: rows. Default: N_k.
        query_offset: index, in keys, of the first row.
        key_offset: (B, H, N_k), nats; -inf hides a key.
        row_offset: (B, H, N_q), nats: enters lse only, the softmax does not see it.
        groups: (B, H, G), int64, nondecreasing: first key of each group, whose keys use
            log_kernel[:, :, g]. The first is taken as 0; N_k or more: an empty group.

    Returns:
        (B, H, N_q, D_v) in the dtype of `value`; rows that see no key are zero.

    Raises:
        ShapeError: tensors do not fit together, or L is even without is_causal.

    Semantics:
        Computed in float32 (float64 if log_kernel is); a head in which float32 cannot hold the
        range inside a block of rows is computed in float64, and blocks that float64 cannot
        hold weight by weight. Gradients to log_kernel, key_offset, row_offset (through lse) and
        value are exact.

    Cost:
        Time O(N D_v (log B + N / B)) for blocks of B rows (256 to 2048, growing with N), in
        matrix products; nearly independent of G up to N / B. One device synchronisation.

    Example:
        >>> slope = torch.tensor([0.1, 0.5])
        >>> kernel = -slope[None, :, None] * torch.arange(100.0)
        >>> toeplitz_attention(kernel, torch.randn(1, 2, 100, 8)).shape
        torch.Size([1, 2, 100, 8])
    """
    return _run("toeplitz_attention", log_kernel, value, is_causal, num_queries, query_offset,
                key_offset, row_offset, groups).output  # fmt: skip


def toeplitz_attention_with_lse(
    log_kernel: Tensor,
    value: Tensor,
    *,
    is_causal: bool = True,
    num_queries: int | None = None,
    query_offset: int = 0,
    key_offset: Tensor | None = None,
    row_offset: Tensor | None = None,
    groups: Tensor | None = None,
) -> AttentionOutput:
    """`toeplitz_attention` and the log-sum-exp of its scores, to merge with other keys.

    Args:
        log_kernel, value, is_causal, num_queries, query_offset, key_offset, row_offset, groups:
            as in `toeplitz_attention`.

    Returns:
        AttentionOutput: output (B, H, N_q, D_v), lse (B, H, N_q) in float32 or float64, natural
        log, -inf in rows that see no key.

    Raises:
        ShapeError: as `toeplitz_attention`.

    Cost:
        As `toeplitz_attention`.

    Example:
        >>> toeplitz_attention_with_lse(torch.zeros(1, 2, 9), torch.randn(1, 2, 9, 4)).lse[0, 0, 8]
        tensor(2.1972)
    """
    return _run("toeplitz_attention_with_lse", log_kernel, value, is_causal, num_queries,
                query_offset, key_offset, row_offset, groups)  # fmt: skip


def _run(
    name: str, log_kernel: Tensor, value: Tensor, is_causal: bool, num_queries: int | None,
    query_offset: int, key_offset: Tensor | None, row_offset: Tensor | None,
    groups: Tensor | None,
) -> AttentionOutput:  # fmt: skip
    from .ops import toeplitz_fwd

    if value.ndim != 4:
        raise ShapeError(
            f"{name}: value has shape {tuple(value.shape)}; it must be (B, H_kv, N_k, D_v). "
            "Add or merge axes."
        )
    wanted = 3 if groups is None else 4
    if log_kernel.ndim != wanted or log_kernel.shape[0] != value.shape[0]:
        raise ShapeError(
            f"{name}: log_kernel has shape {tuple(log_kernel.shape)}, value has "
            f"{tuple(value.shape)}; it must be (B, H, L), or (B, H, G, L) with groups, with the "
            "batch of value. Expand or unsqueeze it."
        )
    kernel = log_kernel.unsqueeze(2) if groups is None else log_kernel
    batch, heads, count, length = kernel.shape
    n_k = value.shape[2]
    n_q = n_k if num_queries is None else num_queries
    if value.shape[1] == 0 or heads % value.shape[1]:
        raise ShapeError(
            f"{name}: log_kernel has {heads} heads and value has {value.shape[1]}; the first must "
            "be a multiple of the second. Repeat or drop heads."
        )
    if length == 0 or (not is_causal and length % 2 == 0):
        raise ShapeError(
            f"{name}: log_kernel has {length} lags with is_causal={is_causal}; allowed is 1 or "
            "more, and an odd number when not causal (lag 0 in the middle). Pad it with -inf."
        )
    if groups is None:
        groups = torch.zeros((batch, heads, 1), dtype=torch.int64, device=value.device)
    for label, tensor, shape in (("groups", groups, (batch, heads, count)),
                                 ("key_offset", key_offset, (batch, heads, n_k)),
                                 ("row_offset", row_offset, (batch, heads, n_q))):  # fmt: skip
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ShapeError(
                f"{name}: {label} has shape {tuple(tensor.shape)}; it must be {shape}. Expand it."
            )
    output, lse, _ = toeplitz_fwd(kernel, groups, key_offset, value, None, n_q, bool(is_causal),
                                  query_offset, 0, "auto")  # fmt: skip
    return AttentionOutput(output, lse if row_offset is None else lse + row_offset)
