"""A patched transformers model as a stream: next tokens in, logits out, a bounded cache between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.stream import fingerprint
from .cache import make_cache
from .cache_file import cache_parts, describe, restore_cache

__all__ = ["PatchedStream"]


class PatchedStream:
    """A patched model behind `longspan.models.stream.StreamModel`.

    Args:
        model: patched, with Infini-attention or a window in every full-attention layer.

    Raises:
        PatchError: it is not patched.
        ConfigError: a layer keeps the keys of the whole text.

    Example:
        >>> with convert_infini(model, segment_length=16):
        ...     stream = PatchedStream(model)
        ...     stream.read(input_ids[:, :40]).shape
        torch.Size([259])
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = make_cache(model)
        cache_parts(self._cache)  # refuses what is not bounded

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        weight: Tensor = self._model.get_input_embeddings().weight
        return weight.device

    @torch.no_grad()
    def read(self, token_ids: Tensor) -> Tensor:
        """Logits (vocab_size,) after the last of these tokens (1, n)."""
        out = self._model(
            input_ids=token_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        logits: Tensor = out.logits[0, -1]
        return logits.float()

    def parts(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and numbers of the cache."""
        return cache_parts(self._cache)

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """Take over what `parts` gave."""
        self._cache = restore_cache(self._model, tensors, numbers)

    def fingerprint(self) -> str:
        """Of weights, gates and settings."""
        return fingerprint(self._model, describe(self._model))
