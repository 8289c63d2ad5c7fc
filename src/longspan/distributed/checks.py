"""What the schemes check of a call before ranks exchange anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import LongspanError, ShapeError
from .group import ContextGroup
from .layout import SequenceLayout

__all__ = ["as_batch", "as_packed", "check_layout", "check_local", "describe", "verified"]


def check_layout(name: str, group: ContextGroup, layout: SequenceLayout) -> None:
    """The layout is for this group."""
    if layout.ranks != group.size:
        raise ShapeError(
            f"{name}: layout is for {layout.ranks} ranks but group has {group.size}. Make it with "
            "ranks=group.size."
        )


def check_local(
    name: str,
    group: ContextGroup,
    layout: SequenceLayout,
    tensors: Mapping[str, Tensor],
) -> None:
    """Every tensor is (B, H, n, D) with this rank's n tokens."""
    check_layout(name, group, layout)
    count = layout.length_of(group.rank)
    for label, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.ndim != 4 or tensor.shape[2] != count:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ShapeError(
                f"{name}: {label} is {got}; on rank {group.rank} it must be (B, H, {count}, D), "
                f"its share of {layout.length} tokens in a {layout.kind} layout. Use "
                "SequenceLayout.split."
            )


def describe(tensors: Mapping[str, Tensor | None], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal on all ranks: shapes without the sequence axis, dtypes, settings."""
    call: dict[str, Any] = dict(settings)
    for label, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            call[label] = None if tensor is None else type(tensor).__name__
            continue
        shape = list(tensor.shape)
        if tensor.ndim >= 3:
            shape[2] = -1
        call[label] = f"{shape} {tensor.dtype} on {tensor.device.type}"
        call[f"{label} needs a gradient"] = torch.is_grad_enabled() and tensor.requires_grad
    return call


class verified:
    """Context in which a rank looks at its own inputs; at its end the ranks compare notes.

    An error inside reaches the other ranks as well, so that none of them waits in vain. What they
    compare is the dict `call`, to be filled inside.
    """

    def __init__(self, name: str, group: ContextGroup) -> None:
        self.name, self.group = name, group
        self.call: dict[str, Any] = {}

    def __enter__(self) -> dict[str, Any]:
        return self.call

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: Any
    ) -> None:
        if error is None:
            self.group.verify(self.name, self.call)
        elif isinstance(error, LongspanError):
            self.group.report(self.name, str(error))


def as_batch(tensor: Tensor) -> Tensor:
    """Packed (n, H, D) as (1, H, n, D), a view."""
    return tensor.transpose(0, 1).unsqueeze(0)


def as_packed(tensor: Tensor) -> Tensor:
    """(1, H, n, D) as packed (n, H, D), a view."""
    return tensor.squeeze(0).transpose(0, 1)
