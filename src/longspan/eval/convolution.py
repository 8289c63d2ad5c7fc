"""How convolution-like each head is: which Toeplitz models reproduce its weights.

The model runs once, unchanged, under a mode that looks at every causal attention call. On sampled
rows of the second half, the exact weights are compared with those of models whose scores depend on
the lag, by total variation: 0 is equal, 1 is disjoint.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._random import permutation
from ..conv_basis.config import ConvBasisConfig
from ..conv_basis.impl.means import mean_model
from ..conv_basis.impl.recover import recover_starts, shifted_columns
from ..errors import ConfigError

__all__ = ["BASES", "convolution_profile", "is_saved_by_convolution"]

BASES = (1, 4, 16, 64)
_SWEEPS = 20  # of the alternating fit
_NEG_INF = float("-inf")


def convolution_profile(
    model: Callable[..., Any],
    tokens: Tensor,
    *,
    window: int = 64,
    num_sinks: int = 4,
    num_rows: int = 64,
    max_tv: float = 0.05,
    rope_base: float | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Total variation between exact and convolution-like weights of every head, over one text.

    Args:
        model: a transformers model with attn_implementation="sdpa", or any module that calls
            torch's scaled_dot_product_attention with is_causal=True.
        tokens: (1, N) token ids (or what the model takes), N at least 4 * window.
        window, num_sinks: what is exact in the models called so: lags below, first keys.
        num_rows: sampled rows, from the second half; every second one is for fitting, the
            distances are those of the others. At least 4.
        max_tv: what the 95 % quantile must not exceed for a head to pass.
        rope_base: base of the model's rotary embedding, for the closed form from means.
        seed: picks the rows.

    Returns:
        One row per full causal attention call and head: `layer`, `head`, and the 95 % quantile of
        the distance for

        - `window`: window and sinks, nothing beyond them;
        - `toeplitz`: one kernel, the mean score at each lag of the fitted rows;
        - `toeplitz_window`: the same, window and sinks exact;
        - `offsets_window`: score = row + key + kernel(lag), fitted, window and sinks exact;
        - `means_window`: the closed form of recover="means", window and sinks exact;
        - `paper`: recover="binary", 16 bases, nothing exact;
        - `bases_1`, `bases_4`, ..: that many equal segments, columns read at their starts,
          window and sinks exact;

        `tail_mass` (mean mass beyond window and sinks), `bases_needed` (the smallest of these
        numbers that passes, or None), `passes_window`, `passes_convolution` (any model with a
        window passes). Calls with a mask of their own (sliding windows) are left out.

    Raises:
        ConfigError: too few tokens or rows, or no call that can be measured.

    Example:
        >>> q = torch.randn(1, 2, 64, 8)
        >>> sdpa = torch.nn.functional.scaled_dot_product_attention
        >>> def model(tokens):
        ...     return sdpa(q, q, q, is_causal=True)
        >>> rows = convolution_profile(model, torch.zeros(1, 64), window=4)
        >>> len(rows), 0 <= rows[0]["window"] <= 1
        (2, True)
    """
    length = tokens.shape[1]
    if length < 4 * window:
        raise ConfigError(
            f"convolution_profile: tokens has {length} tokens with window = {window}; at least "
            f"{4 * window} are needed for a tail to exist. Read more, or lower window."
        )
    if num_rows < 4:
        raise ConfigError(
            f"convolution_profile: num_rows is {num_rows}; it must be an int >= 4, e.g. 64."
        )
    settings = (window, num_sinks, num_rows, max_tv, rope_base, seed)
    recorder = _Recorder(settings)
    takes = inspect.signature(getattr(model, "forward", model)).parameters
    with torch.no_grad(), recorder:
        model(tokens, **({"use_cache": False} if "use_cache" in takes else {}))
    if not recorder.rows:
        raise ConfigError(
            "convolution_profile: the model made no full causal attention call that can be "
            'measured. Load a softmax model with attn_implementation="sdpa", unpatched.'
        )
    return recorder.rows


def is_saved_by_convolution(row: dict[str, Any]) -> bool:
    """Whether a Toeplitz tail passes where window and sinks alone do not: the kill criterion."""
    return bool(row["passes_convolution"] and not row["passes_window"])


class _Recorder(TorchFunctionMode):
    """Measures attention calls on their way; what they compute is not changed."""

    def __init__(self, settings: tuple[Any, ...]) -> None:
        super().__init__()
        self.settings = settings
        self.rows: list[dict[str, Any]] = []
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            bound = _SDPA.bind(*args, **kwargs)
            bound.apply_defaults()
            self._measure(**bound.arguments)
            self.calls += 1
        return func(*args, **kwargs)

    def _measure(
        self, query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool,
        scale: float | None, **_rest: Any,
    ) -> None:  # fmt: skip
        if query.shape[2] != key.shape[2] or not (is_causal or _is_plain_causal(attn_mask)):
            return
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        for row in _head_rows(query.float(), key.float(), scale, *self.settings):
            self.rows.append({"kind": "convolution", "layer": self.calls, **row})


def _sdpa_signature(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> None:  # fmt: skip
    """torch's arguments and defaults."""


_SDPA = inspect.signature(_sdpa_signature)


def _is_plain_causal(mask: Tensor | None) -> bool:
    """True for a mask that hides exactly the keys after the query."""
    if mask is None:
        return False
    seen = mask if mask.dtype is torch.bool else mask > -1e30
    n_q, n_k = seen.shape[-2:]
    index = torch.arange(n_k, device=seen.device)
    triangle = index <= torch.arange(n_q, device=seen.device)[:, None]
    return n_q == n_k and bool((seen == triangle).all())


def _head_rows(
    query: Tensor, key: Tensor, scale: float, window: int, num_sinks: int, num_rows: int,
    max_tv: float, rope_base: float | None, seed: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    heads, n = query.shape[1:3]
    device = query.device
    later = permutation(seed, "convolution/rows", n - n // 2, device=device) + n // 2
    rows = later[:num_rows]
    group = heads // key.shape[1]
    scores = scale * query[0, :, rows] @ key[0].repeat_interleave(group, 0).mT  # (H, r, N)
    keys = torch.arange(n, device=device)
    lag = rows[:, None] - keys  # (r, N)
    is_exact = (lag < window) | (keys < num_sinks)
    hidden = lag < 0
    exact = torch.softmax(scores.masked_fill(hidden, _NEG_INF), -1)
    tested = slice(1, None, 2)

    def distance(model: Tensor, keeps: bool) -> Tensor:
        """(H,): 95 % quantile over the tested rows."""
        if keeps:
            model = torch.where(is_exact, scores, model)
        weights = torch.softmax(model.masked_fill(hidden, _NEG_INF), -1)
        gaps = 0.5 * (weights - exact).abs().sum(-1)[:, tested]
        return torch.quantile(gaps, 0.95, dim=-1)

    found = {"window": distance(torch.full_like(scores, _NEG_INF), True)}
    fitted = (scores[:, ::2], lag[::2])
    found["toeplitz"] = distance(_lag_means(*fitted, ~hidden[::2], n)[:, lag.clamp(min=0)], False)
    kernel = _lag_means(*fitted, ~(is_exact | hidden)[::2], n)
    found["toeplitz_window"] = distance(kernel[:, lag.clamp(min=0)], True)
    kernel, offset = _fit_offsets(*fitted, ~(is_exact | hidden)[::2], n)
    rest = kernel[:, lag.clamp(min=0)] + offset.unsqueeze(1)
    level = _row_level(scores - rest, ~(is_exact | hidden), exact)
    found["offsets_window"] = distance(rest + level, True)

    lengths = torch.full((1,), n, device=device)
    first = (query[:1], key[:1])
    if rope_base is None or query.shape[-1] % 2 == 0:
        typical = max(1, round((window * n) ** 0.5))
        means = mean_model(*first, lengths, scale, rope_base, typical)
        model = means.log_kernel[0, :, 0][:, lag.clamp(min=0)] + means.key_offset[0].unsqueeze(1)
        found["means_window"] = distance(model + means.row_offset[0][:, rows].unsqueeze(-1), True)
    paper = ConvBasisConfig(num_bases=16)
    found["paper"] = distance(_segment_scores(*first, lengths, scale, paper, lag), False)
    for count in BASES:
        config = ConvBasisConfig(num_bases=count, recover="grid", near_window=window,
                                 num_sinks=num_sinks)  # fmt: skip
        model = _segment_scores(*first, lengths, scale, config, lag)
        found[f"bases_{count}"] = distance(model, True)
    tail = (exact * ~is_exact).sum(-1)[:, tested].mean(-1)
    with_window = [v for k, v in found.items() if k.endswith("_window") or k.startswith("bases_")]
    for h in range(heads):
        enough = [count for count in BASES if found[f"bases_{count}"][h] <= max_tv]
        yield {
            "head": h,
            **{name: float(value[h]) for name, value in found.items()},
            "tail_mass": float(tail[h]),
            "bases_needed": enough[0] if enough else None,
            "max_tv": max_tv,
            "passes_window": bool(found["window"][h] <= max_tv),
            "passes_convolution": bool(min(float(v[h]) for v in with_window) <= max_tv),
        }


def _segment_scores(
    query: Tensor, key: Tensor, lengths: Tensor, scale: float, config: ConvBasisConfig, lag: Tensor
) -> Tensor:
    """(H, r, N): the score of each key by the column of its segment."""
    n = key.shape[2]
    starts = recover_starts(query, key, lengths, scale, config)
    kernels = shifted_columns(query, key, starts, scale)[0]  # (H, G, N)
    begin = starts[0].clone()
    begin[:, 0] = 0
    keys = torch.arange(n, device=key.device).expand(len(begin), -1).contiguous()
    segment = torch.searchsorted(begin, keys, right=True) - 1  # (H, N)
    place = segment.unsqueeze(1) * n + lag.clamp(min=0)
    return torch.gather(kernels.flatten(1), 1, place.flatten(1)).view(place.shape)


def _lag_means(scores: Tensor, lag: Tensor, counts: Tensor, n: int) -> Tensor:
    """(H, N): mean score at each lag; a lag that no row has takes the nearest one below."""
    place = lag.clamp(min=0).flatten()
    weight = counts.flatten().to(scores.dtype)
    total = scores.new_zeros((scores.shape[0], n)).index_add_(1, place, scores.flatten(1) * weight)
    number = scores.new_zeros(n).index_add_(0, place, weight)
    known = torch.where(number > 0, torch.arange(n, device=scores.device), 0).cummax(0).values
    return (total / number.clamp(min=1))[:, known]


def _fit_offsets(scores: Tensor, lag: Tensor, counts: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Alternating least squares of score = row + key + kernel(lag): kernel (H, N), key (H, N)."""
    weight = counts.to(scores.dtype)
    row = scores.new_zeros(scores.shape[:2]).unsqueeze(-1)
    offset = scores.new_zeros((scores.shape[0], n))
    kernel = offset
    for _ in range(_SWEEPS):
        kernel = _lag_means(scores - row - offset.unsqueeze(1), lag, counts, n)
        rest = scores - kernel[:, lag.clamp(min=0)]
        total = ((rest - row) * weight).sum(1)
        offset = total / (weight.sum(0) + 1.0)  # shrunk: a key seen by few rows is uncertain
        per_row = ((rest - offset.unsqueeze(1)) * weight).sum(-1) / weight.sum(-1).clamp(min=1)
        row = per_row.unsqueeze(-1)
    return kernel, offset


def _row_level(rest: Tensor, counts: Tensor, exact: Tensor) -> Tensor:
    """(H, r, 1): the level of each row that its weights ask for (it only matters beside an exact
    part)."""
    weight = exact * counts + 1e-9 * counts
    return (rest * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Shares of heads, and medians over heads, of a profile."""
    count = len(rows)

    def middle(name: str) -> float:
        return float(torch.tensor([row[name] for row in rows if name in row]).median())

    names = [n for n in ("window", "toeplitz", "toeplitz_window", "offsets_window", "means_window",
                         "paper", *(f"bases_{k}" for k in BASES)) if n in rows[0]]  # fmt: skip
    return {
        "heads": count,
        **{f"median_{name}": middle(name) for name in names},
        **{f"pass_{name}": sum(row[name] <= row["max_tv"] for row in rows) / count
           for name in names},
        "saved": sum(is_saved_by_convolution(row) for row in rows) / count,
        "median_tail_mass": middle("tail_mass"),
    }  # fmt: skip
