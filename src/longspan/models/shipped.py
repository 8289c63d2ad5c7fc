"""The small models inside the package, and what attention a longspan model was trained with.

Standard library only.
"""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

__all__ = ["is_longspan_model", "native_mechanism", "shipped_models", "tokenizer_of"]

_FORMAT = "longspan-transformer-1"


def shipped_models() -> dict[str, Path]:
    """Folders of the models inside the package, by name; they share one tokenizer."""
    home = Path(str(files(__package__).joinpath("shipped")))
    if not home.is_dir():
        return {}
    folders = sorted(path for path in home.iterdir() if (path / "model.safetensors").is_file())
    return {f"longspan-{path.name}": path for path in folders}


def is_longspan_model(folder: Path) -> bool:
    """Whether a folder holds a reference transformer that `Transformer.save` wrote."""
    return _settings(folder).get("format") == _FORMAT


def native_mechanism(name_or_folder: str | os.PathLike[str]) -> str | None:
    """The mechanism a longspan model was trained with; None for softmax and other models."""
    folder = shipped_models().get(os.fspath(name_or_folder), Path(name_or_folder))
    settings = _settings(folder)
    attention = settings.get("attention") if settings.get("format") == _FORMAT else None
    if isinstance(attention, list):
        attention = attention[0] if attention else None
    name = (attention or {}).get("mechanism", "exact")
    return None if name == "exact" else str(name)


def tokenizer_of(folder: Path) -> Path | None:
    """The tokenizer.json beside a model or one folder up."""
    beside = (folder / "tokenizer.json", folder.parent / "tokenizer.json")
    return next((path for path in beside if path.is_file()), None)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
