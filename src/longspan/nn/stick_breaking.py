"""Stick-breaking self-attention as a layer, with the options of the authors' models."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, nearest_name
from ..stick_breaking.api import StickBreakingOutput, stick_breaking_attention_with_remainder
from ..stick_breaking.config import StickBreakingConfig
from ..stick_breaking.state import StickBreakingChunk, StickBreakingState
from ..types import Impl

__all__ = ["StickBreakingAttention"]

_REMAINDERS = ("drop", "value", "embedding")
_NORMS = ("rms", "group")


class StickBreakingAttention(nn.Module):
    """Multi-head stick-breaking self-attention: project, attend, norm, project back.

    The authors' published models (arXiv:2410.17980 and its code) use remainder="embedding" and
    output_norm="group".

    Args:
        width: size of the input and output vectors.
        heads: query heads.
        kv_heads: key and value heads; default `heads`. Must divide `heads`.
        head_dim: size of one head; default width // heads.
        config: window, early stop and so on.
        remainder: what the rest of the stick goes to: "drop", "value" (of the own token) or
            "embedding" (a learned vector per head, zero at the start). Default: what `config`
            says.
        output_norm: None, "rms" (root mean square of each head) or "group" (mean and variance of
            each head, as in the authors' models), before the output projection.
        qk_norm: normalise queries and keys (root mean square of each head).
        logit_bias: None, or the initial value of a learned number per head that is added to its
            scores; below zero, a head starts by looking further back.
        bias: give the projections a bias.
        impl: as in `stick_breaking_attention`.
        device, dtype: of the parameters.

    Raises:
        ConfigError: sizes or options that do not fit together.

    Example:
        >>> layer = StickBreakingAttention(64, 4, remainder="embedding", output_norm="group")
        >>> layer(torch.randn(1, 10, 64)).shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        config: StickBreakingConfig = StickBreakingConfig(),
        remainder: str | None = None,
        output_norm: str | None = None,
        qk_norm: bool = False,
        logit_bias: float | None = None,
        bias: bool = False,
        impl: Impl | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        self.head_dim = _head_dim(width, heads, self.kv_heads, head_dim)
        self.config, self.remainder = _remainder(config, remainder)
        if output_norm is not None and output_norm not in _NORMS:
            raise ConfigError(
                f"StickBreakingAttention: output_norm is {output_norm!r}. "
                f"{nearest_name(str(output_norm), _NORMS)} Use None for no norm."
            )
        self.output_norm, self.impl = output_norm, impl
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, kv_inner = heads * self.head_dim, self.kv_heads * self.head_dim
        self.query = nn.Linear(width, inner, bias=bias, **made)
        self.key = nn.Linear(width, kv_inner, bias=bias, **made)
        self.value = nn.Linear(width, kv_inner, bias=bias, **made)
        self.output = nn.Linear(inner, width, bias=bias, **made)
        self.query_norm = nn.RMSNorm(self.head_dim, **made) if qk_norm else None
        self.key_norm = nn.RMSNorm(self.head_dim, **made) if qk_norm else None
        self.norm: nn.Module | None = None
        if output_norm == "rms":
            self.norm = nn.RMSNorm(self.head_dim, **made)
        elif output_norm == "group":
            self.norm = nn.GroupNorm(heads, inner, **made)
        self.rest_vector: nn.Parameter | None = None
        if self.remainder == "embedding":
            self.rest_vector = nn.Parameter(torch.zeros(heads, self.head_dim, **made))
        self.logit_bias: nn.Parameter | None = None
        if logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.full((heads,), float(logit_bias), **made))

    def forward(self, hidden: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """A whole sequence.

        Args:
            hidden: (B, N, width).
            key_lengths: (B,), int32, valid tokens of each batch entry; the rest is padding on the
                right.

        Returns:
            (B, N, width).
        """
        query, key, value = self.project(hidden)
        part = self._attend(query, key, value, query_offset=0, key_lengths=key_lengths)
        return self._finish(part)

    def chunk(self, hidden: Tensor, state: StickBreakingState | None = None) -> StickBreakingChunk:
        """The next tokens of a stream; chunks of any size equal the whole.

        Args:
            hidden: (B, n, width).
            state: what the call before returned; None starts a stream.

        Returns:
            StickBreakingChunk(output (B, n, width), final_state).
        """
        query, key, value = self.project(hidden)
        state = StickBreakingState(self.config) if state is None else state
        longer = state.append(key, value)
        assert longer.key is not None
        assert longer.value is not None
        part = self._attend(
            query, longer.key, longer.value, query_offset=state.num_cached, key_lengths=None
        )
        return StickBreakingChunk(self._finish(part), longer.trim())

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, H, N, D), key and value (B, H_kv, N, D)."""
        query = self.query(hidden).unflatten(-1, (self.heads, self.head_dim))
        key = self.key(hidden).unflatten(-1, (self.kv_heads, self.head_dim))
        value = self.value(hidden).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def extra_repr(self) -> str:
        """What `print(module)` shows besides the parts."""
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
            f"remainder={self.remainder!r}, output_norm={self.output_norm!r}, config={self.config}"
        )

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        query_offset: int,
        key_lengths: Tensor | None,
    ) -> StickBreakingOutput:
        return stick_breaking_attention_with_remainder(
            query,
            key,
            value,
            is_causal=True,
            enable_gqa=True,
            query_offset=query_offset,
            key_lengths=key_lengths,
            logit_bias=self.logit_bias,
            config=self.config,
            impl=self.impl,
        )

    def _finish(self, part: StickBreakingOutput) -> Tensor:
        heads = part.output.transpose(1, 2)  # (B, N, H, D)
        if self.rest_vector is not None:
            rest = torch.exp(part.log_rest).transpose(1, 2).unsqueeze(-1)
            heads = (heads.to(rest.dtype) + rest * self.rest_vector).to(heads.dtype)
        if isinstance(self.norm, nn.GroupNorm):
            norm = self.norm
            tokens = heads.flatten(0, 1).flatten(1)  # (B * N, H * D): a group is a head of a token
            flat = F.group_norm(tokens, norm.num_groups, norm.weight, norm.bias, norm.eps)
            return self.output(flat.view(*heads.shape[:2], -1))  # type: ignore[no-any-return]
        if self.norm is not None:
            heads = self.norm(heads)
        return self.output(heads.flatten(2))  # type: ignore[no-any-return]


def _head_dim(width: int, heads: int, kv_heads: int, head_dim: int | None) -> int:
    for name, count in (("width", width), ("heads", heads), ("kv_heads", kv_heads)):
        if count < 1:
            raise ConfigError(f"StickBreakingAttention: {name} is {count}; it must be at least 1.")
    if heads % kv_heads:
        raise ConfigError(
            f"StickBreakingAttention: kv_heads is {kv_heads}, which does not divide heads = "
            f"{heads}. Use a divisor, or None for as many."
        )
    if head_dim is None and width % heads:
        raise ConfigError(
            f"StickBreakingAttention: heads is {heads}, which does not divide width = {width}. "
            "Use a divisor, or pass head_dim."
        )
    return width // heads if head_dim is None else head_dim


def _remainder(
    config: StickBreakingConfig, remainder: str | None
) -> tuple[StickBreakingConfig, str]:
    """The config for the function and the module's own choice."""
    if remainder is None:
        return config, config.remainder
    if remainder not in _REMAINDERS:
        raise ConfigError(
            f"StickBreakingAttention: remainder is {remainder!r}. "
            f"{nearest_name(str(remainder), _REMAINDERS)}"
        )
    if config.remainder not in ("drop", remainder):
        raise ConfigError(
            f"StickBreakingAttention: remainder is {remainder!r} but config.remainder is "
            f"{config.remainder!r}. Say it in one place."
        )
    kept = "value" if remainder == "value" else "drop"
    return dataclasses.replace(config, remainder=kept), remainder
