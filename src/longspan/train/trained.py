"""Reference transformers with a tokenizer: the small ones that come with longspan, and folders."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import ConfigError, nearest_name
from ..models.shipped import shipped_models, tokenizer_of
from ..models.transformer import Transformer
from .tokenizer import load_tokenizer

__all__ = ["TrainedModel", "load_trained", "with_settings"]


class TrainedModel(NamedTuple):
    """model: in eval mode. tokenizer: of the package tokenizers. name: as asked for."""

    model: Transformer
    tokenizer: Any
    name: str


def load_trained(
    name_or_folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TrainedModel:
    """Load a model that `longspan train` or a study made.

    Args:
        name_or_folder: a name of `shipped_models`, or a folder with model.safetensors and
            tokenizer.json (beside it or one folder up).
        dtype, device: of the weights.

    Raises:
        ConfigError: neither, or no tokenizer, or one of another vocabulary.
    """
    shipped = shipped_models()
    name = os.fspath(name_or_folder)
    folder = shipped.get(name, Path(name_or_folder))
    if not (folder / "model.safetensors").is_file():
        names = shipped or {"(none in this installation)": folder}
        raise ConfigError(
            f"model: {name!r} is neither a folder with a model.safetensors nor a model that comes "
            f"with longspan. {nearest_name(name, names)} Or give the model folder of a run of "
            "longspan train."
        )
    path = tokenizer_of(folder)
    if path is None:
        raise ConfigError(
            f"model: {folder} has no tokenizer.json. Allowed: a folder of longspan train, "
            "which has one. Copy it from the run."
        )
    tokenizer = load_tokenizer(path)
    model = Transformer.load(folder, device=device).to(dtype)
    if tokenizer.get_vocab_size() != model.config.vocab_size:
        raise ConfigError(
            f"model: {path} has {tokenizer.get_vocab_size()} entries, the model "
            f"{model.config.vocab_size}. Allowed: the tokenizer of this model. Copy it again."
        )
    return TrainedModel(model=model, tokenizer=tokenizer, name=name)


def with_settings(model: Transformer, **changes: Any) -> Transformer:
    """The same weights (shared, not copied) in a model whose config has other settings.

    Args:
        model: stays as it is.
        **changes: fields of TransformerConfig that no weight depends on: attention, rope_scaling.
    """
    other = Transformer(dataclasses.replace(model.config, **changes))
    other.load_state_dict(model.state_dict(), assign=True)
    if model.config.tie_embeddings:
        other.head.weight = other.embedding.weight
    return other.eval()
