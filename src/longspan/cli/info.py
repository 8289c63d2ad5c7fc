"""`longspan info`: the environment, for bug reports."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from ._console import console

__all__ = ["info"]

_EXTRAS = {
    "hf": ("transformers", "accelerate", "gguf"),
    "cli": ("cyclopts", "rich", "pydantic"),
    "report": ("matplotlib", "jinja2"),
    "eval": ("lm_eval", "datasets"),
    "train": ("accelerate", "tokenizers", "numpy", "peft", "datasets"),
}


def info() -> int:
    """Print versions, devices, extras and mechanisms, to be pasted into a bug report."""
    from ..bench.environment import environment
    from ..eval.report.terminal import plain_table
    from ..mechanisms import MECHANISMS

    for name, value in environment().items():
        if name in ("command", "time"):
            continue  # of this call, which says nothing
        console.print(f"{name}: {value}", markup=False, soft_wrap=True)
    console.print(f"models are kept in: {_cache_folder()}", markup=False, soft_wrap=True)
    extras = [[extra, _have(packages)] for extra, packages in _EXTRAS.items()]
    console.print(plain_table(["extra", "packages"], extras))
    lines = [
        [
            mechanism.name,
            _yes(mechanism.on_pretrained),
            _yes(mechanism.state_name is not None),
            _yes(mechanism.has_triton),
            mechanism.paper.removeprefix("arXiv:"),
            mechanism.summary,
        ]
        for mechanism in MECHANISMS.values()
    ]
    headings = ["mechanism", "pretrained", "streams", "Triton", "arXiv", "what"]
    console.print(plain_table(headings, lines))
    return 0


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _have(packages: tuple[str, ...]) -> str:
    found = []
    for package in packages:
        if find_spec(package) is None:
            found.append(f"{package} missing")
            continue
        try:
            found.append(f"{package} {version(package.replace('_', '-'))}")
        except PackageNotFoundError:
            found.append(f"{package} (version unknown)")
    return ", ".join(found)


def _cache_folder() -> str:
    from ..models import cache_folder

    return str(cache_folder())
