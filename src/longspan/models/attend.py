"""Run any mechanism of the registry as a causal layer: whole, packed, or as a stream."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._state import load_state, save_state
from ..errors import UnsupportedError
from ..mechanisms import mechanism_of_config
from ..types import Impl
from .forget import decay_totals, forget_attention, forget_attention_packed
from .positions import alibi_attention

__all__ = ["CausalAttention", "KeyValueCache"]

_NOTHING: Mapping[str, Tensor] = {}

_KNOWN = {
    *("query", "key", "value", "is_causal", "query_offset"),
    *("scale", "enable_gqa", "config", "impl", "seed"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyValueCache:
    """All keys and values seen, for mechanisms that have no smaller state.

    key: (B, H_kv, seen, D). value: (B, H_kv, seen, D_v). config: of the mechanism. totals:
    (B, H_kv, seen), float64, sums of log forget gates; None without them.
    """

    key: Tensor
    value: Tensor
    config: Any
    totals: Tensor | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, which appears whole or not at all."""
        tensors = {"key": self.key, "value": self.value}
        if self.totals is not None:
            tensors["totals"] = self.totals
        save_state(path, "KeyValueCache", self.config, tensors, {})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], config: Any, *, device: torch.device | str = "cpu"
    ) -> KeyValueCache:
        """Read what `save` wrote; ConfigError if it was made with another `config`."""
        tensors, _ = load_state(path, "KeyValueCache", config, device=device)
        return cls(
            key=tensors["key"],
            value=tensors["value"],
            config=config,
            totals=tensors.get("totals"),
        )


class CausalAttention:
    """The mechanism of one layer behind three calls; holds no parameters.

    Args:
        config: of a mechanism; its type picks which.
        positions: of the model; "alibi" and "forget" put their bias on the scores here.
        seed: for mechanisms with random inputs.
        impl: as in the mechanism's function; a named one runs or raises.

    What a layer owns (gates) and what only some mechanisms take (queries and keys without
    positions, where `takes_plain`) comes with each call as `owned`.

    Raises:
        UnsupportedError: the mechanism needs inputs that this layer does not have.
    """

    def __init__(self, config: Any, *, positions: str, seed: int, impl: Impl | str) -> None:
        mechanism = mechanism_of_config(config)
        self.config = config
        self.alibi = positions == "alibi"
        self.function = mechanism.function
        self.function_varlen = mechanism.function_varlen if mechanism.has_varlen else None
        parameters = list(inspect.signature(self.function).parameters.values())
        needs = [p.name for p in parameters if p.default is p.empty and p.name not in _KNOWN]
        if needs:
            raise UnsupportedError(
                f"Transformer: {mechanism.name} attention needs {', '.join(needs)}, which this "
                "model has no parameters for. Allowed: mechanisms without parameters of their "
                "own. Use the modules of longspan.nn in a model of yours."
            )
        self.name = mechanism.name
        self.takes_plain = any(p.name == "memory_key" for p in parameters)
        self.settings: dict[str, Any] = {"enable_gqa": True, "config": config, "impl": impl}
        self.random = {"seed": seed} if any(p.name == "seed" for p in parameters) else {}
        package = importlib.import_module(f"..{mechanism.package}", __package__)
        self.chunk = getattr(package, f"{mechanism.name}_attention_chunk", None)
        self.state_class: Any = mechanism.state_class if self.chunk else KeyValueCache

    def whole(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_forget: Tensor | None = None,
        owned: Mapping[str, Tensor] = _NOTHING,
    ) -> Tensor:
        """(B, H, N, D), all tokens of a sequence; log_forget (B, H_kv, N) with "forget"."""
        totals = None if log_forget is None else decay_totals(log_forget)
        return self._dense(query, key, value, 0, totals, owned)

    def packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        log_forget: Tensor | None = None,
        owned: Mapping[str, Tensor] = _NOTHING,
    ) -> Tensor:
        """(total, H, D), several sequences one after the other; log_forget (total, H_kv)."""
        if log_forget is not None:
            return forget_attention_packed(
                query, key, value, log_forget, cu_seqlens, max_seqlen,
                config=self.config, impl=self.settings["impl"],
            )  # fmt: skip
        if self.alibi:
            return alibi_attention(
                query, key, value, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
                config=self.config, impl=self.settings["impl"],
            )  # fmt: skip
        if self.function_varlen is None:
            raise UnsupportedError(
                f"Transformer: {self.name} attention has no packed form. Allowed: (B, N) batches "
                "of one length. Pass the documents one by one."
            )
        bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return _output(
            self.function_varlen(
                query, key, value, *bounds, is_causal=True, **self.settings, **self.random, **owned
            )
        )

    def stream(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: Any,
        log_forget: Tensor | None = None,
        owned: Mapping[str, Tensor] = _NOTHING,
    ) -> tuple[Tensor, Any]:
        """The next tokens (B, H, n, D) after `state` (None at the start); the state after them."""
        if self.chunk is not None:
            random = self.random if "seed" in inspect.signature(self.chunk).parameters else {}
            output, state = self.chunk(query, key, value, state, **self.settings, **random, **owned)
            return output, state
        totals = None
        if log_forget is not None:
            before = None if state is None else state.totals[..., -1]
            totals = decay_totals(log_forget, before)
            totals = totals if state is None else torch.cat((state.totals, totals), dim=-1)
        if state is not None:
            key = torch.cat((state.key, key), dim=2)
            value = torch.cat((state.value, value), dim=2)
        output = self._dense(query, key, value, key.shape[2] - query.shape[2], totals, owned)
        return output, KeyValueCache(key=key, value=value, config=self.config, totals=totals)

    def _dense(
        self, query: Tensor, key: Tensor, value: Tensor, offset: int, totals: Tensor | None,
        owned: Mapping[str, Tensor],
    ) -> Tensor:  # fmt: skip
        if totals is not None:
            return forget_attention(
                query, key, value, totals, query_offset=offset,
                config=self.config, impl=self.settings["impl"],
            )  # fmt: skip
        if self.alibi:
            return alibi_attention(
                query, key, value, query_offset=offset,
                config=self.config, impl=self.settings["impl"],
            )  # fmt: skip
        result = self.function(
            query, key, value, is_causal=True, query_offset=offset, **self.settings, **self.random,
            **owned,
        )  # fmt: skip
        return _output(result)


def _output(result: Any) -> Tensor:
    """Mechanisms with a state return a NamedTuple whose first field is the output."""
    return result if isinstance(result, Tensor) else result.output
