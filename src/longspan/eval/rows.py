"""Rows: one JSON object per line, appended safely, keyed by the settings that made them.

A run that is interrupted leaves whole lines and at most one half-written line at the end, which the
next run cuts off. A row whose key is already there need not be computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import ConfigError

__all__ = ["RowFile", "provenance", "read_rows", "settings_key"]


def settings_key(settings: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that depend on every setting and on no order."""
    text = json.dumps(dict(settings), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def provenance(device: Any) -> dict[str, Any]:
    """What every row records besides its result: device, versions, commit, command, time (UTC)."""
    from ..bench.environment import environment

    return environment(device)


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The whole rows of a file, without changing it; a half-written last line is left out.

    Raises:
        ConfigError: the file is missing, or a line before the last one is not a JSON object.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"path: {path} cannot be read ({error.strerror}). Allowed: a file of JSON lines. "
            "Pass the rows.jsonl of a finished or interrupted run."
        ) from error
    return _parse(data, path)[0]


def _parse(data: bytes, path: object) -> tuple[list[dict[str, Any]], int]:
    """Rows and the number of bytes that hold whole lines."""
    rows: list[dict[str, Any]] = []
    good = 0
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        is_last = number == len(lines)
        if line.strip():
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                if is_last:
                    break  # cut off in the middle of a write
                raise ConfigError(
                    f"path: line {number} of {path} is not a JSON object ({error}). "
                    "Allowed: one JSON object per line. Remove that line or choose another file."
                ) from error
            rows.append(row)
        good += len(line) + (0 if is_last else 1)
    return rows, good


class RowFile:
    """An append-only file of rows, open for one writer at a time.

    Args:
        path: the file; it and its folder are made if missing. A half-written last line, left by a
            killed run, is cut off.

    Raises:
        ConfigError: the folder cannot be made or written, another run has the file open, or a line
            in its middle is not a JSON object.

    Example:
        >>> import tempfile
        >>> with RowFile(tempfile.mkdtemp() + "/rows.jsonl") as rows:
        ...     rows.append({"key": settings_key({"length": 128}), "loss": 2.5})
        >>> rows.find(settings_key({"length": 128}))["loss"]
        2.5
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ConfigError(
                f"out: {self.path.parent} cannot be written ({error.strerror}). "
                "Allowed: a folder that exists or can be made. Pass another folder with --out."
            ) from error
        try:
            self._lock()
            self.rows = self._repair()
        except BaseException:
            os.close(self._fd)
            raise

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # not on this system: one writer is then the user's care
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"out: {self.path} is being written by another run. Allowed: one run per folder. "
                "Wait for it, or pass another folder with --out."
            ) from error

    def _repair(self) -> list[dict[str, Any]]:
        with open(self.path, "rb") as handle:
            data = handle.read()
        rows, good = _parse(data, self.path)
        if good < len(data):
            os.ftruncate(self._fd, good)
            data = data[:good]
        if data and not data.endswith(b"\n"):
            self._write(b"\n")
        return rows

    def find(self, key: str) -> dict[str, Any] | None:
        """The last row with this key, or None."""
        return next((row for row in reversed(self.rows) if row.get("key") == key), None)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row and wait until it is on the disk.

        Raises:
            ConfigError: the disk is full or gone; the rows before this one are kept.
        """
        line = json.dumps(dict(row), allow_nan=True, separators=(", ", ": ")) + "\n"
        self._write(line.encode())
        self.rows.append(dict(row))

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        except OSError as error:
            raise ConfigError(
                f"out: a row could not be written to {self.path} ({error.strerror}). "
                "Allowed: a folder with free space. Rows written before are kept: free some space "
                "and run the same command again."
            ) from error

    def close(self) -> None:
        """Close the file and let other runs write to it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
