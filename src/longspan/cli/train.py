"""`longspan train`: train the reference transformer on texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ConfigError, nearest_name
from ._console import console, errors, progress_bar, step
from ._inputs import check_device, run_folder

if TYPE_CHECKING:
    from ..models.transformer_config import TransformerConfig
    from ..train.tokens import TokenFile

__all__ = ["train"]


def train(
    *,
    text: Path,
    out: Path | None = None,
    attention: str = "stick_breaking",
    positions: str | None = None,
    steps: int = 1000,
    length: int = 2048,
    batch: int = 32,
    micro_batch: int | None = None,
    width: int = 512,
    layers: int = 6,
    heads: int = 8,
    vocabulary: int = 8192,
    tokenizer: Path | None = None,
    start: str | None = None,
    learning_rate: float = 2e-3,
    seed: int = 0,
    log_every: int = 10,
    checkpoint_every: int = 100,
    stop_after: float | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> int:
    """Train a language model with a mechanism. The same command again goes on where it stopped.

    Parameters
    ----------
    text
        What to train on: a .txt file, a folder of them, or an archive.
    out
        Folder of the run. Give it, so that the same command can go on after a kill.
    attention
        A mechanism and its settings, e.g. window:window=512, for all layers.
    positions
        rope, none, alibi or forget. Default: none for stick_breaking, else rope.
    steps
        Optimizer steps.
    length
        Tokens per sequence.
    batch
        Sequences per step.
    micro_batch
        Sequences at a time, if memory is short.
    width, layers, heads
        Sizes of the model.
    vocabulary
        Entries of the byte-pair tokenizer that is trained on the texts.
    tokenizer
        Use this tokenizer.json instead.
    start
        Begin with the weights of this model (a folder of longspan train, or a name such as
        longspan-rope) under another attention; its sizes, positions and tokenizer are taken.
    learning_rate
        Its peak.
    seed
        Of the weights and of the order of the text.
    log_every, checkpoint_every
        In steps; the second is a multiple of the first.
    stop_after
        Seconds after which to write a checkpoint and stop.
    device
        cpu or cuda.
    dtype
        float32 or bfloat16. Default: bfloat16 on a GPU.
    """
    from ..hf.plan import parse_config
    from ..models.transformer_config import TransformerConfig
    from ..train import Batches, TrainConfig
    from ..train import train as run_training

    where = check_device(device)
    folder = run_folder(out, "train", attention.partition(":")[0])
    config = parse_config(attention)
    if positions is None:
        positions = "none" if attention.startswith("stick_breaking") else "rope"
    given = None if start is None else _started(start)
    if given is not None:
        tokenizer = given.tokenizer
    tokens = _tokens(text, folder, vocabulary, tokenizer)
    model = TransformerConfig(
        vocab_size=tokens.vocab_size, width=width, layers=layers, heads=heads,
        positions=positions, attention=config,
    )  # fmt: skip
    if given is not None:
        model = dataclasses.replace(given.config, attention=config)
    settings = TrainConfig(
        model=model,
        steps=steps,
        length=length,
        batch_size=batch,
        micro_batch=micro_batch,
        learning_rate=learning_rate,
        warmup_steps=max(1, steps // 10),
        seed=seed,
        dtype=dtype or ("bfloat16" if where.type == "cuda" else "float32"),
        compile=where.type == "cuda",
        log_every=log_every,
        checkpoint_every=checkpoint_every,
    )
    source = Batches(tokens, length=length, batch_size=batch, seed=seed)
    with progress_bar() as bar:
        task = bar.add_task("training", total=float(steps))

        def listener(row: Mapping[str, Any]) -> None:
            share = "" if row["mfu"] is None else f", {100 * row['mfu']:.0f} % of peak"
            bar.update(
                task,
                completed=float(row["step"]),
                description=f"step {row['step']}: loss {row['loss']:.4f}, "
                f"{row['tokens_per_second']:,.0f} tokens/s{share}",
            )

        try:
            result = run_training(
                settings, source, folder,
                device="cpu" if where.type == "cpu" else None,
                listener=listener, time_limit=stop_after,
                start=None if given is None else given.folder,
            )  # fmt: skip
        except KeyboardInterrupt:
            errors.print(f"Interrupted. To go on: the same command with --out {folder}")
            raise
    if not result.is_finished:
        console.print(f"Stopped. To go on: the same command with --out {folder}", soft_wrap=True)
        return 0
    (folder / "model" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    console.print(f"Loss {result.rows[-1]['loss']:.4f} after {steps} steps.")
    console.print(f"Model: {(folder / 'model').absolute()}", soft_wrap=True)
    console.print(f"Try it: longspan generate --model {folder / 'model'}", soft_wrap=True)
    return 0


class _Start(NamedTuple):
    folder: Path
    config: TransformerConfig
    tokenizer: Path


def _started(name: str) -> _Start:
    """The model that a run begins with."""
    from ..models.shipped import is_longspan_model, shipped_models, tokenizer_of
    from ..models.transformer_config import TransformerConfig

    shipped = shipped_models()
    folder = shipped.get(name, Path(name))
    tokenizer = tokenizer_of(folder)
    if not is_longspan_model(folder) or tokenizer is None:
        raise ConfigError(
            f"--start: {name!r} is no model of longspan train with its tokenizer. "
            f"{nearest_name(name, shipped)} Or give the model folder of a run."
        )
    config = TransformerConfig.from_json((folder / "config.json").read_text(encoding="utf-8"))
    return _Start(folder, config, tokenizer)


def _tokens(text: Path, folder: Path, vocabulary: int, tokenizer: Path | None) -> TokenFile:
    """The token file of the run, made the first time."""
    import hashlib

    from ..eval.data import iter_texts
    from ..train import TokenFile, load_tokenizer, train_tokenizer, write_tokens

    target, kept = folder / "tokens.npy", folder / "tokenizer.json"
    if target.exists() and kept.exists():
        there = TokenFile.open(target)
        digest = hashlib.sha256()
        for part in iter_texts(text):
            digest.update(part.sha256.encode())
        if there.sha256 != digest.hexdigest():
            raise ConfigError(
                f"--text: {folder} holds a run on other texts. Allowed: the same texts, to go on "
                "with it, or an empty folder. Pass another folder with --out."
            )
        return there
    folder.mkdir(parents=True, exist_ok=True)
    with step("tokenizer"):
        if tokenizer is not None:
            load_tokenizer(tokenizer)
            kept.write_bytes(tokenizer.read_bytes())
            made = load_tokenizer(kept)
        else:
            made = train_tokenizer(
                (part.text for part in iter_texts(text)), kept, vocab_size=vocabulary
            )
    with step("tokens"):
        return write_tokens(iter_texts(text), made, target)
