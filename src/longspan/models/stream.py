"""Continue a text of any length in bounded memory: read, write, save, and go on after a kill."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from .._state import load_state, save_state
from ..errors import ConfigError
from ..mechanisms import mechanism_of_config
from .generation import check_drawing, choose
from .layers import Block
from .text_source import TextSource
from .transformer import Transformer, TransformerState

__all__ = [
    "StreamModel",
    "StreamReport",
    "StreamSettings",
    "TextStream",
    "TransformerStream",
    "fingerprint",
]

_STATE, _TOKENS, _TEXT = "state.safetensors", "tokens.txt", "text.txt"
_BOUNDED = ("infini", "window")
_CONTEXT = 8  # tokens before the new ones that decoding looks at
_LONGEST = 8  # tokens of one character, at most


class StreamModel(Protocol):
    """A model with a state of bounded size: what `TextStream` asks of it."""

    @property
    def device(self) -> torch.device:
        """Where token ids go."""

    def read(self, token_ids: Tensor) -> Tensor:
        """Take the next tokens (1, n) into the state; logits (vocab_size,) after the last."""

    def parts(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The state as tensors and numbers by name."""

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """Take over what `parts` gave."""

    def fingerprint(self) -> str:
        """Names weights and settings; states of other models are refused by it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSettings:
    """What a stream depends on, kept in its state; a resumed run must have the same.

    model, source: fingerprints. context: tokens of the text to read; None for all of it.
    temperature, top_k, seed: as in `generate`. chunk_size: tokens read at a time.
    """

    model: str
    source: str
    context: int | None
    temperature: float
    top_k: int | None
    seed: int
    chunk_size: int


class StreamReport(NamedTuple):
    """read, written: tokens in all. resumed: how many of both an earlier process had done."""

    read: int
    written: int
    resumed: int


@dataclass
class _Progress:
    """Everything that changes while a stream runs, the model's own state apart."""

    offset: int = 0  # byte of the text where the current piece begins
    skip: int = 0  # tokens of that piece that were read
    read: int = 0
    written: int = 0
    shown: int = 0  # tokens of the tail whose text was written
    token_bytes: int = 0
    text_bytes: int = 0
    tail: list[int] = field(default_factory=list)
    logits: Tensor | None = None


class TextStream:
    """Reads a text with a model, then writes on; its folder holds all that a restart needs.

    `state.safetensors` has the model's state, the last logits, the random generator and the
    places reached in all files; it is replaced as a whole, so that a killed run goes on from the
    last one. `tokens.txt` (ids, one a line) and `text.txt` grow with what is written and are cut
    back to the state's place on resume.

    Args:
        model: see `StreamModel`.
        encode: text -> token ids, without tokens that begin a text.
        decode: token ids -> text.
        source: the text to read first.
        folder: made if missing. One that holds a stream of the same settings is continued.
        start: ids before the text, such as <bos>.
        context, temperature, top_k, seed, chunk_size: see `StreamSettings`.
        save_every: tokens between two saves; reading saves at the end of a chunk.

    Raises:
        ConfigError: settings that are invalid, or other than those of the stream in the folder.

    Semantics:
        Chunks are cut at places that do not depend on saves, so a resumed run computes what an
        unbroken one does and writes the same tokens.

    Example:
        >>> from longspan.models import Transformer, TransformerConfig
        >>> attention = InfiniConfig(segment_length=16)
        >>> net = Transformer(TransformerConfig(vocab_size=256, width=32, attention=attention))
        >>> stream = TextStream(
        ...     TransformerStream(net), lambda text: list(text.encode()), lambda ids: bytes(ids)
        ...     .decode(errors="replace"), TextSource(b"Once upon a time"), "story",
        ... )
        >>> stream.run(20)
        StreamReport(read=16, written=20, resumed=0)
        >>> stream.run(30).written
        30
    """

    def __init__(
        self,
        model: StreamModel,
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[list[int]], str],
        source: TextSource,
        folder: str | os.PathLike[str],
        *,
        start: Sequence[int] = (),
        context: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        chunk_size: int = 2048,
        save_every: int = 4096,
    ) -> None:
        check_drawing(temperature, top_k, seed)
        for name, value in (("chunk_size", chunk_size), ("save_every", save_every)):
            if value < 1:
                raise ConfigError(f"TextStream: {name} is {value}; it must be at least 1.")
        self._model, self._encode, self._decode, self._source = model, encode, decode, source
        self._folder, self._start, self._save_every = Path(folder), list(start), save_every
        self.settings = StreamSettings(
            model=model.fingerprint(), source=source.fingerprint(), context=context,
            temperature=temperature, top_k=top_k, seed=seed, chunk_size=chunk_size,
        )  # fmt: skip
        self._generator = torch.Generator().manual_seed(seed)
        self._progress = _Progress()
        self._saved = 0
        self._folder.mkdir(parents=True, exist_ok=True)
        if (self._folder / _STATE).exists():
            self._resume()

    @torch.no_grad()
    def run(
        self,
        num_tokens: int,
        *,
        on_read: Callable[[int], None] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> StreamReport:
        """Read what is left of the text, then write until `num_tokens` were written in all.

        Args:
            num_tokens: counts what earlier runs of the same folder wrote; a larger number goes on.
            on_read: called with the tokens read so far.
            on_text: called with each new piece of written text.

        Raises:
            ConfigError: there is nothing to continue.
        """
        resumed = self._progress.read + self._progress.written
        with (
            _appending(self._folder / _TOKENS, self._progress.token_bytes) as tokens,
            _appending(self._folder / _TEXT, self._progress.text_bytes) as text,
        ):
            self._files = (tokens, text)
            if self._progress.written == 0:
                self._read_text(on_read)
            self._write(num_tokens, on_text)
            self._save()
        return StreamReport(self._progress.read, self._progress.written, resumed)

    def _read_text(self, on_read: Callable[[int], None] | None) -> None:
        now = self._progress
        tokens = self._tokens(now.offset, now.skip)
        while True:
            ids = list(self._start) if now.read == 0 else []
            places = list(islice(tokens, self._room(len(ids))))
            ids += [token for token, _, _ in places]
            if not ids:
                break
            now.logits = self._model.read(torch.tensor([ids], device=self._model.device))
            now.read += len(ids)
            now.tail = (now.tail + ids)[-_CONTEXT:]
            if places:
                _, now.offset, now.skip = places[-1]
            if on_read is not None:
                on_read(now.read)
            if now.read - self._saved >= self._save_every:
                self._save()
        if now.logits is None:
            raise ConfigError("text: it has no tokens. Allowed: at least one. Give a prompt.")
        now.shown = len(now.tail)

    def _room(self, begun: int) -> int:
        """Tokens of the text that the next chunk takes, `begun` tokens being in it already."""
        room = max(self.settings.chunk_size - begun, 0)
        if self.settings.context is None:
            return room
        done = self._progress.read - (len(self._start) if self._progress.read else 0)
        return min(room, self.settings.context - done)

    def _tokens(self, offset: int, skip: int) -> Iterator[tuple[int, int, int]]:
        """Token ids from a place on, each with the place behind it."""
        while (found := self._source.piece(offset)) is not None:
            text, after = found
            ids = self._encode(text)
            for count in range(skip, len(ids)):
                yield ids[count], offset, count + 1
            offset, skip = after, 0

    def _write(self, num_tokens: int, on_text: Callable[[str], None] | None) -> None:
        now = self._progress
        while now.written < num_tokens:
            assert now.logits is not None, "the text has a token"
            chosen = choose(
                now.logits[None], self.settings.temperature, self.settings.top_k, [self._generator]
            )
            token = int(chosen)
            now.logits = self._model.read(chosen.to(self._model.device))
            now.written += 1
            now.token_bytes += self._files[0].write(f"{token}\n".encode())
            self._show(token, on_text)
            if now.read + now.written - self._saved >= self._save_every:
                self._save()

    def _show(self, token: int, on_text: Callable[[str], None] | None) -> None:
        """Write the text of the new tokens, once they end a character."""
        now = self._progress
        now.tail.append(token)
        known = self._decode(now.tail[: now.shown])
        piece = self._decode(now.tail)[len(known) :]
        if piece.endswith("\ufffd") and len(now.tail) - now.shown < _LONGEST:
            return
        now.tail = now.tail[-_CONTEXT:]
        now.shown = len(now.tail)
        now.text_bytes += self._files[1].write(piece.encode("utf-8", "replace"))
        if on_text is not None:
            on_text(piece)

    def _save(self) -> None:
        now = self._progress
        for handle in self._files:
            handle.flush()
            os.fsync(handle.fileno())
        tensors, numbers = self._model.parts()
        assert now.logits is not None, "saved after reading"
        own = {
            "logits": now.logits.cpu(),
            "generator": self._generator.get_state(),
            "tail": torch.tensor(now.tail, dtype=torch.int64),
        }
        places = {
            name: getattr(now, name)
            for name in ("offset", "skip", "read", "written", "shown", "token_bytes", "text_bytes")
        }
        save_state(
            self._folder / _STATE, "TextStream", self.settings,
            {**{f"model.{name}": t for name, t in tensors.items()}, **own},
            {**{f"model.{name}": n for name, n in numbers.items()}, **places},
        )  # fmt: skip
        self._saved = now.read + now.written

    def _resume(self) -> None:
        tensors, numbers = load_state(self._folder / _STATE, "TextStream", self.settings)
        prefix = "model."
        self._model.restore(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)},
            {n.removeprefix(prefix): t for n, t in numbers.items() if n.startswith(prefix)},
        )
        places = {name: n for name, n in numbers.items() if not name.startswith(prefix)}
        self._progress = _Progress(
            **places, tail=tensors["tail"].tolist(), logits=tensors["logits"].to(self._model.device)
        )
        self._generator.set_state(tensors["generator"])
        self._saved = self._progress.read + self._progress.written


class TransformerStream:
    """The reference transformer behind `StreamModel`.

    Raises:
        ConfigError: a layer keeps all keys; allowed are Infini-attention and windows.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._state: TransformerState | None = None
        for layer, config in enumerate(self._configs()):
            name = mechanism_of_config(config).name
            if name not in _BOUNDED:
                raise ConfigError(
                    f"model: layer {layer} has {name} attention, whose state grows with the text. "
                    f"Allowed in a stream: {' and '.join(_BOUNDED)}. Train a model with those, or "
                    "generate without --stream."
                )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._model.embedding.weight.device

    def read(self, token_ids: Tensor) -> Tensor:
        """Logits (vocab_size,) after the last of these tokens (1, n)."""
        out = self._model.forward_chunk(token_ids, self._state, num_logits=1)
        self._state = out.final_state
        return out.logits[0, -1].float()

    def parts(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and numbers of all layers."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, int] = {}
        if self._state is not None:
            numbers["seen"] = self._state.seen
            for layer, state in enumerate(self._state.layers):
                own = state.parts()
                tensors |= {f"{layer}.{name}": tensor for name, tensor in own[0].items()}
                numbers |= {f"{layer}.{name}": number for name, number in own[1].items()}
        return tensors, numbers

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """Take over what `parts` gave."""
        layers = []
        for layer, config in enumerate(self._configs()):
            prefix = f"{layer}."
            state_class: Any = mechanism_of_config(config).state_class
            layers.append(state_class.from_parts(
                config,
                {n.removeprefix(prefix): t.to(self.device)
                 for n, t in tensors.items() if n.startswith(prefix)},
                {n.removeprefix(prefix): i for n, i in numbers.items() if n.startswith(prefix)},
            ))  # fmt: skip
        self._state = TransformerState(layers=tuple(layers), seen=numbers["seen"])

    def fingerprint(self) -> str:
        """Of weights and config."""
        return fingerprint(self._model, self._model.config.to_json())

    def _configs(self) -> list[Any]:
        blocks = cast(list[Block], self._model.blocks)
        return [block.attention.mechanism.config for block in blocks]


def fingerprint(model: nn.Module, settings: str = "") -> str:
    """sha256 of settings and of some numbers of every parameter; tells models apart, cheaply."""
    digest = hashlib.sha256(settings.encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = torch.cat((flat[:32], flat[-32:])).double().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(bytes(some.view(torch.uint8).tolist()))
    return digest.hexdigest()


def _appending(path: Path, size: int) -> Any:
    """Open a file to be written on from byte `size` on; what is behind is cut off."""
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        raise ConfigError(
            f"folder: {path} has {found} bytes, but the state beside it was saved when it had "
            f"{size}. Allowed: the files that a stream left. Put the file back, or begin in "
            "another folder."
        )
    handle = path.open("r+b" if path.exists() else "w+b")
    handle.truncate(size)
    handle.seek(size)
    return handle
