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

from ..errors import ConfigError
from ._console import errors, step

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


def load_inputs(
    model: str,
    text: Path | None,
    *,
    num_tokens: int,
    device: str | None,
    at: str = "--length",
) -> Inputs:
    """Read the text first (cheap to refuse), then the model, then take the first tokens.

    Args:
        model: name, folder or hub name, as `longspan.models.load` takes.
        text: a UTF-8 file; default: the book in the package.
        num_tokens: tokens to take from the start of the text.
        device: where the model goes.
        at: the option that asked for `num_tokens`, for messages.
    """
    from ..eval.data import BOOKS, load_text, take_tokens
    from ..eval.jobs import Subject
    from ..models import load

    document = load_text(text)
    where = check_device(device)
    with step(f"loading {model}"):
        loaded = load(model, device=where)
    try:
        tokens = take_tokens(document, loaded.tokenizer, num_tokens)
    except ConfigError as error:
        raise ConfigError(f"{at}: {num_tokens} came. {error}") from error
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if limit and num_tokens > limit:
        errors.print(
            f"note: {at} {num_tokens} is beyond the {limit} tokens this model was made for; "
            "its losses grow there under exact attention, too."
        )
    facts = {
        "model": loaded.name,
        "model_class": type(loaded.model).__name__,
        "num_parameters": sum(p.numel() for p in loaded.model.parameters()),
        "text": BOOKS.get(document.name, document.name),
        "text_sha256": document.sha256,
    }
    subject = Subject(
        model=loaded.model, tokens=tokens, facts=facts, notes={"command": command_line()}
    )
    return Inputs(tokenizer=loaded.tokenizer, text=document.text, subject=subject)


def plan(attention: Sequence[str] | None, default: Sequence[str]) -> list[Any]:
    """Candidates from specs, exact attention first."""
    from ..eval.compare_plan import plan_candidates

    return plan_candidates(attention or default)
