"""Infini-attention as a layer: projections, positions inside the segment, and a gate per head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError, ShapeError, UnsupportedError
from ..infini.api import InfiniOutput, infini_attention, initial_gate
from ..infini.config import InfiniConfig
from ..infini.rates import write_rates
from ..infini.state import InfiniState
from ..types import Impl

__all__ = ["InfiniAttention", "gate_parameter_groups", "gate_statistics"]

_SHUT, _OPEN = 0.05, 0.95  # shares at which a head counts as local, or as reading memory only


class InfiniAttention(nn.Module):
    """Multi-head Infini-attention: project, attend in segments and to the memory, project back.

    Rotary positions reach the local part only; the memory sees queries and keys without them.

    Args:
        width: size of the input and output vectors.
        heads: query heads.
        kv_heads: key and value heads, each with a memory; default `heads`. Must divide `heads`.
        head_dim: size of one head; default width // heads.
        config: segment length, update rule and so on.
        rope_base: base of the rotary positions; None for no positions.
        gate_start: what gates start from: "spread" (-3 to 3 over the heads), "zero" or a number.
            The gate is a float32 parameter whatever `dtype` is; give it an optimizer group of its
            own with `gate_parameter_groups`.
        bptt_segments: gradients through the memory reach back this many segments at most, counted
            in blocks of that size; None: all.
        checkpoint_segments: recompute activations in the backward, this many segments at a time;
            None: keep them.
        bias: give the projections a bias.
        impl: as in `infini_attention`.
        device, dtype: of the parameters.

    Raises:
        ConfigError: sizes or options that do not fit together.

    Example:
        >>> layer = InfiniAttention(64, 4, config=InfiniConfig(segment_length=8))
        >>> layer(torch.randn(1, 20, 64)).shape
        torch.Size([1, 20, 64])
        >>> first = layer.chunk(torch.randn(1, 5, 64))
        >>> layer.chunk(torch.randn(1, 9, 64), first.final_state).final_state.seen
        14
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        config: InfiniConfig = InfiniConfig(),
        rope_base: float | None = 10000.0,
        gate_start: str | float = "spread",
        bptt_segments: int | None = None,
        checkpoint_segments: int | None = None,
        bias: bool = False,
        impl: Impl | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        self.head_dim = _head_dim(width, heads, self.kv_heads, head_dim, rope_base)
        for name, value in (
            ("bptt_segments", bptt_segments),
            ("checkpoint_segments", checkpoint_segments),
        ):
            if value is not None and (isinstance(value, bool) or value < 1):
                raise ConfigError(
                    f"InfiniAttention: {name} is {value!r}; it must be None or at least 1, a "
                    "number of segments."
                )
        if bptt_segments and checkpoint_segments and bptt_segments % checkpoint_segments:
            raise ConfigError(
                f"InfiniAttention: bptt_segments is {bptt_segments}, no multiple of "
                f"checkpoint_segments = {checkpoint_segments}. Use a multiple, or None."
            )
        self.config, self.rope_base, self.impl = config, rope_base, impl
        self.bptt_segments, self.checkpoint_segments = bptt_segments, checkpoint_segments
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, kv_inner = heads * self.head_dim, self.kv_heads * self.head_dim
        self.query = nn.Linear(width, inner, bias=bias, **made)
        self.key = nn.Linear(width, kv_inner, bias=bias, **made)
        self.value = nn.Linear(width, kv_inner, bias=bias, **made)
        self.output = nn.Linear(inner, width, bias=bias, **made)
        self.gate = nn.Parameter(initial_gate(heads, gate_start).to(device=device))
        self.write: nn.Linear | None = None
        if config.update == "gated_delta":  # write strength and decay of each key head
            self.write = nn.Linear(width, 2 * self.kv_heads, bias=True, **made)

    def forward(self, hidden: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """A whole sequence.

        Args:
            hidden: (B, N, width).
            key_lengths: (B,), int32, valid tokens of each batch entry; the rest is padding on the
                right. Not together with `bptt_segments` or `checkpoint_segments`.

        Returns:
            (B, N, width).

        Raises:
            UnsupportedError: `key_lengths` with an option that runs the sequence in pieces.
        """
        segments = self.checkpoint_segments or self.bptt_segments
        if segments is None or not torch.is_grad_enabled():
            return self._run(hidden, None, key_lengths).output
        if key_lengths is not None:
            raise UnsupportedError(
                "InfiniAttention: key_lengths was given with bptt_segments or "
                "checkpoint_segments, which run a sequence in pieces. Use sequences of one "
                "length, or None for both."
            )
        block = segments * self.config.segment_length
        state: InfiniState | None = None
        pieces = []
        for number, part in enumerate(torch.split(hidden, block, 1)):
            if state is not None and self._cuts(number * segments):
                state = state.detach()
            if self.checkpoint_segments is None:
                piece, state = self._run(part, state, None)
            else:
                piece, state = checkpoint(self._run, part, state, None, use_reentrant=False)
            pieces.append(piece)
        return torch.cat(pieces, 1) if pieces else self._run(hidden, None, None).output

    def chunk(self, hidden: Tensor, state: InfiniState | None = None) -> InfiniOutput:
        """The next tokens of a stream; chunks of any size equal the whole.

        Args:
            hidden: (B, n, width).
            state: what the call before returned; None starts a stream.

        Returns:
            InfiniOutput(output (B, n, width), final_state).
        """
        return self._run(hidden, state, None)

    def extra_repr(self) -> str:
        """What `print(module)` shows besides the parts."""
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
            f"rope_base={self.rope_base}, bptt_segments={self.bptt_segments}, "
            f"checkpoint_segments={self.checkpoint_segments}, config={self.config}"
        )

    def _cuts(self, segment: int) -> bool:
        """Whether gradients stop before this segment."""
        return self.bptt_segments is not None and segment % self.bptt_segments == 0

    def _run(
        self, hidden: Tensor, state: InfiniState | None, key_lengths: Tensor | None
    ) -> InfiniOutput:
        if hidden.ndim != 3:
            raise ShapeError(
                f"InfiniAttention: hidden has shape {tuple(hidden.shape)}; it must be "
                "(B, N, width). Add the batch axis with unsqueeze(0)."
            )
        shape = hidden.shape[:2]
        query = self.query(hidden).view(*shape, self.heads, self.head_dim).transpose(1, 2)
        key = self.key(hidden).view(*shape, self.kv_heads, self.head_dim).transpose(1, 2)
        value = self.value(hidden).view(*shape, self.kv_heads, self.head_dim).transpose(1, 2)
        more: dict[str, Any] = {}
        local_query, local_key = query, key
        if self.rope_base is not None:
            seen = 0 if state is None else state.seen
            turn = self._rotation(seen, shape[1], hidden.device)
            local_query, local_key = _rotate(query, turn), _rotate(key, turn)
            more = {"memory_query": query, "memory_key": key}
        if self.write is not None:
            more |= write_rates(self.write(hidden))
        output, final = infini_attention(
            local_query,
            local_key,
            value,
            is_causal=True,
            enable_gqa=True,
            key_lengths=key_lengths,
            gate=self.gate,
            initial_state=state,
            config=self.config,
            impl=self.impl,
            **more,
        )
        return InfiniOutput(self.output(output.transpose(1, 2).flatten(2)), final)

    def _rotation(self, seen: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin (count, head_dim / 2) of the positions, float32.

        Positions start again in each segment, which leaves differences inside of it as they are
        and angles small; with two segments in sight they run on, in float64.
        """
        position = torch.arange(seen, seen + count, device=device)
        if self.config.lag == 0:
            position = position % self.config.segment_length
        half = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float64)
        assert self.rope_base is not None
        angle = position[:, None] * self.rope_base ** (-half / self.head_dim)
        return angle.cos().float(), angle.sin().float()


def gate_parameter_groups(
    module: nn.Module, *, lr: float, gate_lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups in which gates have a learning rate of their own and no decay.

    With the learning rate of the weights gates hardly move; decay pulls them to one half; far too
    large a rate shuts heads before the memory is of use. About 4 / steps to 40 / steps per step
    (Adam) lets them travel.

    Args:
        module: any module that holds InfiniAttention layers, or models with a `longspan_gate`.
        lr, weight_decay: of all other parameters that are trained.
        gate_lr: of the gates.

    Returns:
        Two groups, for `torch.optim.AdamW` and its like; the second, named "gate", holds the gates.

    Raises:
        ConfigError: the module has no gates.

    Example:
        >>> layer = InfiniAttention(64, 4)
        >>> groups = gate_parameter_groups(layer, lr=1e-3, gate_lr=3e-3, weight_decay=0.1)
        >>> [len(group["params"]) for group in groups]
        [4, 1]
    """
    gates = list(_gates(module).values())
    if not gates:
        raise ConfigError(
            f"gate_parameter_groups: {type(module).__name__} holds no gate. Pass a module with "
            "InfiniAttention layers, or a model patched with an InfiniConfig."
        )
    known = {id(gate) for gate in gates}
    others = [p for p in module.parameters() if p.requires_grad and id(p) not in known]
    return [
        {"params": others, "lr": lr, "weight_decay": weight_decay, "name": "weights"},
        {"params": gates, "lr": gate_lr, "weight_decay": 0.0, "name": "gate"},
    ]


def gate_statistics(module: nn.Module) -> dict[str, dict[str, float]]:
    """Where the gates stand, for logs: by layer name, shares of the memory, all in [0, 1].

    Returns:
        name -> mean, min, max of sigmoid(gate) over the heads, and the share of heads that are
        `local` (below 0.05) or read the `memory` alone (above 0.95).

    Example:
        >>> layer = InfiniAttention(64, 4, gate_start="zero")
        >>> gate_statistics(layer)["gate"]["mean"]
        0.5
    """
    found = {}
    for name, gate in _gates(module).items():
        share = torch.sigmoid(gate.detach().double())
        found[name] = {
            "mean": float(share.mean()),
            "min": float(share.min()),
            "max": float(share.max()),
            "local": float((share < _SHUT).double().mean()),
            "memory": float((share > _OPEN).double().mean()),
        }
    return found


def _gates(module: nn.Module) -> dict[str, nn.Parameter]:
    own = {
        f"{name}.gate".lstrip("."): layer.gate
        for name, layer in module.named_modules()
        if isinstance(layer, InfiniAttention)
    }
    patched = {n: p for n, p in module.named_parameters() if n.endswith("longspan_gate")}
    return {**own, **patched}


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) of (B, H, N, D); in float32, back in the dtype of x."""
    cos, sin = turn
    low, high = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x.dtype)


def _head_dim(
    width: int, heads: int, kv_heads: int, head_dim: int | None, rope_base: float | None
) -> int:
    for name, count in (("width", width), ("heads", heads), ("kv_heads", kv_heads)):
        if count < 1:
            raise ConfigError(f"InfiniAttention: {name} is {count}; it must be at least 1.")
    if heads % kv_heads:
        raise ConfigError(
            f"InfiniAttention: kv_heads is {kv_heads}, which does not divide heads = {heads}. "
            "Use a divisor, or None for as many."
        )
    if head_dim is None and width % heads:
        raise ConfigError(
            f"InfiniAttention: heads is {heads}, which does not divide width = {width}. "
            "Use a divisor, or pass head_dim."
        )
    found = width // heads if head_dim is None else head_dim
    if rope_base is not None and found % 2:
        raise ConfigError(
            f"InfiniAttention: head_dim is {found}; rotary positions turn pairs of coordinates. "
            "Use an even head_dim, or rope_base=None."
        )
    return found
