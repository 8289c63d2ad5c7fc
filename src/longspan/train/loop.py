"""The training loop: accelerate, bfloat16, checkpoints, and a log that a kill does not change."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, MissingExtraError
from ..models.transformer import Transformer
from .batches import Batch, BatchSource
from .checkpoint import Progress, load_checkpoint, save_checkpoint
from .config import TrainConfig
from .flops import model_flops_per_token, peak_flops
from .log import TrainLog
from .loss import LossModel

__all__ = ["TrainResult", "train"]

Row = Mapping[str, Any]
Listener = Callable[[Row], None]


class TrainResult(NamedTuple):
    """model: on its device. rows: the log. is_finished: False if the time limit came first."""

    model: Transformer
    rows: list[Row]
    is_finished: bool


@dataclass(kw_only=True)
class _Run:
    """What one process of a run holds."""

    config: TrainConfig
    accelerator: Any
    model: Transformer
    loss_model: LossModel
    prepared: Any
    optimizer: Any
    source: BatchSource
    compiled: str


def train(
    config: TrainConfig,
    source: BatchSource,
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    listener: Listener | None = None,
    time_limit: float | None = None,
    start: str | os.PathLike[str] | None = None,
) -> TrainResult:
    """Train a model, or go on where the same run in this folder stopped.

    Args:
        config: the run. Its JSON is kept in the folder; another one there is refused.
        source: of batches; the batch of a step must depend on the step alone.
        folder: gets train.json, log.jsonl, checkpoints/ and, at the end, model/.
        device: "cpu" or None for what accelerate picks (a GPU where there is one).
        listener: called with each row of the log.
        time_limit: seconds after which to write a checkpoint and return.
        start: folder of a saved model of the same sizes whose weights the run begins with,
            whatever its attention; what only the new attention learns (gates) starts as in a new
            model. Default: all drawn from the seed.

    Returns:
        TrainResult. The log has, every `log_every` steps: step, loss (mean since the row before,
        nats), learning_rate, grad_norm, tokens, seconds, tokens_per_second, mfu (share of the
        device's bfloat16 peak, None where the peak is not known), compiled.

    Raises:
        ConfigError: the folder holds another run.
        MissingExtraError: accelerate is not installed.

    Semantics:
        A run that is killed and started again repeats the steps after its last checkpoint and
        gives the same losses as an unbroken one, to the bit where the device's kernels are
        deterministic (tested on the CPU). Several processes (accelerate launch) share each batch.
    """
    begin = time.monotonic()
    home = Path(folder)
    run = _prepare(config, source, device)
    main = run.accelerator.is_main_process
    if main:
        _claim(home, config)
    run.accelerator.wait_for_everyone()
    progress = load_checkpoint(home, run.model, _inner(run.optimizer))
    if progress is None:
        progress = Progress(0, 0.0)
        if start is not None:
            _load_start(run.model, start)
    log = TrainLog(home / "log.jsonl", step=progress.step) if main else None
    try:
        step = progress.step
        if step < config.steps:
            if config.compile:
                run.compiled = _try_compile(run)
            step = _steps(run, home, progress, log, listener, begin, time_limit)
    finally:
        if log is not None:
            log.close()
    rows = list(log.rows) if log is not None else []
    finished = step >= config.steps
    if finished and main and not (home / "model" / "model.safetensors").exists():
        run.model.save(home / "model")
    run.loss_model.uncompile()
    return TrainResult(run.model, rows, finished)


def _steps(
    run: _Run,
    home: Path,
    progress: Progress,
    log: TrainLog | None,
    listener: Listener | None,
    begin: float,
    time_limit: float | None,
) -> int:
    config, device = run.config, run.accelerator.device
    losses = torch.zeros((), device=device)
    flops = model_flops_per_token(config.model, run.model.num_parameters, config.length)
    peak = peak_flops(device)
    seconds, since = progress.seconds, time.monotonic()
    run.prepared.train()
    for step in range(progress.step, config.steps):
        loss, norm = _step(run, step)
        losses += loss
        done = step + 1
        is_last = done == config.steps
        if done % config.log_every and not is_last:
            continue
        count = (done - 1) % config.log_every + 1
        mean = run.accelerator.reduce(losses, "mean").item() / count
        losses.zero_()
        now = time.monotonic()
        taken, since = now - since, now
        seconds += taken
        speed = count * config.tokens_per_step / taken
        row = {
            "kind": "train",
            "step": done,
            "loss": mean,
            "learning_rate": config.learning_rate_at(step),
            "grad_norm": float(norm),
            "tokens": done * config.tokens_per_step,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(speed, 1),
            "mfu": flops * speed / (peak * run.accelerator.num_processes) if peak else None,
            "compiled": run.compiled,
        }
        if log is not None:
            log.append(row)
            if listener:
                listener(row)
        over = time_limit is not None and now - begin > time_limit
        if done % config.checkpoint_every == 0 or is_last or over:
            if log is not None:
                save_checkpoint(home, run.model, _inner(run.optimizer), Progress(done, seconds))
            since = time.monotonic()
        if over and not is_last:
            return done
    return config.steps


def _step(run: _Run, step: int) -> tuple[Tensor, Tensor]:
    """Mean loss over the parts of the batch of this process, norm of the gradient."""
    config, accelerator = run.config, run.accelerator
    batch = _share(run.source.batch(step), accelerator)
    parts = _split(batch, config.micro_batch)
    total = torch.zeros((), device=accelerator.device)
    for index, part in enumerate(parts):
        weight = len(part.inputs) / len(batch.inputs)
        loss = weight * run.prepared(*_to_device(part, accelerator.device))
        if index < len(parts) - 1:
            with accelerator.no_sync(run.prepared):
                accelerator.backward(loss)
        else:
            accelerator.backward(loss)
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(run.prepared.parameters(), config.clip_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return total, norm


def _prepare(config: TrainConfig, source: BatchSource, device: torch.device | str | None) -> _Run:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingExtraError.for_module("training", str(error.name), "train") from error
    # LossModel casts: accelerate keeps one precision per process, whatever runs follow.
    accelerator = Accelerator(mixed_precision="no", cpu=str(device) == "cpu")
    if config.batch_size % accelerator.num_processes:
        raise ConfigError(
            f"batch_size: {config.batch_size} sequences cannot be shared by "
            f"{accelerator.num_processes} processes. Allowed: a multiple of their number."
        )
    model = Transformer(config.model, seed=config.seed).to(accelerator.device)
    optimizer = _adamw(model, config, accelerator.device)
    loss_model = LossModel(model, getattr(torch, config.dtype))
    prepared, wrapped = accelerator.prepare(loss_model, optimizer)
    return _Run(
        config=config,
        accelerator=accelerator,
        model=model,
        loss_model=loss_model,
        prepared=prepared,
        optimizer=wrapped,
        source=source,
        compiled="no",
    )


def _adamw(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=device.type == "cuda",
    )


def _load_start(model: Transformer, folder: str | os.PathLike[str]) -> None:
    given = Transformer.load(folder).state_dict()
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shared = {name for name in given if own.get(name) == given[name].shape}
    odd = [name for name in {**own, **given} if name not in shared and "longspan_" not in name]
    if odd:
        raise ConfigError(
            f"start: {folder} and the run do not have the same {odd[0]}. Allowed: a model of the "
            "same sizes; only the attention may be another. Use its own sizes."
        )
    model.load_state_dict({name: given[name].float() for name in shared}, strict=False)


def _try_compile(run: _Run) -> str:
    """Compile, and see one batch through forward and backward; plain torch if that fails."""
    limits = torch._dynamo.config  # one process may train many models of many shapes
    limits.recompile_limit = max(limits.recompile_limit, 64)
    run.loss_model.compile_parts()
    try:
        part = _split(_share(run.source.batch(0), run.accelerator), run.config.micro_batch)[0]
        loss = run.prepared(*_to_device(part, run.accelerator.device))
        run.accelerator.backward(loss)
        if not bool(torch.isfinite(loss)):
            raise RuntimeError(f"the compiled loss is {loss.item()}")
        return "yes"
    except Exception as error:  # compilers fail in many ways; training goes on without
        run.loss_model.uncompile()
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    finally:
        run.optimizer.zero_grad()


def _claim(home: Path, config: TrainConfig) -> None:
    """Write train.json, or check that the one there says the same."""
    home.mkdir(parents=True, exist_ok=True)
    path = home / "train.json"
    if path.exists():
        there = TrainConfig.from_json(path.read_text())
        if there != config:
            raise ConfigError(
                f"out: {home} holds a run with other settings. Allowed: the same settings, to go "
                "on with it, or an empty folder. Pass another folder with --out."
            )
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.write_text(config.to_json())
    os.replace(aside, path)


def _share(batch: Batch, accelerator: Any) -> Batch:
    each = len(batch.inputs) // accelerator.num_processes
    rows = slice(accelerator.process_index * each, (accelerator.process_index + 1) * each)
    return Batch(batch.inputs[rows], batch.targets[rows])


def _split(batch: Batch, size: int | None) -> list[Batch]:
    size = size or len(batch.inputs)
    parts = zip(torch.split(batch.inputs, size), torch.split(batch.targets, size), strict=True)
    return [Batch(inputs, targets) for inputs, targets in parts]


def _to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    if device.type == "cuda":
        batch = Batch(*(t.pin_memory() for t in batch))
    inputs, targets = (t.to(device, non_blocking=True) for t in batch)
    return inputs, targets


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself, without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)  # type: ignore[no-any-return]
