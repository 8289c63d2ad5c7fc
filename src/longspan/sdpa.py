"""`patched_sdpa`: run any code that calls torch's SDPA under a mechanism, undone on exit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .mechanisms import mechanism_of_config

__all__ = ["patched_sdpa"]


class patched_sdpa(TorchFunctionMode):  # a context manager, named like a function on purpose
    """Context in which `torch.nn.functional.scaled_dot_product_attention` runs a mechanism.

    Thread-local, stackable, leaves nothing behind; also reaches calls inside functions compiled
    with `fullgraph=True`. Shapes as torch accepts them: (..., N, D) with any leading axes. What
    the mechanism cannot honour (a general `attn_mask`, dropout) raises instead of being ignored.

    Not reached: `torch.nn.MultiheadAttention`, whose own functional hides the inner call from
    every TorchFunctionMode.

    Args:
        config: settings of a mechanism, e.g. `WindowConfig(window=1024)`.
        **settings: handed to the mechanism on each call, e.g. `seed=0` or `impl="eager"`.

    Attributes:
        calls: number of calls that were redirected since entry.

    Raises:
        ConfigError: `config` belongs to no mechanism.

    Example:
        >>> q = torch.randn(1, 2, 64, 16)
        >>> with patched_sdpa(WindowConfig(window=8)) as patch:
        ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        >>> patch.calls
        1
    """

    def __init__(self, config: Any, **settings: Any) -> None:
        self._function = mechanism_of_config(config).function
        super().__init__()
        self.config = config
        self.settings = settings
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._redirect(*args, **(kwargs or {}))

    def _redirect(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        lead = query.shape[:-2]
        if query.ndim != 4:
            query, key, value = _as_4d(query), _as_4d(key), _as_4d(value)
            if attn_mask is not None and attn_mask.ndim == len(lead) + 2:
                attn_mask = _as_4d(attn_mask)
        elif key.shape[0] != query.shape[0] or value.shape[0] != query.shape[0]:
            key = key.expand(query.shape[0], *key.shape[1:])
            value = value.expand(query.shape[0], *value.shape[1:])
        output = self._function(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            config=self.config,
            **self.settings,
        )
        output = output if isinstance(output, Tensor) else output.output
        return output.reshape(*lead, *output.shape[-2:])


def _as_4d(tensor: Tensor) -> Tensor:
    """(..., N, D) to (B, H, N, D): 2-D and 3-D get leading ones, more axes fold into B."""
    if tensor.ndim < 4:
        return tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape))
    return tensor.flatten(0, tensor.ndim - 4)
