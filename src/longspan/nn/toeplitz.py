"""Token mixing with a learned kernel over the distance, as a layer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conv_basis.toeplitz import toeplitz_attention
from ..errors import ConfigError

__all__ = ["ToeplitzAttention"]


class ToeplitzAttention(nn.Module):
    """Multi-head attention whose scores are c_h(i - j) + key_offset_j: no queries, no products.

    c_h is learned: linear between `num_knots` values at log-spaced lags, minus a learned slope
    (above 0) times the lag, so that it is defined at any length. With `use_content` each token
    has a learned score per head, which says how much it matters to all later ones. Softmax over
    the visible keys; almost linear time.

    Args:
        width: size of the input and output vectors.
        heads: number of heads; must divide `width` unless `head_dim` is given.
        head_dim: size of one head. Default: width // heads.
        num_knots: values of the kernel that are learned, for each head and side. At least 2.
        max_lag: lag of the last knot; beyond it only the slope acts. At least 2.
        use_content: learn a score of each token from its vector.
        is_causal: a token sees itself and those before it; otherwise both sides, with a kernel
            for each.
        bias: give the projections a bias.
        device, dtype: of the parameters.

    Raises:
        ConfigError: sizes that do not fit together.

    Example:
        >>> layer = ToeplitzAttention(64, 4)
        >>> layer(torch.randn(1, 10, 64)).shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        head_dim: int | None = None,
        num_knots: int = 32,
        max_lag: int = 4096,
        use_content: bool = True,
        is_causal: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"width": (width, 1), "heads": (heads, 1), "num_knots": (num_knots, 2),
                 "max_lag": (max_lag, 2)}  # fmt: skip
        for name, (value, least) in sizes.items():
            if value < least:
                raise ConfigError(
                    f"ToeplitzAttention: {name} is {value}; it must be an int >= {least}. "
                    f"Nearest valid: {least}."
                )
        if head_dim is None and width % heads:
            raise ConfigError(
                f"ToeplitzAttention: width is {width}, which {heads} heads do not divide. Pass "
                "head_dim, or another number of heads."
            )
        self.heads, self.head_dim = heads, head_dim or width // heads
        self.max_lag, self.is_causal = max_lag, is_causal
        made: Any = {"device": device, "dtype": dtype}
        sides = 1 if is_causal else 2
        self.value = nn.Linear(width, heads * self.head_dim, bias=bias, **made)
        self.content = nn.Linear(width, heads, bias=False, **made) if use_content else None
        self.output = nn.Linear(heads * self.head_dim, width, bias=bias, **made)
        self.knots = nn.Parameter(torch.zeros(sides, heads, num_knots, **made))
        # softplus(raw) from about 1 / 2 (near) to 1 / max_lag (far): the heads start out different
        slopes = torch.logspace(math.log10(0.5), -math.log10(max_lag), heads)
        raw = torch.log(torch.expm1(slopes)).expand(sides, heads).clone()
        self.raw_slope = nn.Parameter(raw.to(**made))

    def log_kernel(self, length: int) -> Tensor:
        """(heads, length), lag 0 first; not causal: (heads, 2 length - 1), lag 0 in the middle."""
        lag = torch.arange(length, device=self.knots.device, dtype=torch.float32)
        count = self.knots.shape[-1]
        place = (torch.log1p(lag) / math.log1p(self.max_lag)).clamp(max=1.0) * (count - 1)
        left = place.floor().clamp(max=count - 2).long()
        share = place - left
        knots = self.knots.float()
        curve = knots[..., left] * (1 - share) + knots[..., left + 1] * share
        curve = curve - F.softplus(self.raw_slope.float()).unsqueeze(-1) * lag
        if self.is_causal:
            return curve[0]
        return torch.cat((curve[1].flip(-1)[:, :-1], curve[0]), -1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) to (B, N, width)."""
        batch, length, _ = x.shape
        value = self.value(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        offset = None
        if self.content is not None:
            offset = self.content(x).transpose(1, 2).float()
        if length == 0:
            return self.output(value.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
        kernel = self.log_kernel(length).expand(batch, -1, -1)
        mixed = toeplitz_attention(kernel, value, key_offset=offset, is_causal=self.is_causal)
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
