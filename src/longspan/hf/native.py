"""Models whose own attention is a mechanism: it stays on, and can be replaced inside a block."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import LongspanWarning
from ..exact.config import ExactConfig
from .patching import Patch, patch
from .positions import without_positions

__all__ = ["NativeAttention", "native_attention"]

_ATTRIBUTE = "_longspan_native"


class NativeAttention:
    """Keeps a transformers model under the mechanism it was trained with.

    Args:
        model: gets the mechanism now, and an attribute by which `native_attention` finds this.
        config: of the mechanism. Exact attention needs no patch.
        no_positions: take the model's positions out for good: it was trained without.
        learned: what the mechanism learned (gates), by the name of the parameter in the patched
            model; put in again whenever the mechanism is.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        *,
        no_positions: bool,
        learned: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.config, self._learned = model, config, dict(learned or {})
        if no_positions:
            self._positions = without_positions(model)
            self._positions.__enter__()
        self._patch: Patch | None = None
        self._apply()
        object.__setattr__(model, _ATTRIBUTE, self)

    def _apply(self) -> None:
        if isinstance(self.config, ExactConfig):
            return
        with warnings.catch_warnings():
            # "trained with softmax": this model was not
            warnings.simplefilter("ignore", LongspanWarning)
            self._patch = patch(self.model, self.config)
        self._put_back_learned()

    def _put_back_learned(self) -> None:
        for name, parameter in self.model.named_parameters():
            if name in self._learned:
                parameter.data.copy_(self._learned[name])

    @contextmanager
    def replaced(self, config: Any, layers: Any = "all") -> Iterator[Patch]:
        """The model with other settings in some layers; the others keep their own attention."""
        if self._patch is not None:
            self._patch.undo()
        own = self.config
        mapping = {"all": config} if layers == "all" else {"all": own, layers: config}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LongspanWarning)
                report = patch(self.model, None, mapping)
            self._put_back_learned()
            with report:
                yield report
        finally:
            self._apply()


def native_attention(model: nn.Module) -> NativeAttention | None:
    """The keeper of a model's own attention; None for ordinary models."""
    return getattr(model, _ATTRIBUTE, None)
