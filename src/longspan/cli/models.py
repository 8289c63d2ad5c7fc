"""`longspan models`: which models can be named."""

from __future__ import annotations

from ._console import console

__all__ = ["models"]


def models() -> int:
    """List the models that longspan can fetch by name, and whether they are here already."""
    from ..eval.report.terminal import plain_table
    from ..models import list_models

    console.print(plain_table(["name", "here", "size", "licence", "about"], list_models()))
    return 0
