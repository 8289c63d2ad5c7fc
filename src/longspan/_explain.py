"""`explain`: which implementation would run, and why the others would not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ._select import choose_impl
from ._validation import validate
from .errors import UnsupportedError
from .mechanisms import mechanism_of_config
from .types import Impl, ImplReport

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """What a call would do. `print` it for a readable form.

    mechanism: name of the mechanism.
    chosen: implementation that impl="auto" would run, or None if all refuse.
    reports: one per implementation, preferred first; `refusal` is None if it can run.
    visited_fraction: share of the visible scores that would be computed, in [0, 1].
    """

    mechanism: str
    chosen: Impl | None
    reports: tuple[ImplReport, ...]
    visited_fraction: float

    def __str__(self) -> str:
        chosen = self.chosen.value if self.chosen else "nothing can run"
        lines = [
            f"{self.mechanism}: {chosen}; {100 * self.visited_fraction:.1f} % of the scores visited"
        ]
        for report in self.reports:
            verdict = "can run" if report.refusal is None else f"refuses: {report.refusal}"
            note = f" ({report.note})" if report.note else ""
            lines.append(f"  {report.impl.value}: {verdict}{note}")
        return "\n".join(lines)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    query_offset: int = 0,
    key_lengths: Tensor | None = None,
) -> Explanation:
    """Say which implementation `longspan.attention` would run for these arguments, without running.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, query_offset,
            key_lengths: as in `longspan.attention`.
        config: settings; their type picks the mechanism.

    Returns:
        Explanation; printing it gives one line per implementation.

    Raises:
        ShapeError, ConfigError: as the call itself would.

    Example:
        >>> q = torch.randn(1, 2, 128, 64)
        >>> explain(q, q, q, ExactConfig(), is_causal=True).chosen.value
        'eager'
    """
    mechanism = mechanism_of_config(config)
    call = validate(
        f"{mechanism.name}_attention",
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
    reports = tuple(mechanism.implementations(call, config))
    try:
        chosen = choose_impl(f"{mechanism.name}_attention", Impl.AUTO, reports)
    except UnsupportedError:
        chosen = None
    fraction = mechanism.visited_fraction(
        config,
        query.shape[2],
        key.shape[2],
        is_causal=call.is_causal,
        query_offset=call.query_offset,
    )
    return Explanation(
        mechanism=mechanism.name, chosen=chosen, reports=reports, visited_fraction=fraction
    )
