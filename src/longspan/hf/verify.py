"""Check that a patched model really dispatches: run two tokens and count."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import LongspanError, PatchError
from .report import Route

__all__ = ["verify_dispatch"]


def verify_dispatch(model: nn.Module, routes: list[Route]) -> None:
    """Run two tokens through the model, in eval mode, and require a call of every layer.

    Raises:
        PatchError: the model cannot run two tokens, or some layer never called the dispatcher.
        UnsupportedError: it asks for something that longspan cannot honour.
    """
    modes = {module: module.training for module in model.modules()}
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    tokens = torch.zeros((1, 2), dtype=torch.int64, device=embedding.weight.device)
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    except LongspanError:
        raise
    except Exception as error:
        raise PatchError(
            f"model: {type(model).__name__} failed on two tokens of input_ids while the patch was "
            f"checked: {error} Mend the cause; if the model only needs other inputs, pass "
            "verify=False."
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    silent = [r.name for r in routes if r.counts.approximate + r.counts.exact == 0]
    if silent:
        raise PatchError(
            f"model: {len(silent)} of {len(routes)} attention layers never called the patched "
            f"attention, first {silent[0]}. The model does not use transformers' attention "
            "interface there; longspan.patched_sdpa reaches every call of torch's SDPA."
        )
