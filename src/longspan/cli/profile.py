"""`longspan profile`: how far back each head of a model reads, or how convolution-like it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, nearest_name
from ._console import console, step
from ._inputs import check_length, load_inputs, numbers, run_folder

if TYPE_CHECKING:
    from ..eval.jobs import Subject

__all__ = ["profile"]


def profile(
    *,
    model: str = "smollm2-135m",
    text: Path | None = None,
    attention: str = "exact",
    tokens: int = 2048,
    thresholds: str = "0.5,0.01,0.0001",
    measure: str = "spans",
    out: Path | None = None,
    device: str | None = None,
) -> int:
    """Measure the span of every head: after how many of the nearest keys its stick is spent.

    For a softmax model: after how many of them a given share of its mass is left. With
    --measure convolution: how well scores that depend on the distance reproduce its weights.

    Parameters
    ----------
    model
        A name from `longspan models`, a local folder, or a hub name.
    text
        A UTF-8 text file. Default: the book that comes with longspan.
    attention
        exact (the attention the model came with) or stick_breaking with its settings, for a
        model that was trained with it, e.g. stick_breaking:early_stop=0.0001.
    tokens
        Tokens of the text to read; the second half of them is measured.
    thresholds
        Shares of the stick or of the mass, e.g. 0.5,0.01.
    measure
        spans, or convolution (softmax models only; --attention and --thresholds play no role).
    out
        Folder of the run; the same folder again draws the rows that are there.
    device
        cpu, cuda, cuda:1.
    """
    from ..eval.rows import RowFile, provenance, settings_key
    from ..eval.span_report import span_headlines, write_span_page

    check_length("--tokens", tokens)
    if measure not in ("spans", "convolution"):
        raise ConfigError(
            f"--measure: {measure!r} came. {nearest_name(measure, ('spans', 'convolution'))}"
        )
    if measure == "convolution":
        return _profile_convolution(model, text, tokens, out, device)
    shares = numbers("--thresholds", thresholds, float)
    config = _stick_breaking_config(attention)
    inputs = load_inputs(model, text, num_tokens=tokens, device=device, at="--tokens")
    subject = inputs.subject
    settings = {
        **subject.facts,
        "kind": "spans",
        "label": attention,
        "length": tokens,
        "thresholds": shares,
    }
    key = settings_key(settings)
    folder = run_folder(out, "profile", model, tokens)
    with RowFile(folder / "rows.jsonl") as file:
        if file.find(key) is None:
            with step(f"reading {tokens} tokens"):
                rows = _measure(subject, config, shares)
            facts = {**settings, **subject.notes, **provenance(subject.model.device)}
            del facts["thresholds"]
            for row in rows:
                file.append({**facts, **row, "key": key})
        rows = [row for row in file.rows if row.get("key") == key]
        page = write_span_page(rows, folder / "spans.html")
    for line in span_headlines(rows):
        console.print(line, soft_wrap=True)
    console.print(f"Page: {page.absolute()}", soft_wrap=True)
    return 0


def _profile_convolution(
    model: str, text: Path | None, tokens: int, out: Path | None, device: str | None
) -> int:
    import torch

    from ..eval.convolution import convolution_profile
    from ..eval.convolution_report import convolution_headlines, write_convolution_page
    from ..eval.rows import RowFile, provenance, settings_key

    inputs = load_inputs(model, text, num_tokens=tokens, device=device, at="--tokens")
    subject = inputs.subject
    window = max(1, min(64, tokens // 16))
    settings = {**subject.facts, "kind": "convolution", "length": tokens, "window": window}
    key = settings_key(settings)
    folder = run_folder(out, "profile", model, tokens)
    with RowFile(folder / "rows.jsonl") as file:
        if file.find(key) is None:
            ids = torch.tensor([list(subject.tokens)], device=subject.model.device)
            with step(f"reading {tokens} tokens"):
                rows = convolution_profile(
                    subject.model, ids, window=window, rope_base=_rope_base(subject.model)
                )
            facts = {**settings, **subject.notes, **provenance(subject.model.device)}
            for row in rows:
                file.append({**facts, **row, "key": key})
        rows = [row for row in file.rows if row.get("key") == key]
        page = write_convolution_page(rows, folder / "convolution.html")
    for line in convolution_headlines(rows):
        console.print(line, soft_wrap=True)
    console.print(f"Page: {page.absolute()}", soft_wrap=True)
    return 0


def _rope_base(model: Any) -> float | None:
    """Base of the rotary embedding of the full-attention layers; None if the config has none."""
    config = model.config.get_text_config()
    known = getattr(config, "rope_parameters", None) or {}
    known = known.get("full_attention", known)
    base = known.get("rope_theta", getattr(config, "rope_theta", None))
    return None if base is None else float(base)


def _stick_breaking_config(attention: str) -> Any:
    """The config of the spec, or None for the model's own attention."""
    if attention.strip() == "exact":
        return None
    from ..hf.plan import parse_config
    from ..stick_breaking.config import StickBreakingConfig

    config = parse_config(attention)
    if not isinstance(config, StickBreakingConfig):
        raise ConfigError(
            f"--attention: {attention!r} came. Allowed: exact, stick_breaking (with settings). "
            "Spans of other mechanisms are not defined; use longspan compare."
        )
    return config


def _measure(subject: Subject, config: Any, thresholds: list[float]) -> list[dict[str, Any]]:
    import contextlib

    import torch

    from ..eval.spans import span_profile

    ids = torch.tensor([list(subject.tokens)], device=subject.model.device)
    with contextlib.ExitStack() as stack:
        if config is not None:
            from ..hf import patch

            stack.enter_context(patch(subject.model, config))
        return span_profile(subject.model, ids, thresholds=thresholds)
