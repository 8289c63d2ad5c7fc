"""What a call visits, and how far back its sticks last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._select import choose_impl
from .._validation import validate
from ..errors import ConfigError
from ..types import Impl
from .api import implementations
from .call import check_call, run_call, settings_of
from .config import StickBreakingConfig
from .impl.common import Settings
from .impl.tiles import log_sticks
from .impl.walk import Walk

__all__ = [
    "SPAN_THRESHOLDS",
    "StickBreakingStats",
    "effective_spans",
    "stick_breaking_attention_stats",
]

#: Half of the stick, a hundredth, and what a bfloat16 output cannot show any more.
SPAN_THRESHOLDS = (0.5, 1e-2, 2.0**-14)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StickBreakingStats:
    """Where the work and the weight of one call are.

    impl: the implementation whose tiles are counted.
    query_block, key_block: size of those tiles, in queries and keys.
    visited_tiles: (B, H, query blocks), int32: key tiles walked.
    total_tiles: (query blocks,), int32: key tiles of a full causal walk.
    visited_fraction: visited over total tiles, in [0, 1].
    thresholds: shares of the stick, in [0, 1].
    spans: (thresholds, B, H, N_q), int32: how many of the nearest keys bring the rest below the
        threshold; where it never falls that low, the number of keys the query sees.
    is_spent: (thresholds, B, H, N_q), bool: whether the rest does fall below.
    """

    impl: Impl
    query_block: int
    key_block: int
    visited_tiles: Tensor
    total_tiles: Tensor
    visited_fraction: float
    thresholds: tuple[float, ...]
    spans: Tensor
    is_spent: Tensor

    @property
    def visited_keys(self) -> Tensor:
        """(B, H, query blocks), int32: keys in the tiles that were walked, at most."""
        return self.visited_tiles * self.key_block


def stick_breaking_attention_stats(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = True,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    query_offset: int = 0,
    key_lengths: Tensor | None = None,
    logit_bias: Tensor | None = None,
    config: StickBreakingConfig = StickBreakingConfig(),
    thresholds: Sequence[float] = SPAN_THRESHOLDS,
    impl: Impl | str = "auto",
) -> StickBreakingStats:
    """Tiles that `stick_breaking_attention` would walk, and the span of every query's stick.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, query_offset,
            key_lengths, logit_bias, config: as in `stick_breaking_attention`.
        thresholds: shares of the stick, each in (0, 1), at which to measure spans.
        impl: whose tiles to count: "eager" or "triton".

    Returns:
        StickBreakingStats; no gradients.

    Raises:
        ConfigError: a threshold outside (0, 1). Else as `stick_breaking_attention`.

    Cost:
        One forward, and one walk over all visible keys in plain torch for the spans (none if
        `thresholds` is empty): O(N_q N_k D) time, O(N) memory.

    Example:
        >>> q = torch.randn(1, 2, 128, 64)
        >>> stick_breaking_attention_stats(q, q, q).spans.shape
        torch.Size([3, 1, 2, 128])
    """
    name = "stick_breaking_attention_stats"
    for threshold in thresholds:
        if not 0 < threshold < 1:
            raise ConfigError(
                f"{name}: thresholds holds {threshold!r}; every one must lie strictly between 0 "
                "and 1: a share of the stick."
            )
    with torch.no_grad():
        call = validate(
            name,
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            query_offset=query_offset,
            key_lengths=key_lengths,
        )
        bias = check_call(name, call, config, logit_bias)
        reports = [r for r in implementations(call, config) if r.impl is not Impl.REFERENCE]
        chosen = choose_impl(name, impl, reports)
        _, _, visited = run_call(call, config, bias, chosen)
        tensors, settings = (call.query, call.key, call.value), settings_of(call, config, bias)
        query_block, key_block = _tile_size(chosen, *tensors)
        total = _total_tiles(settings, visited.shape[-1], query_block, key_block, *tensors[:2])
        with torch.autocast(call.query.device.type, enabled=False):
            spans, is_spent = effective_spans(*tensors, settings, tuple(thresholds))
    return StickBreakingStats(
        impl=chosen,
        query_block=query_block,
        key_block=key_block,
        visited_tiles=visited,
        total_tiles=total,
        visited_fraction=_fraction(visited, total),
        thresholds=tuple(thresholds),
        spans=spans,
        is_spent=is_spent,
    )


def effective_spans(
    query: Tensor, key: Tensor, value: Tensor, settings: Settings, thresholds: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """The stick only shrinks, so a span is one more than the number of keys that leave enough."""
    batch, heads, n_q, _ = query.shape
    walk = Walk(query, key, value, settings)
    logs = [math.log(t) for t in thresholds]
    shape = (len(logs), *walk.q.shape[:3])
    enough = torch.zeros(shape, dtype=torch.int32, device=query.device)
    is_spent = torch.zeros(shape, dtype=torch.bool, device=query.device)
    for unit in walk.units(alone=False):
        for rows in walk.blocks:
            span = slice(*rows)
            q = walk.load_queries(unit, rows)
            log_rest = q.new_zeros(q.shape[:3], dtype=torch.float64)
            for keys in walk.chunks(unit, rows) if logs else ():
                k, _ = walk.load_keys(unit, keys)
                z = walk.logits(unit, q, k, rows, keys)
                nearer, taken = log_sticks(z)
                seen = z > float("-inf")
                # the stick after each key: before it, less what it takes
                after = nearer + torch.nn.functional.logsigmoid(-z)
                for index, log in enumerate(logs):
                    left = after >= (log - log_rest).to(after.dtype).unsqueeze(-1)
                    enough[index, *unit, span] += (left & seen).sum(-1, dtype=torch.int32)
                log_rest += taken
            for index, log in enumerate(logs):
                is_spent[index, *unit, span] = log_rest < log
    spans = enough + is_spent.int()
    shape = (len(logs), batch, heads, n_q)
    return spans.reshape(shape), is_spent.reshape(shape)


def _tile_size(impl: Impl, query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int]:
    if impl is Impl.TRITON:
        from .impl.triton.common import KEY_TILE
        from .impl.triton.forward import forward_config

        config = forward_config(query.dtype, query.shape[-1], value.shape[-1])
        return config.block_m, KEY_TILE
    from .impl.walk import QUERY_BLOCK, key_chunk

    return QUERY_BLOCK, key_chunk(query.shape[2])


def _total_tiles(
    settings: Settings, blocks: int, query_block: int, key_block: int, query: Tensor, key: Tensor
) -> Tensor:
    n_q, n_k = query.shape[2], key.shape[2]
    last = torch.arange(1, blocks + 1, device=query.device) * query_block
    limit = last.clamp(max=n_q) - 1 + settings.query_offset + int(settings.attend_current)
    return ((limit.clamp(0, n_k) + key_block - 1) // key_block).int()


def _fraction(visited: Tensor, total: Tensor) -> float:
    everything = int(total.sum()) * visited.shape[0] * visited.shape[1]
    return float(visited.sum()) / everything if everything else 1.0
