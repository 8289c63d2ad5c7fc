"""`attention`: one function for all mechanisms; the type of the config picks which."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .mechanisms import MECHANISMS, mechanism_of_config_class

__all__ = ["attention"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **settings: Any,
) -> Any:
    """Attention by the mechanism that `config` belongs to.

    Args:
        query: (B, H, N_q, D).
        key: (B, H_kv, N_k, D).
        value: (B, H_kv, N_k, D_v).
        config: settings of a mechanism, e.g. `WindowConfig(window=1024)`.
        attn_mask, dropout_p, is_causal: as in torch's scaled_dot_product_attention.
        **settings: `scale`, `enable_gqa`, `query_offset`, `key_lengths`, `impl`, and what the
            mechanism's own function takes; handed on unchanged.

    Returns:
        What the mechanism's function returns: (B, H, N_q, D_v) in the dtype of `query`, or its
        NamedTuple where it has a state.

    Raises:
        ConfigError: `config` belongs to no mechanism. Else as the mechanism's function.

    Example:
        >>> q = torch.randn(1, 2, 128, 64)
        >>> attention(q, q, q, WindowConfig(window=32), is_causal=True).shape
        torch.Size([1, 2, 128, 64])
    """
    function = _function_of(type(config))
    return function(query, key, value, attn_mask, dropout_p, is_causal, config=config, **settings)


def _function_of(kind: type) -> Callable[..., Any]:
    """The function of the mechanism with this config class.

    Compiled code cannot trace an import; where the class is, its package has been imported.
    """
    if not torch.compiler.is_compiling():
        return mechanism_of_config_class(kind).function
    package = sys.modules[kind.__module__.rpartition(".")[0]]
    for mechanism in MECHANISMS.values():
        if mechanism.config_name == kind.__name__:
            return getattr(package, f"{mechanism.name}_attention")  # type: ignore[no-any-return]
    return mechanism_of_config_class(kind).function
