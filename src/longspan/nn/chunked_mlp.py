"""A feed-forward layer that runs over a long sequence a piece at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError

__all__ = ["ChunkedMLP"]


class ChunkedMLP(nn.Module):
    """Any layer that treats tokens one by one, over chunks of them (arXiv:2305.19370).

    The inner activations of a feed-forward layer are the largest tensors of a transformer at great
    length: mlp_width / width times the residual stream, several of them kept for the backward.
    Here only one chunk of them exists at a time; the backward computes each chunk again.

    Args:
        mlp: maps (..., n, width) to (..., n, width'), each token on its own.
        chunk_size: tokens at a time.

    Raises:
        ConfigError: chunk_size is below 1.

    Semantics:
        Equals `mlp` up to the rounding of matrix products of another height. Parameters are those
        of `mlp`, under `mlp.`. Gradient checkpointing around it would compute it a third time.

    Cost:
        Memory of the inner activations of chunk_size tokens, forward and backward; a third more
        time when training.

    Example:
        >>> from longspan.nn import ChunkedMLP
        >>> mlp = ChunkedMLP(torch.nn.Linear(8, 8), chunk_size=16)
        >>> mlp(torch.randn(1, 100, 8)).shape
        torch.Size([1, 100, 8])
    """

    def __init__(self, mlp: nn.Module, chunk_size: int = 4096) -> None:
        super().__init__()
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
            raise ConfigError(
                f"ChunkedMLP: chunk_size is {chunk_size!r}; it must be an int >= 1, the tokens "
                "that run at a time. Use e.g. 4096."
            )
        self.mlp = mlp
        self.chunk_size = chunk_size

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., N, width) to (..., N, width')."""
        if hidden.shape[-2] <= self.chunk_size and not torch.is_grad_enabled():
            return self.mlp(hidden)  # type: ignore[no-any-return]
        chunks = torch.split(hidden, self.chunk_size, dim=-2)
        if torch.is_grad_enabled():
            outputs = [checkpoint(self.mlp, chunk, use_reentrant=False) for chunk in chunks]
        else:
            outputs = [self.mlp(chunk) for chunk in chunks]
        return torch.cat(outputs, dim=-2)

    def extra_repr(self) -> str:
        """What `print(module)` shows besides the parts."""
        return f"chunk_size={self.chunk_size}"
