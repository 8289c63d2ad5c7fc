"""Batches and losses of language models whose sequences are spread over ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, ShapeError, UnsupportedError
from .group import ContextGroup
from .layout import SequenceLayout

__all__ = ["IGNORED", "ShardedBatch", "global_mean", "next_token_targets", "shard_batch"]

IGNORED = -100  # targets with this value have no loss
_REDUCTIONS = ("sum", "mean")


class ShardedBatch(NamedTuple):
    """This rank's tokens of a batch, and what says where they belong.

    input_ids: (B, n) int64.
    position_ids: (B, n) int64, counted from the start of each token's document.
    targets: (B, n) int64, the token after each in the whole sequence, or IGNORED. To a
        transformers model they are `shift_labels`.
    key_lengths: (B,) int32 of the whole sequence, or None without padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    key_lengths: Tensor | None


def shard_batch(
    input_ids: Tensor,
    layout: SequenceLayout,
    rank: int,
    *,
    attention_mask: Tensor | None = None,
    targets: Tensor | None = None,
) -> ShardedBatch:
    """The part of a batch that a rank holds.

    Args:
        input_ids: (B, N), whole sequences, equal on all ranks. With `layout.cu_seqlens` B is 1: the
            packed documents.
        layout: of N tokens.
        rank: in the group.
        attention_mask: (B, N), 1 for tokens and 0 for padding on the right; None without padding.
        targets: (B, N), for the whole sequence, already shifted; default: `next_token_targets`.

    Raises:
        ShapeError: shapes do not fit the layout.
        UnsupportedError: padding that is not on the right.

    Semantics:
        Targets are made before the split: the last token of a rank predicts the first of the next
        chunk, and the last of a document predicts nothing.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] != layout.length:
        raise ShapeError(
            f"shard_batch: input_ids is {tuple(input_ids.shape)}; it must be (B, {layout.length}), "
            "the tokens of whole sequences. Make the layout with length=input_ids.shape[1]."
        )
    if layout.cu_seqlens is not None and input_ids.shape[0] != 1:
        raise ShapeError(
            f"shard_batch: input_ids has {input_ids.shape[0]} rows, but layout has packed "
            "documents; allowed is one row. Put the documents one after another."
        )
    lengths = None if attention_mask is None else _right_padding(attention_mask, input_ids)
    if targets is None:
        targets = next_token_targets(input_ids, cu_seqlens=layout.cu_seqlens, key_lengths=lengths)
    positions = layout.position_ids(rank, input_ids.device).expand(input_ids.shape[0], -1)
    return ShardedBatch(
        layout.split(input_ids, rank, 1), positions, layout.split(targets, rank, 1), lengths
    )


def next_token_targets(
    input_ids: Tensor,
    *,
    cu_seqlens: tuple[int, ...] | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """(B, N) int64: the token after each, or IGNORED at the end of a row or document.

    Args:
        input_ids: (B, N), whole sequences.
        cu_seqlens: bounds of packed documents.
        key_lengths: (B,), tokens that are no padding.
    """
    targets = F.pad(input_ids[:, 1:], (0, 1), value=IGNORED)
    if cu_seqlens is not None:
        ends = [mark - 1 for mark in cu_seqlens if mark > 0]
        targets[:, ends] = IGNORED
    if key_lengths is not None:
        index = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        targets = targets.masked_fill(index >= key_lengths[:, None], IGNORED)
    return targets


def global_mean(
    total: Tensor,
    count: Tensor,
    group: ContextGroup | dist.ProcessGroup | None,
    *,
    reduction: str = "sum",
) -> Tensor:
    """The mean over all ranks of a loss of which each rank has a sum; the one-device loss.

    Args:
        total: scalar, the sum of this rank's losses; differentiable. 0 where it has none.
        count: scalar, how many there are.
        group: the ranks to sum over: those that share sequences, and those with other sequences of
            the same step (for a mesh, its flattened dimensions).
        reduction: how gradients of parameters are combined over these ranks afterwards: "sum", or
            "mean", as DistributedDataParallel and FSDP do. Their mean would make them as many times
            too small as there are ranks; with "mean" the gradient is multiplied accordingly.

    Returns:
        A scalar of the dtype of `total`, equal on all ranks; NaN if no rank has a token. Its
        gradient is this rank's share.

    Raises:
        ConfigError: unknown `reduction`.

    Example:
        logits = model(batch.input_ids, ...).logits
        losses = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
        loss = global_mean(losses, (batch.targets != IGNORED).sum(), group, reduction="mean")
    """
    if reduction not in _REDUCTIONS:
        raise ConfigError(
            f"global_mean: reduction is {reduction!r}; it must be 'sum' or 'mean', whichever is "
            "done to gradients over the ranks of `group`."
        )
    context = group if isinstance(group, ContextGroup) else None
    process_group = context.group if context is not None else group
    wide = torch.float64 if total.dtype is torch.float64 else torch.float32
    both = torch.stack([total.detach().to(torch.float64), count.detach().to(torch.float64)])
    dist.all_reduce(both, group=process_group)
    mean, tokens = both[0] / both[1], both[1]
    ranks = dist.get_world_size(process_group) if reduction == "mean" else 1  # type: ignore[arg-type]
    share = total.to(wide) * (ranks / tokens).to(wide)
    return (share + (mean.to(wide) - share).detach()).to(total.dtype)


def _right_padding(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    if attention_mask.shape != input_ids.shape:
        raise ShapeError(
            f"shard_batch: attention_mask is {tuple(attention_mask.shape)}; it must be "
            f"{tuple(input_ids.shape)}, as input_ids. Pass the mask of whole sequences."
        )
    mask = attention_mask != 0
    lengths = mask.sum(-1, dtype=torch.int32)
    index = torch.arange(mask.shape[1], device=mask.device)
    if not bool((mask == (index < lengths[:, None])).all()):
        raise UnsupportedError(
            "shard_batch: attention_mask has padding that is not on the right. Pad on the right, "
            "or pack the documents and give the layout cu_seqlens."
        )
    return lengths
