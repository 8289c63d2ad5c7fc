"""Save and load what a patch adds to a model: its plan, its settings and its parameters."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, PatchError
from .patching import Patch, make_patch, patch_of
from .plan import LayerPlan, config_from_dict, config_to_dict

__all__ = ["load_adapter", "save_adapter"]

_FORMAT = "longspan-adapter-1"
_JSON, _TENSORS = "longspan_adapter.json", "longspan_adapter.safetensors"


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the patch of a model: `longspan_adapter.json` and, if it learns any, its parameters.

    The JSON holds format, model type, number of layers, settings of every patched layer and the
    keyword arguments of the patch; `longspan_adapter.safetensors` the added parameters, named by
    layer and keyword. The model's own weights are not saved; use `save_pretrained` for them.

    Args:
        model: a patched model.
        folder: made if it does not exist; an adapter in it is replaced.

    Raises:
        PatchError: the model is not patched.
        ConfigError: keyword arguments of the patch that JSON cannot hold (tensors).

    Example:
        >>> with patch(model, WindowConfig(window=512)):
        ...     save_adapter(model, "adapter")
        >>> report = load_adapter(model, "adapter")
    """
    from safetensors.torch import save_file

    routes = patch_of(model)
    if routes is None:
        raise PatchError("model: it is not patched; there is no adapter to save. Patch it first.")
    patched = {index: route for index, (_, route) in routes.items() if route.reason is None}
    settings = next(iter(patched.values())).settings
    header = {
        "format": _FORMAT,
        "model_type": _model_type(model),
        "num_attention_layers": len(routes),
        "hidden_size": _hidden_size(model),
        "layers": {str(index): config_to_dict(route.config) for index, route in patched.items()},
        "settings": settings,
    }
    try:
        text = json.dumps(header, indent=2)
    except TypeError as error:
        raise ConfigError(
            f"settings: {sorted(settings)} hold something that JSON cannot ({error}). Only "
            "numbers, strings and lists can be saved; pass seeds instead of tensors."
        ) from error
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.detach().cpu().contiguous() for n, t in _parameters(model).items()}
    if tensors:
        aside = target / f".{_TENSORS}.{os.getpid()}.part"
        save_file(tensors, aside, metadata={"format": _FORMAT})
        os.replace(aside, target / _TENSORS)
    else:
        (target / _TENSORS).unlink(missing_ok=True)
    aside = target / f".{_JSON}.{os.getpid()}.part"
    aside.write_text(text + "\n", encoding="utf-8")
    os.replace(aside, target / _JSON)


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    verify: bool = True,
    segment_length: int | None = None,
) -> Patch:
    """Patch a model as `save_adapter` found it, with the parameters that were learned.

    Args:
        model: a model of the kind that was saved, not patched.
        folder: what `save_adapter` wrote.
        verify: as in `patch`.
        segment_length: of Infini-attention: refuse an adapter that was trained with another one.

    Returns:
        The Patch, to be used in a `with` statement or undone by `undo()`.

    Raises:
        FileNotFoundError: no adapter in the folder.
        ConfigError: not an adapter, or made for another kind of model, number of layers or shape
            of parameters; the message names what differs.
    """
    header = _read_header(Path(folder))
    routes = header["layers"]
    plan = LayerPlan(configs={int(i): config_from_dict(config) for i, config in routes.items()})
    _same(folder, "model_type", header["model_type"], _model_type(model))
    if "hidden_size" in header:
        _same(folder, "hidden_size", header["hidden_size"], _hidden_size(model))
    if segment_length is not None:
        for index, config in plan.configs.items():
            found = getattr(config, "segment_length", None)
            _same(folder, f"segment_length of layer {index}", found, segment_length, "the call")
    applied = make_patch(model, plan, "all", verify=verify, settings=header["settings"])
    try:
        _same(folder, "num_attention_layers", header["num_attention_layers"], len(applied.layers))
        _load_parameters(model, Path(folder))
    except BaseException:
        applied.undo()
        raise
    return applied


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / _JSON
    if not path.exists():
        raise FileNotFoundError(f"folder: {path} does not exist; pass what save_adapter wrote.")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"folder: {path} is not JSON ({error}). Save the adapter again.") from (
            error
        )
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ConfigError(
            f"folder: the format of {path} is not {_FORMAT!r}. Pass what save_adapter wrote."
        )
    return header


def _load_parameters(model: nn.Module, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    saved: dict[str, Tensor] = {}
    if (folder / _TENSORS).exists():
        try:
            saved = load_file(folder / _TENSORS)
        except SafetensorError as error:
            raise ConfigError(
                f"folder: {folder / _TENSORS} is not a readable safetensors file ({error}); it "
                "may be cut short. Save the adapter again."
            ) from error
    wanted = _parameters(model)
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in side.items()} for side in (saved, wanted)
    ]
    for name in sorted({*saved, *wanted}):
        _same(folder, f"parameter {name}", shapes[0].get(name), shapes[1].get(name))
    for name, parameter in wanted.items():
        parameter.data.copy_(saved[name])


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Added parameters, named so that wrappers such as peft's change nothing."""
    return {
        f"layers.{index}.{keyword}": getattr(layer.module, name)
        for index, (layer, route) in (patch_of(model) or {}).items()
        for keyword, name in route.parameters.items()
    }


def _model_type(model: Any) -> str:
    return str(getattr(model.config, "model_type", type(model).__name__))


def _hidden_size(model: Any) -> int | None:
    config = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "hidden_size", None)


def _same(
    folder: str | os.PathLike[str], what: str, saved: Any, found: Any, where: str = "this model"
) -> None:
    if saved != found:
        raise ConfigError(
            f"{what}: the adapter in {os.fspath(folder)} has {saved!r}, {where} has {found!r}. "
            "Load it into the model, and with the settings, that it was made for."
        )
