"""What `longspan generate --stream` does: a model with a bounded state, a text, a folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError
from ._console import console, errors, progress_bar, step

__all__ = ["stream"]


class _Speaker(NamedTuple):
    """model: a `StreamModel`. start: ids that begin a text. encode, decode: of its tokenizer."""

    model: Any
    start: list[int]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def stream(
    model: str,
    folder: Path,
    *,
    prompt: str | None,
    text: Path | None,
    context: int | None,
    tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    chunk: int,
    save_every: int,
    adapter: Path | None,
    attention: str | None,
    device: Any,
    dtype: str | None,
) -> int:
    """Read, write and save; see `longspan.cli.generate` for the options."""
    from ..models.stream import TextStream

    source = _source(prompt, text)
    speaker = _speaker(model, adapter, attention, device, dtype)
    run = TextStream(
        speaker.model, speaker.encode, speaker.decode, source, folder, start=speaker.start,
        context=context, temperature=temperature, top_k=top_k if temperature > 0 else None,
        seed=seed, chunk_size=chunk, save_every=save_every,
    )  # fmt: skip
    begin = time.perf_counter()
    with progress_bar() as bar:
        task = bar.add_task("reading", total=None)
        report = run.run(
            tokens,
            on_read=lambda count: bar.update(task, description=f"{count:,} tokens read"),
            on_text=lambda piece: console.print(piece, end="", markup=False, soft_wrap=True),
        )
    console.print()
    seconds = time.perf_counter() - begin
    size = (folder / "state.safetensors").stat().st_size
    before = f", {report.resumed:,} of them in earlier runs" if report.resumed else ""
    errors.print(
        f"{report.read:,} tokens read and {report.written:,} written{before}; {seconds:.1f} s. "
        f"State: {size / 1e6:.2f} MB in {folder}. The same command goes on with a larger --tokens.",
        soft_wrap=True,
    )
    return 0


def _source(prompt: str | None, text: Path | None) -> Any:
    from ..eval.data import load_text
    from ..models.text_source import TextSource

    if prompt is not None:
        return TextSource(prompt.encode())
    plain = text is not None and text.is_file() and text.suffix not in (".xz", ".jsonl")
    return TextSource(text if plain and text is not None else load_text(text).text.encode())


def _speaker(
    name: str, adapter: Path | None, attention: str | None, device: Any, dtype: str | None
) -> _Speaker:
    from ._inputs import check_dtype

    precision = check_dtype(dtype, device)
    if _is_trained_here(name):
        if adapter is not None or attention is not None:
            raise ConfigError(
                f"--adapter, --attention: came with {name!r}, whose attention is part of its "
                "config. Allowed: for Hugging Face models. Leave them out."
            )
        return _trained(name, device, precision)
    if (adapter is None) == (attention is None):
        raise ConfigError(
            f"--adapter: a Hugging Face model such as {name!r} streams with a memory or a window. "
            "Allowed: exactly one of --adapter (a folder of longspan.hf.save_adapter) and "
            "--attention (e.g. infini:segment_length=1024 or window:window=1024). Give one."
        )
    return _pretrained(name, adapter, attention, device, precision)


def _is_trained_here(name: str) -> bool:
    """Whether a model is one of longspan's reference transformers, shipped or in a folder."""
    from ..models.shipped import is_longspan_model, shipped_models

    if Path(name).is_dir():
        return is_longspan_model(Path(name))
    return name in shipped_models() or name.startswith("longspan-")


def _trained(name: str, device: Any, dtype: Any) -> _Speaker:
    from ..models.stream import TransformerStream
    from ..train.trained import load_trained

    with step("loading"):
        loaded = load_trained(name, device=device, dtype=dtype)

    def encode(text: str) -> list[int]:
        ids: list[int] = loaded.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return _Speaker(TransformerStream(loaded.model), [0], encode, loaded.tokenizer.decode)


def _pretrained(
    name: str, adapter: Path | None, attention: str | None, device: Any, dtype: Any
) -> _Speaker:
    from .. import hf
    from ._inputs import load_model

    loaded = load_model(name, device, dtype)
    if loaded.notice:
        errors.print(f"note: {loaded.notice}", soft_wrap=True)
    if adapter is not None:
        hf.load_adapter(loaded.model, adapter)
    else:
        hf.patch(loaded.model, attention)
    tokenizer = loaded.tokenizer
    start = [] if not (ids := tokenizer("").input_ids) else [i for i in ids if i != _end(tokenizer)]

    def encode(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return found

    return _Speaker(hf.PatchedStream(loaded.model), start, encode, tokenizer.decode)


def _end(tokenizer: Any) -> int | None:
    """The id that closes a text, which some tokenizers add behind everything."""
    same = tokenizer.eos_token_id == tokenizer.bos_token_id
    return None if same else tokenizer.eos_token_id
