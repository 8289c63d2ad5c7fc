"""The log of a run: one JSON object per line, cut back to the checkpoint when a run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..eval.rows import read_rows

__all__ = ["TrainLog"]


class TrainLog:
    """Rows of training, in order of their steps.

    Args:
        path: the file; made if missing.
        step: rows of later steps are cut off: they are about to be made again.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        kept = [row for row in read_rows(path) if row["step"] <= step] if path.exists() else []
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(aside, path)
        self.rows: list[Mapping[str, Any]] = list(kept)
        self._handle = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row and hand it to the system."""
        self._handle.write(json.dumps(dict(row)) + "\n")
        self._handle.flush()
        self.rows.append(row)

    def close(self) -> None:
        """Close the file."""
        self._handle.close()
