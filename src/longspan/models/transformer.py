"""A small decoder-only transformer whose attention is any mechanism: for training studies.

x = embedding(tokens)
in each layer:  x += attention(norm(x));  x += mlp(norm(x))
logits = head(norm(x))
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError, ShapeError
from ..types import Impl
from .layers import Block, Documents, RMSNorm
from .positions import Rotation, make_rotation
from .transformer_config import TransformerConfig

__all__ = ["Transformer", "TransformerOutput", "TransformerState", "next_token_loss"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerState:
    """What the next tokens of a stream need: one state per layer, tokens seen so far."""

    layers: tuple[Any, ...]
    seen: int

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write one safetensors file per layer; `Transformer.load_state` reads them."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for layer, state in enumerate(self.layers):
            state.save(target / f"layer-{layer:03d}.safetensors")
        (target / "seen.txt").write_text(str(self.seen))


class TransformerOutput(NamedTuple):
    """logits: (B, N, vocab_size). final_state: to go on with the next tokens."""

    logits: Tensor
    final_state: TransformerState


class Transformer(nn.Module):
    """The model.

    Args:
        config: sizes, positions, attention of each layer.
        impl: of the mechanisms: "auto", or one that runs or raises.
        gradient_checkpointing: keep only the input of each layer for backward and compute the
            rest again: memory of one layer instead of all, for a third more time.
        seed: same seed, same weights; the global random state is left as it was.

    Raises:
        UnsupportedError: a mechanism needs parameters that this model does not have.

    Example:
        >>> model = Transformer(TransformerConfig(vocab_size=256, width=64, layers=2))
        >>> model(torch.zeros(1, 10, dtype=torch.long)).shape
        torch.Size([1, 10, 256])
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        impl: Impl | str = "auto",
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing
        with torch.random.fork_rng(devices=[]):
            self.embedding = nn.Embedding(config.vocab_size, config.width)
            self.blocks = nn.ModuleList(Block(config, i, impl) for i in range(config.layers))
            self.norm = RMSNorm(config.width, config.norm_eps)
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self._draw_weights(seed)

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self, token_ids: Tensor, *, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Tensor:
        """Logits for the token after each token.

        Args:
            token_ids: (B, N), int64; with `cu_seqlens` (total,): documents one after the other.
            cu_seqlens: (S + 1,), int32: 0, then running totals of the document lengths. Documents
                do not see each other, and positions start anew in each.
            max_seqlen: longest document or an upper bound. Default: total.

        Returns:
            (B, N, vocab_size) or (total, vocab_size), in the dtype of the weights.

        Raises:
            ShapeError: token_ids has the wrong number of axes.
            UnsupportedError: documents, and a mechanism without a packed form.
        """
        hidden = self.hidden(token_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return self.head(hidden)  # type: ignore[no-any-return]

    def hidden(
        self, token_ids: Tensor, *, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Tensor:
        """What `forward` gives to the output projection: (..., width), after the last norm."""
        _check_axes(token_ids, 2 if cu_seqlens is None else 1)
        num_tokens = token_ids.shape[-1]
        positions = torch.arange(num_tokens, device=token_ids.device)
        documents = None
        if cu_seqlens is not None:
            documents = Documents(cu_seqlens, num_tokens if max_seqlen is None else max_seqlen)
            lengths = cu_seqlens.diff()
            positions = positions - torch.repeat_interleave(
                cu_seqlens[:-1], lengths, output_size=num_tokens
            )
        rotation = self._rotation(positions)
        x = self.embedding(token_ids)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, documents, use_reentrant=False)
            else:
                x = block(x, rotation, documents)
        return self.norm(x)  # type: ignore[no-any-return]

    def forward_chunk(
        self,
        token_ids: Tensor,
        state: TransformerState | None = None,
        *,
        num_logits: int | None = None,
    ) -> TransformerOutput:
        """The next tokens of a stream; chunks of any size, down to one token, equal the whole.

        Args:
            token_ids: (B, n), int64.
            state: what the call before returned; None starts a stream.
            num_logits: logits of the last tokens only. Default: all n.

        Returns:
            TransformerOutput: logits (B, num_logits, vocab_size), and the state after the tokens.
            Window layers keep a window, exact layers all keys and values.

        Semantics:
            Mechanisms that draw samples or hash get the whole cache with each chunk: they equal
            the whole only in distribution.
        """
        _check_axes(token_ids, 2)
        seen, num_tokens = (state.seen if state else 0), token_ids.shape[1]
        rotation = self._rotation(torch.arange(seen, seen + num_tokens, device=token_ids.device))
        x = self.embedding(token_ids)
        layers = []
        before = state.layers if state else [None] * len(self.blocks)
        for block, layer in zip(cast(list[Block], self.blocks), before, strict=True):
            x, after = block.stream(x, rotation, layer)
            layers.append(after)
        if num_logits is not None:
            x = x[:, num_tokens - num_logits :]
        final_state = TransformerState(layers=tuple(layers), seen=seen + num_tokens)
        return TransformerOutput(self.head(self.norm(x)), final_state)

    def load_state(self, folder: str | os.PathLike[str]) -> TransformerState:
        """Read a state that `TransformerState.save` wrote, onto the device of the weights.

        Raises:
            FileNotFoundError: a file is missing.
            ConfigError: it was made with other attention settings.
        """
        source, device = Path(folder), self.embedding.weight.device
        layers = []
        for index, block in enumerate(cast(list[Block], self.blocks)):
            mechanism = block.attention.mechanism
            path = source / f"layer-{index:03d}.safetensors"
            layers.append(mechanism.state_class.load(path, mechanism.config, device=device))
        return TransformerState(layers=tuple(layers), seen=int((source / "seen.txt").read_text()))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write model.safetensors, which appears whole or not at all and has the config inside.

        config.json is a copy of it for people and tools.
        """
        from safetensors.torch import save_file

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().contiguous() for k, v in self.state_dict().items()}
        if self.config.tie_embeddings:
            del tensors["head.weight"]
        aside = target / f".part-{os.getpid()}"
        try:
            save_file(tensors, aside, metadata={"config": self.config.to_json()})
            os.replace(aside, target / "model.safetensors")
            aside.write_text(self.config.to_json())
            os.replace(aside, target / "config.json")
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        impl: Impl | str = "auto",
    ) -> Transformer:
        """Read what `save` wrote, in the dtype it had.

        Raises:
            ConfigError: a file is missing, cut short, or of another kind of model.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / "model.safetensors"
        try:
            with safe_open(path, framework="pt", device=str(device)) as handle:
                header = handle.metadata() or {}
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            config = TransformerConfig.from_json(header.get("config", "{}"))
            model = cls(config, impl=impl)
            if config.tie_embeddings:
                tensors["head.weight"] = tensors["embedding.weight"]
            model.load_state_dict(tensors, assign=True)
        except (OSError, SafetensorError, RuntimeError, KeyError) as error:
            raise ConfigError(
                f"Transformer.load: {path} is no whole model ({error}). Allowed: a folder that "
                "Transformer.save wrote. Copy it again, or give another folder."
            ) from error
        if config.tie_embeddings:
            model.head.weight = model.embedding.weight
        return model.eval()

    def _rotation(self, positions: Tensor) -> Rotation | None:
        if self.config.positions != "rope":
            return None
        config = self.config
        return make_rotation(positions, config.head_size, config.rope_base, config.rope_scaling)

    @torch.no_grad()
    def _draw_weights(self, seed: int) -> None:
        """Normal, std 0.02; what writes to the residual stream is smaller by sqrt(2 layers)."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes = name.endswith(("attention.out.weight", "mlp.down.weight"))
                std = 0.02 / (2 * self.config.layers) ** 0.5 if writes else 0.02
                parameter.normal_(0.0, std, generator=generator)


def next_token_loss(
    logits: Tensor, token_ids: Tensor, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Mean loss in nats of each token given those before it.

    Args:
        logits: of `Transformer.forward`.
        token_ids: its input, (B, N) or packed (total,).
        cu_seqlens: as given to forward; the first token of a document is not predicted.

    Returns:
        A float32 scalar; NaN if no token has one before it.
    """
    targets = token_ids[..., 1:]
    if cu_seqlens is not None:
        # One mark more than tokens: an empty document at the end starts after the last token.
        starts = torch.zeros(len(token_ids) + 1, dtype=torch.bool, device=token_ids.device)
        starts[cu_seqlens.long()] = True
        targets = targets.masked_fill(starts[1:-1], -100)
    return F.cross_entropy(logits[..., :-1, :].flatten(0, -2).float(), targets.flatten())


def _check_axes(token_ids: Tensor, ndim: int) -> None:
    if token_ids.ndim != ndim:
        layout = "(B, N)" if ndim == 2 else "(total,), because cu_seqlens is given"
        raise ShapeError(
            f"Transformer: token_ids has shape {tuple(token_ids.shape)}; it must be {layout}. "
            "Add or drop an axis."
        )
