"""`longspan generate`: continue a text, also one of any length in bounded memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ._console import console, errors, step
from ._inputs import check_device

if TYPE_CHECKING:
    from ..models.transformer import Transformer

__all__ = ["generate"]


def generate(
    *,
    model: str = "longspan-stick-breaking",
    prompt: str | None = None,
    text: Path | None = None,
    context: int | None = None,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 40,
    seed: int = 0,
    chunk: int = 2048,
    early_stop: float | None = None,
    stream: Path | None = None,
    save_every: int = 4096,
    adapter: Path | None = None,
    attention: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> int:
    """Continue a prompt, or a book after its first tokens. Small models write small prose.

    Parameters
    ----------
    model
        A model that comes with longspan, or the model folder of a run of `longspan train`; with
        --stream also a Hugging Face model: a name from `longspan models`, a folder, a hub name.
    prompt
        What to continue.
    text
        Continue this text file instead; without it and without a prompt, the bundled book.
    context
        Tokens of the text to read first. Default: 1024; with --stream, the whole text.
    tokens
        How many to write.
    temperature
        0 takes the likeliest token.
    top_k
        Draw among so many.
    seed
        Of the draws.
    chunk
        Tokens read at a time.
    early_stop
        For stick-breaking models: stop reading back when less than this share is left, e.g. 1e-4.
    stream
        Folder of a stream: read and write in memory that does not grow with the text. The same
        command goes on after a kill, and with a larger --tokens. For models with Infini-attention
        or windows.
    save_every
        Tokens between two saves of a stream.
    adapter
        Folder of longspan.hf.save_adapter, for a Hugging Face model in a stream.
    attention
        Attention to put on a Hugging Face model in a stream, e.g. window:window=1024.
    device
        cpu or cuda.
    dtype
        float32, bfloat16 or float16, in a stream. Default: float32 on a CPU, else bfloat16.
    """
    import torch

    from ..eval.data import load_text
    from ..models.generation import generate as run
    from ..train.trained import load_trained

    if prompt is not None and text is not None:
        raise ConfigError("--prompt: came together with --text. Allowed: one of them. Drop one.")
    where = check_device(device)
    if stream is not None:
        from ._stream import stream as run_stream

        if early_stop is not None:
            raise ConfigError(
                "--early-stop: came with --stream. Allowed: without it, for stick-breaking models, "
                "whose state grows with the text. Drop one."
            )
        return run_stream(
            model, stream, prompt=prompt, text=text, context=context, tokens=tokens,
            temperature=temperature, top_k=top_k, seed=seed, chunk=chunk, save_every=save_every,
            adapter=adapter, attention=attention, device=where, dtype=dtype,
        )  # fmt: skip
    for option, value in (("--adapter", adapter), ("--attention", attention), ("--dtype", dtype)):
        if value is not None:
            raise ConfigError(
                f"{option}: {value} came without --stream. Allowed: in a stream. Add --stream "
                "FOLDER, or leave it out."
            )
    context = 1024 if context is None else context
    with step("loading"):
        loaded = load_trained(model, device=where)
    net = loaded.model
    if early_stop is not None:
        net = _stopped(net, early_stop)
    if prompt is not None:
        ids = loaded.tokenizer.encode(prompt).ids
    else:
        document = load_text(text)
        ids = loaded.tokenizer.encode(document.text).ids
        if len(ids) < context:
            raise ConfigError(
                f"--context: {context} came, but {document.name} has {len(ids)} tokens. Allowed: "
                f"up to {len(ids)}. Ask for fewer."
            )
        ids = ids[:context]
    read = torch.tensor([[0, *ids]], device=where)
    begin = time.perf_counter()
    with step(f"reading {read.shape[1]} tokens, writing {tokens}"):
        out = run(
            net, read, tokens, temperature=temperature, top_k=top_k,
            seed=seed if temperature > 0 else None, chunk_size=chunk,
        )  # fmt: skip
    seconds = time.perf_counter() - begin
    written = out[0, read.shape[1] :].tolist()
    shown = prompt if prompt is not None else "\u2026 " + loaded.tokenizer.decode(ids[-60:])
    console.print(shown, end="", markup=False, style="dim", soft_wrap=True)
    console.print(loaded.tokenizer.decode(written), markup=False, soft_wrap=True)
    errors.print(f"{read.shape[1]} tokens read and {tokens} written in {seconds:.1f} s")
    return 0


def _stopped(model: Transformer, early_stop: float) -> Transformer:
    import dataclasses

    from ..stick_breaking.config import StickBreakingConfig
    from ..train.trained import with_settings

    attention = model.config.attention
    if not isinstance(attention, StickBreakingConfig):
        raise ConfigError(
            "--early-stop: came with a model of another mechanism. Allowed: stick-breaking "
            "models. Leave it out."
        )
    return with_settings(model, attention=dataclasses.replace(attention, early_stop=early_stop))
