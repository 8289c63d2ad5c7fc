"""What commands need before they measure: a checked model, text and list of mechanisms."""

from __future__ import annotations

import datetime
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, nearest_name
from ._console import errors, progress_bar

if TYPE_CHECKING:
    from ..eval.jobs import Subject

__all__ = ["Inputs", "check_length", "command_line", "load_inputs", "numbers", "run_folder"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """A model with its tokenizer, and the text; `subject` has the tokens that are measured."""

    tokenizer: Any
    text: str
    subject: Subject


def check_length(name: str, length: int, *, least: int = 2) -> int:
    """Refuse a number of tokens that is too small to measure anything."""
    if length < least:
        raise ConfigError(
            f"{name}: {length} came. Allowed: {least} or more (one token to read, one to predict). "
            f"Pass for example {name} 4096."
        )
    return length


def numbers(name: str, text: str, kind: type[int] | type[float] = int) -> list[Any]:
    """Parse "0,5,10" into numbers."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(
            f"{name}: {text!r} came. Allowed: {what} with commas between them. "
            f"Pass for example {name} {'0,5,10' if kind is int else '0,0.5,1'}."
        ) from None


def command_line() -> str:
    """The command as it can be typed again."""
    return shlex.join(["longspan", *sys.argv[1:]])


def run_folder(out: Path | None, *parts: object) -> Path:
    """The folder of a run: `out`, or runs/<parts>-<date>-<time>, which is new each time."""
    if out is not None:
        return out
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    name = "-".join(re.sub(r"[^\w.]+", "-", str(part)).strip("-") for part in parts)
    return Path("runs") / f"{name}-{stamp}"


def check_device(device: str | None) -> Any:
    """The torch device to use; the first GPU if there is one and nothing was asked for."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError) as error:
        allowed = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ConfigError(
            f"--device: {device!r} came, which this machine or this torch does not have. "
            f"Allowed: {', '.join(allowed)}. Leave --device out to let longspan choose."
        ) from error
    return wanted


def check_dtype(dtype: str | None, device: Any) -> Any:
    """The torch dtype of the weights: float32 on a CPU, bfloat16 elsewhere, unless asked for."""
    import torch

    allowed = ("float32", "bfloat16", "float16")
    name = dtype or ("float32" if device.type == "cpu" else "bfloat16")
    if name not in allowed:
        raise ConfigError(f"--dtype: {name!r} came. {nearest_name(name, allowed)}")
    return getattr(torch, name)


def load_inputs(
    model: str,
    text: Path | None,
    *,
    num_tokens: int,
    device: str | None,
    dtype: str | None = None,
    at: str = "--length",
) -> Inputs:
    """Read the text first (cheap to refuse), then the model, then take the first tokens.

    Args:
        model: name, folder or hub name, as `longspan.models.load` takes.
        text: what `longspan.eval.data.load_text` takes; default: the book in the package.
        num_tokens: tokens to take from the start of the text.
        device, dtype: where and in which precision the model runs.
        at: the option that asked for `num_tokens`, for messages.
    """
    from ..eval.data import BOOKS, load_text, take_tokens
    from ..eval.jobs import Subject

    document = load_text(text)
    where = check_device(device)
    loaded = load_model(model, where, check_dtype(dtype, where))
    try:
        tokens = take_tokens(document, loaded.tokenizer, num_tokens)
    except ConfigError as error:
        raise ConfigError(f"{at}: {num_tokens} came. {error}") from error
    if loaded.max_length and num_tokens > loaded.max_length:
        errors.print(
            f"note: {at} {num_tokens} is beyond the {loaded.max_length} tokens that this model was "
            "made for; its losses grow there under exact attention, too."
        )
    if loaded.notice:
        errors.print(f"note: {loaded.notice}", soft_wrap=True)
    facts = {
        "model": loaded.name,
        "model_class": type(loaded.model).__name__,
        "model_source": loaded.source,
        "model_revision": loaded.revision,
        "model_sha256": loaded.sha256,
        "num_parameters": sum(p.numel() for p in loaded.model.parameters()),
        "text": BOOKS.get(document.name, document.name),
        "text_sha256": document.sha256,
    }
    notes = {"command": command_line(), "model_notice": loaded.notice}
    subject = Subject(model=loaded.model, tokens=tokens, facts=facts, notes=notes)
    return Inputs(tokenizer=loaded.tokenizer, text=document.text, subject=subject)


def load_model(name: str, device: Any, dtype: Any) -> Any:
    """Load with a spinner, and a bar with time left while something is downloaded."""
    from ..models import load

    with progress_bar() as bar:
        task = bar.add_task(f"loading {name}", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        return load(name, device=device, dtype=dtype, progress=progress)


def plan(attention: Sequence[str] | None, length: int, *, model: str) -> list[Any]:
    """Candidates from specs, or those of the model and length; exact attention first."""
    from ..eval.compare_plan import default_attentions, plan_candidates
    from ..models.shipped import native_mechanism

    native = native_mechanism(model)
    if native is not None:
        every = ", every key" if native == "stick_breaking" else ""
        errors.print(f"note: exact means this model's own attention: {native}{every}.")
    default = default_attentions(length, native=native)
    return plan_candidates(attention or default, native=native)
