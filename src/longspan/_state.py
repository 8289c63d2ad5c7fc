"""Save and load streaming states: one safetensors file, its settings inside, checked on load."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError

__all__ = ["load_state", "save_state"]

_FORMAT = "longspan-state-1"


def save_state(
    path: str | os.PathLike[str],
    kind: str,
    config: Any,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, int],
) -> None:
    """Write a state; the file appears whole or not at all (written aside, then renamed).

    Args:
        path: target file.
        kind: class name of the state.
        config: frozen dataclass of the settings that the state depends on.
        tensors: name -> tensor.
        numbers: name -> int, e.g. how many tokens were seen.
    """
    from safetensors.torch import save_file

    header = {
        "format": _FORMAT,
        "kind": kind,
        "config": json.dumps(dataclasses.asdict(config), sort_keys=True),
        "numbers": json.dumps(dict(numbers), sort_keys=True),
    }
    target = Path(path)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, aside, metadata=header)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def load_state(
    path: str | os.PathLike[str],
    kind: str,
    config: Any,
    *,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Read what `save_state` wrote.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: not a state file, a state of another kind, or made with other settings; the
            message names each setting that differs.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).exists():
        raise FileNotFoundError(f"path: {path} does not exist; pass a file written by save().")
    try:
        with safe_open(path, framework="pt", device=str(device)) as handle:
            header = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigError(
            f"path: {path} is not a readable safetensors file ({error}). "
            "It must be a file written by save(); it may be cut short: save the state again."
        ) from error
    if header.get("format") != _FORMAT or header.get("kind") != kind:
        raise ConfigError(
            f"path: {path} holds {header.get('kind', 'no longspan state')!r}; expected a {kind}. "
            f"Pass a file written by {kind}.save()."
        )
    saved, wanted = json.loads(header["config"]), dataclasses.asdict(config)
    different = sorted(n for n in {*saved, *wanted} if saved.get(n) != wanted.get(n))
    if different:
        parts = ", ".join(f"{n} is {saved.get(n)!r}, not {wanted.get(n)!r}" for n in different)
        raise ConfigError(
            f"config: the state in {path} was made with other settings: {parts}. "
            "Load it with the settings it was made with, or start from an empty state."
        )
    return tensors, json.loads(header["numbers"])
