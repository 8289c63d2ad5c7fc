"""Training of one variant: any step can be repeated, so a killed run goes on as if it had not been.

The batch of a step depends on seed and step alone. Loss: the digits of the answer, the second
mention of the key in the needle (a copy that local attention learns first), and some of the text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...infini.state import InfiniState
from ...models.transformer import Transformer, TransformerState
from ...train.checkpoint import Progress, load_checkpoint, save_checkpoint
from ...train.log import TrainLog
from ..clock import Clock, OutOfTime
from .sizes import PasskeySizes, Stage
from .task import DIGITS, Prompts, Words, draw_prompts
from .variants import Variant, build_model, gate_shares, hidden_after, set_segments

__all__ = ["Trained", "Training", "passkey_loss", "train_variant"]

_SEEDS = 1 << 22  # steps of one seed; those of training are odd, of questions even
_PREFILL_SEGMENTS = 16


class Trained(NamedTuple):
    """model: in eval mode, with the segments of the last stage. rows: the log."""

    model: Transformer
    rows: list[Mapping[str, Any]]


class Losses(NamedTuple):
    """total: what is minimised. answer, copy, text: nats. right: share of the answer's digits."""

    total: Tensor
    answer: Tensor
    copy: Tensor
    text: Tensor
    right: Tensor


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a run is made of; `book` holds the ids of the training texts, on the device."""

    variant: Variant
    seed: int
    steps: int
    sizes: PasskeySizes
    words: Words
    vocab_size: int
    book: Tensor
    device: torch.device
    dtype: torch.dtype


def passkey_loss(
    model: Transformer,
    words: Words,
    prompts: Prompts,
    sizes: PasskeySizes,
    state: TransformerState | None,
    seed: int,
) -> Losses:
    """The loss of a batch; logits are computed where there is a loss only."""
    ids, keys = prompts.ids, prompts.keys
    hidden = model.hidden(ids) if state is None else hidden_after(model, ids, state)[0]
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    digit = torch.arange(DIGITS, device=ids.device)
    second = len(words.before) + DIGITS + len(words.between) - 1
    draw = torch.Generator().manual_seed(seed)
    shape = (len(ids), sizes.text_places)
    places = torch.randint(ids.shape[1] - 1, shape, generator=draw).to(ids.device)

    def logits(columns: Tensor) -> Tensor:
        return F.linear(hidden[rows, columns], model.head.weight).flatten(0, 1).float()

    answers = logits(ids.shape[1] - DIGITS + digit.expand(len(ids), -1))
    answer = F.cross_entropy(answers, keys.flatten())
    copy = F.cross_entropy(logits(prompts.needle[:, None] + second + digit), keys.flatten())
    text = F.cross_entropy(logits(places), ids[rows, places + 1].flatten())
    right = (answers.argmax(-1) == keys.flatten()).float().mean()
    total = answer + sizes.copy_weight * copy + sizes.text_weight * text
    return Losses(total, answer.detach(), copy.detach(), text.detach(), right)


def train_variant(
    training: Training,
    folder: Path,
    *,
    clock: Clock,
    say: Callable[[str], None],
) -> Trained:
    """Train, or go on from the last checkpoint in `folder`.

    Raises:
        OutOfTime: the call's time is up; a checkpoint was written.
    """
    sizes, steps, seed = training.sizes, training.steps, training.seed
    model = build_model(
        training.variant, sizes.model, vocab_size=training.vocab_size,
        segment=sizes.stages[0].segment, seed=seed,
    ).to(training.device)  # fmt: skip
    optimizer = _optimizer(model, sizes, training.device)
    progress = load_checkpoint(folder, model, optimizer) or Progress(0, 0.0)
    folder.mkdir(parents=True, exist_ok=True)
    log = TrainLog(folder / "log.jsonl", step=progress.step)
    seconds, since = progress.seconds, time.monotonic()
    sums: list[Tensor] = []
    try:
        for step in range(progress.step, steps):
            stage = sizes.stage_at(step, steps)
            sums.append(_step(training, model, optimizer, stage, step))
            done = step + 1
            is_last = done == steps
            if done % sizes.log_every and not is_last:
                continue
            answer, copy, text, right = torch.stack(sums).mean(0).tolist()
            sums.clear()
            now = time.monotonic()
            seconds, since = seconds + now - since, now
            log.append({
                "kind": "train", "step": done, "segment": stage.segment, "length": stage.length,
                "answer": answer, "copy": copy, "text": text, "right": right,
                "seconds": round(seconds, 3), "gates": gate_shares(model),
            })  # fmt: skip
            if done % (10 * sizes.log_every) == 0 or is_last:
                say(
                    f"{training.variant.name}, seed {seed}: step {done} of {steps}, "
                    f"{stage.length} tokens, answer {answer:.3f} nats, {right:.1%} of digits"
                )
            over = clock.left is not None and clock.left <= 0.0
            if done % sizes.checkpoint_every == 0 or is_last or over:
                save_checkpoint(folder, model, optimizer, Progress(done, seconds))
                since = time.monotonic()
            if over and not is_last:
                raise OutOfTime
    finally:
        log.close()
    set_segments(model, sizes.segment)
    return Trained(model.eval(), list(log.rows))


def _step(
    training: Training,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    stage: Stage,
    step: int,
) -> Tensor:
    sizes = training.sizes
    set_segments(model, stage.segment)
    seed = 2 * (training.seed * _SEEDS + step) + 1
    prompts = draw_prompts(
        training.words, length=stage.length, count=max(1, sizes.tokens_per_step // stage.length),
        seed=seed, book=training.book, book_share=sizes.book_share, device=training.device,
    )  # fmt: skip
    with torch.autocast(
        training.device.type, dtype=torch.bfloat16, enabled=training.dtype is torch.bfloat16
    ):
        state = None
        grown = fill_growth(step, training.steps)
        if training.variant.prefilled and grown and step % 2:
            state = filled_state(training, model, stage, prompts, seed, grown)
        losses = passkey_loss(model, training.words, prompts, sizes, state, seed)
    losses.total.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    warm = min(1.0, (step + 1) / min(sizes.warmup, training.steps))
    left = min(1.0, 2.0 * (training.steps - step) / training.steps)  # falls in the second half
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * warm * (left if group["falls"] else 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack([losses.answer, losses.copy, losses.text, losses.right])


def fill_growth(step: int, steps: int) -> float:
    """How far filled memories have grown, 0 .. 1 on a logarithmic scale.

    From the start on they keep a model from learning to read the memory at all; so the first
    third of the steps goes without, and they are as long as they get after five sixths.
    """
    return min(1.0, max(0.0, 2 * step / steps - 2 / 3))


@torch.no_grad()
def filled_state(
    training: Training,
    model: Transformer,
    stage: Stage,
    prompts: Prompts,
    seed: int,
    grown: float,
) -> TransformerState:
    """Memories as after a long stretch of each prompt's kind of filler.

    A stretch of 16 segments is read, and memory and normaliser are scaled by numbers drawn
    log-uniformly, up to those of the longest prompt that is asked at `grown` = 1. For periodic
    filler and the linear rule this is what so long a text leaves behind; for books it is an
    approximation.
    """
    length = _PREFILL_SEGMENTS * stage.segment
    draw = torch.Generator().manual_seed(seed)
    start = int(torch.randint(len(training.book) - length, (), generator=draw))
    filler = training.words.filler.to(training.device)
    periodic = filler[torch.arange(length, device=training.device) % len(filler)]
    ids = torch.stack((periodic, training.book[start : start + length].long()))
    _, state = hidden_after(model, ids, None)
    most = max(1.0, max(training.sizes.trials) / length)
    scale = most ** (grown * torch.rand(len(prompts.ids), generator=draw))
    scale = scale.to(training.device)
    layers = []
    for layer in cast(tuple[InfiniState, ...], state.layers):
        own = layer.reorder(prompts.natural.long())
        layers.append(
            own._replace(
                memory=own.memory * scale[:, None, None, None],
                normaliser=own.normaliser * scale[:, None, None],
            )
        )
    return TransformerState(layers=tuple(layers), seen=state.seen)


def _optimizer(model: Transformer, sizes: PasskeySizes, device: torch.device) -> torch.optim.AdamW:
    gates = [p for n, p in model.named_parameters() if "longspan_gate" in n and p.requires_grad]
    others = [p for n, p in model.named_parameters() if "longspan_gate" not in n]
    groups: list[dict[str, Any]] = [
        {"params": others, "peak": sizes.learning_rate, "falls": True, "weight_decay": 0.01}
    ]
    if gates:
        groups.append(
            {"params": gates, "peak": sizes.gate_rate, "falls": False, "weight_decay": 0.0}
        )
    return torch.optim.AdamW(groups, lr=sizes.learning_rate, betas=(0.9, 0.95),
                             fused=device.type == "cuda")  # fmt: skip
