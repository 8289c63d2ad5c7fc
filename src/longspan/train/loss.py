"""The model with its loss, as one module: what accelerate prepares and torch compiles."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.transformer import Transformer
from .batches import IGNORED

__all__ = ["LossModel", "head_loss"]


class LossModel(nn.Module):
    """Mean loss in nats of a batch.

    Args:
        model: kept in float32.
        dtype: of matrix products and attention; bfloat16 uses autocast.

    Compiling is done block by block: blocks are alike, so that one compilation serves all.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.head_loss: Any = head_loss

    def compile_parts(self) -> None:
        """Use torch.compile on each block and on the loss."""
        for block in self.model.blocks:
            block.compile(dynamic=False)
        self.head_loss = torch.compile(head_loss, dynamic=False)

    def uncompile(self) -> None:
        """Back to plain torch."""
        for block in self.model.blocks:
            block._compiled_call_impl = None
        self.head_loss = head_loss

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """(B, N) twice, to a float32 scalar."""
        is_half = self.dtype is not torch.float32
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=is_half):
            hidden = self.model.hidden(inputs)
            loss: Tensor = self.head_loss(hidden, self.model.head.weight, targets)
        return loss


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of logits hidden @ weight^T over the targets that are not IGNORED."""
    logits = F.linear(hidden, weight).flatten(0, -2)
    return F.cross_entropy(logits.float(), targets.flatten(), ignore_index=IGNORED)
