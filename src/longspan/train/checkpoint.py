"""Checkpoints: weights and optimizer state in safetensors, the rest in JSON, whole or not at all.

checkpoints/step-000200/ is written beside its place and renamed into it, so that a run killed at
any moment leaves only whole checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError

__all__ = ["Progress", "load_checkpoint", "save_checkpoint"]

_FORMAT = "longspan-checkpoint-1"


class Progress(NamedTuple):
    """step: steps done. seconds: spent in them, over all runs."""

    step: int
    seconds: float


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> Path:
    """Write a checkpoint below `folder` and remove those before it."""
    from safetensors.torch import save_file

    home = folder / "checkpoints"
    home.mkdir(parents=True, exist_ok=True)
    target = home / f"step-{progress.step:06d}"
    aside = home / f".{target.name}.{os.getpid()}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    parameters = dict(model.named_parameters())
    save_file(_plain(parameters), aside / "model.safetensors")
    save_file(_plain(_optimizer_tensors(parameters, optimizer)), aside / "optimizer.safetensors")
    state = {"format": _FORMAT, **progress._asdict()}
    (aside / "state.json").write_text(json.dumps(state))
    for file in aside.iterdir():
        _sync(file)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)
    _sync(home)
    for other in home.iterdir():
        if other != target:
            shutil.rmtree(other, ignore_errors=True)
    return target


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress | None:
    """Put the newest checkpoint below `folder` into model and optimizer; None if there is none.

    Raises:
        ConfigError: it is of another model or format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found = sorted((folder / "checkpoints").glob("step-*"))
    if not found:
        return None
    newest = found[-1]
    try:
        state = json.loads((newest / "state.json").read_text())
        if state.pop("format", None) != _FORMAT:
            raise ValueError("another format")
        parameters = dict(model.named_parameters())
        weights = load_file(newest / "model.safetensors")
        if weights.keys() != parameters.keys():
            raise KeyError(f"parameters differ: {sorted(weights.keys() ^ parameters.keys())}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        tensors = load_file(newest / "optimizer.safetensors")
        _fill_optimizer(parameters, optimizer, tensors)
        return Progress(**state)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"out: the checkpoint {newest} cannot be read ({error}). Allowed: a checkpoint that "
            "the same command wrote. Use another folder, or remove that checkpoint."
        ) from error


def _optimizer_tensors(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _fill_optimizer(
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
) -> None:
    """Through `load_state_dict`, which puts each number where the optimizer wants it."""
    whole: dict[str, Any] = optimizer.state_dict()
    places = {id(p): i for i, p in enumerate(_in_order(optimizer))}
    whole["state"] = {}
    for full, tensor in tensors.items():
        name, key = full.rsplit("/", 1)
        whole["state"].setdefault(places[id(parameters[name])], {})[key] = tensor
    optimizer.load_state_dict(whole)


def _in_order(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _plain(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
