"""The parts of the reference transformer: norm, MLP, attention, and a block of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..infini.config import InfiniConfig
from ..infini.rates import write_rates
from ..mechanisms import mechanism_of_config
from ..types import Impl
from .attend import CausalAttention
from .forget import log_gates
from .positions import Rotation, at_least_float32, rotate
from .transformer_config import TransformerConfig

__all__ = ["Attention", "Block", "Documents", "RMSNorm", "SwiGLU"]


class Documents(NamedTuple):
    """Bounds of packed documents: cu_seqlens (S + 1,) int32, length of the longest."""

    cu_seqlens: Tensor
    max_seqlen: int


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Like `x`, in its dtype."""
        wide = at_least_float32(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp_size, bias=False)
        self.up = nn.Linear(config.width, config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., width)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Projections, positions, and the mechanism of this layer between them."""

    def __init__(self, config: TransformerConfig, layer: int, impl: Impl | str) -> None:
        super().__init__()
        inner, kv_inner = (h * config.head_size for h in (config.heads, config.num_kv_heads))
        self.head_size = config.head_size
        self.query = nn.Linear(config.width, inner, bias=False)
        self.key = nn.Linear(config.width, kv_inner, bias=False)
        self.value = nn.Linear(config.width, kv_inner, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)
        norms = config.qk_norm
        self.query_norm = RMSNorm(config.head_size, config.norm_eps) if norms else nn.Identity()
        self.key_norm = RMSNorm(config.head_size, config.norm_eps) if norms else nn.Identity()
        self.forget: nn.Linear | None = None
        if config.positions == "forget":
            self.forget = nn.Linear(config.width, config.num_kv_heads)
            nn.init.zeros_(self.forget.bias)
        self.mechanism = CausalAttention(
            config.attention_of(layer),
            positions=config.positions,
            seed=config.attention_seed + layer,
            impl=impl,
        )
        self.write: nn.Linear | None = None
        own = self.mechanism.config
        if isinstance(own, InfiniConfig) and own.update == "gated_delta":
            self.write = nn.Linear(config.width, 2 * config.num_kv_heads)
            nn.init.zeros_(self.write.bias)
        self.owned: dict[
            str, str
        ] = {}  # keyword of the mechanism -> name of a parameter of this layer
        mechanism = mechanism_of_config(self.mechanism.config)
        if mechanism.has_parameters:
            initial = mechanism.initial_parameters(
                self.mechanism.config, heads=config.heads, kv_heads=config.num_kv_heads,
                head_dim=config.head_size,
            )  # fmt: skip
            for keyword, value in initial.items():
                self.owned[keyword] = f"longspan_{keyword}"
                self.register_parameter(self.owned[keyword], nn.Parameter(value))

    def forward(self, x: Tensor, rotation: Rotation | None, documents: Documents | None) -> Tensor:
        """(B, N, width), or (total, width) with `documents`."""
        log_forget = None if self.forget is None else log_gates(self.forget(x))
        (q, k, v), plain = self._heads(x, rotation)
        if documents is None:
            attended = self.mechanism.whole(q, k, v, log_forget, self._owned(plain))
        else:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))  # (total, H, D)
            plain = {name: tensor.transpose(0, 1) for name, tensor in plain.items()}
            log_forget = None if log_forget is None else log_forget.mT
            attended = self.mechanism.packed(
                q, k, v, *documents, log_forget, self._owned(plain)
            ).transpose(0, 1)
        return self._join(attended)

    def stream(self, x: Tensor, rotation: Rotation | None, state: Any) -> tuple[Tensor, Any]:
        """The next n tokens, (B, n, width), after `state`."""
        log_forget = None if self.forget is None else log_gates(self.forget(x))
        heads, plain = self._heads(x, rotation)
        attended, state = self.mechanism.stream(*heads, state, log_forget, self._owned(plain))
        return self._join(attended), state

    def _owned(self, plain: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this layer's mechanism takes besides queries, keys and values."""
        learned = {keyword: getattr(self, name) for keyword, name in self.owned.items()}
        return {**plain, **learned}

    def _heads(
        self, x: Tensor, rotation: Rotation | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
        """(..., H, N, D), (..., H_kv, N, D) twice; what the mechanism wants besides, by keyword."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_size)).transpose(-3, -2)
            for project in (self.query, self.key, self.value)
        )
        q, k = self.query_norm(q), self.key_norm(k)
        plain = {} if self.write is None else write_rates(self.write(x))
        if rotation is None:
            return (q, k, v), plain
        if self.mechanism.takes_plain:
            plain |= {"memory_query": q, "memory_key": k}
        return (rotate(q, rotation), rotate(k, rotation), v), plain

    def _join(self, attended: Tensor) -> Tensor:
        return self.out(attended.transpose(-3, -2).flatten(-2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: TransformerConfig, layer: int, impl: Impl | str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, layer, impl)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rotation: Rotation | None, documents: Documents | None) -> Tensor:
        """(B, N, width), or (total, width) with `documents`."""
        x = x + self.attention(self.attention_norm(x), rotation, documents)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]

    def stream(self, x: Tensor, rotation: Rotation | None, state: Any) -> tuple[Tensor, Any]:
        """The next n tokens, (B, n, width), after `state`."""
        attended, state = self.attention.stream(self.attention_norm(x), rotation, state)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), state
