"""Loss by position and by length of context, beyond what a model was trained on.

The same tokens are scored at every length: windows of the longest length are cut into equal parts,
and each part is read by itself. What changes between lengths is how much context a token has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..models.transformer import Transformer
    from ..train.tokens import TokenFile

__all__ = ["book_windows", "position_edges", "position_losses", "window_losses"]

_TOKENS_AT_ONCE = 1 << 16  # read by the body in one call, if windows allow
_LOGITS_AT_ONCE = 1 << 13  # rows of logits in memory


def book_windows(tokens: TokenFile, *, length: int, per_book: int) -> tuple[Tensor, list[str]]:
    """The first windows of each book that is long enough.

    Args:
        tokens: the corpus; each document starts with a mark, which the first window includes.
        length: tokens that are scored per window.
        per_book: windows per book, one after the other.

    Returns:
        (W, length + 1) int64 ids, each with the target of its last token, and the book of each.

    Raises:
        ConfigError: no book is long enough.
    """
    import numpy as np

    rows, names = [], []
    for index, name in enumerate(tokens.names):
        ids = np.asarray(tokens.document(index)).astype(np.int64)
        for window in range(min(per_book, (len(ids) - 1) // length)):
            rows.append(torch.from_numpy(ids[window * length : (window + 1) * length + 1]))
            names.append(name)
    if not rows:
        longest = max(len(tokens.document(i)) for i in range(len(tokens.names)))
        raise ConfigError(
            f"book_windows: length is {length}, but the longest book has {longest} tokens. "
            "Allowed: a length that fits into one book. Ask for less, or give longer books."
        )
    return torch.stack(rows), names


@torch.no_grad()
def window_losses(
    model: Transformer,
    windows: Tensor,
    *,
    length: int,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Loss of every token when `length` tokens are read at a time.

    Args:
        model: the reference transformer.
        windows: (W, longest + 1) of `book_windows`; longest must be a multiple of `length`.
        length: tokens read at a time.
        dtype: of the body; logits and losses are float32.
        progress: called with the share that was just done.

    Returns:
        (W, longest), float32, nats, on the CPU.

    Raises:
        ConfigError: the windows cannot be cut into parts of `length`.
    """
    longest = windows.shape[1] - 1
    if length < 1 or longest % length:
        raise ConfigError(
            f"window_losses: length is {length}, which does not divide the windows' {longest} "
            "tokens. Use a divisor, e.g. a power of two with windows of a power of two."
        )
    device = model.embedding.weight.device
    inputs = windows[:, :-1].reshape(-1, length)
    targets = windows[:, 1:].reshape(-1, length)
    at_once = max(1, _TOKENS_AT_ONCE // length)
    parts = []
    for start in range(0, len(inputs), at_once):
        ids = inputs[start : start + at_once].to(device)
        wanted = targets[start : start + at_once].to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            hidden = model.hidden(ids)
        parts.append(_losses(model, hidden, wanted).cpu())
        if progress:
            progress(len(ids) / len(inputs))
    return torch.cat(parts).reshape(len(windows), longest)


def _losses(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    flat, wanted = hidden.flatten(0, 1), targets.flatten()
    weight = model.head.weight.float()
    losses = [
        F.cross_entropy(rows.float() @ weight.mT, goal, reduction="none")
        for rows, goal in zip(
            torch.split(flat, _LOGITS_AT_ONCE), torch.split(wanted, _LOGITS_AT_ONCE), strict=True
        )
    ]
    return torch.cat(losses).view_as(targets)


def position_edges(length: int, *, per_octave: int = 2) -> list[int]:
    """Edges of buckets that grow geometrically: 0, 16, 22, 32, ... up to `length`."""
    edges = [0]
    step = 0
    while edges[-1] < length:
        edge = min(length, round(16 * 2 ** (step / per_octave)))
        if edge > edges[-1]:
            edges.append(edge)
        step += 1
    return edges


def position_losses(losses: Tensor, edges: Sequence[int]) -> list[dict[str, Any]]:
    """Mean loss of each bucket of positions, and its standard error over windows.

    Args:
        losses: (W, length) of `window_losses` at the whole length.
        edges: of `position_edges`.

    Returns:
        One {"from", "to", "loss", "error"} per bucket; `error` is None for a single window.
    """
    buckets = []
    for low, high in itertools.pairwise(edges):
        means = losses[:, low:high].double().mean(1)
        error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else None
        buckets.append({"from": low, "to": high, "loss": means.mean().item(), "error": error})
    return buckets
