"""GGUF to a folder of safetensors, once, by transformers' own reader."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, MissingExtraError

__all__ = ["convert_gguf", "quiet", "require_extras", "require_weights"]


def require_extras() -> None:
    """Raise MissingExtraError if transformers or gguf is not installed."""
    for module in ("transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError.for_module("longspan.models", module, "hf")


def convert_gguf(gguf: Path, folder: Path, *, name: str) -> None:
    """Write model, tokenizer and config of a GGUF file into an existing folder, in float32.

    Args:
        gguf: the file.
        folder: gets config.json, model.safetensors and the tokenizer files.
        name: what the config calls the model.

    Raises:
        ConfigError: the file lacks tensors of its architecture, which transformers would fill with
            random numbers.
        OSError: among others ENOSPC.
    """
    import torch
    import transformers

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, output_loading_info=True
        )
    require_weights(gguf.name, model, report)
    tied = bool(model.config.tie_word_embeddings)
    tensors = {
        key: tensor.contiguous()
        for key, tensor in model.state_dict().items()
        if not (tied and key == "lm_head.weight")
    }
    _save(tensors, folder / "model.safetensors")
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)  # the weights are plain numbers now
    settings.update(architectures=[type(model).__name__], _name_or_path=name)
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True, default=str))
    tokenizer.save_pretrained(folder)


def require_weights(source: str, model: Any, report: Mapping[str, Any]) -> None:
    """Raise ConfigError if transformers filled a part of `model` with random numbers.

    Args:
        source: what was read, for the message.
        model: as loaded.
        report: what `output_loading_info=True` returned with it.
    """
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    missing = {key for key in report["missing_keys"] if not (tied and key == "lm_head.weight")}
    if missing:
        raise ConfigError(
            f"model: {source} has no values for {', '.join(sorted(missing)[:4])} "
            f"({len(missing)} in all). Allowed: whole causal language models, here of the "
            f"architecture {model.config.model_type}. Get it again."
        )


def _save(tensors: dict[str, Any], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        full = "No space" in str(error) or "os error 28" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), os.fspath(path)) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, which would run into ours."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # The bar of the GGUF reader has no switch; errors are raised, not printed.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if was_on:
            logging.enable_progress_bar()
