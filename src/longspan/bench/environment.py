"""Where a number comes from: device, versions, commit, command. Flat keys, ready for a row."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__

__all__ = ["environment"]


def environment(device: torch.device | str | None = None) -> dict[str, Any]:
    """What a benchmark row says about its origin.

    Args:
        device: where the measurement runs. Default: the CUDA device if there is one, else the CPU.

    Returns:
        device, driver, torch, triton, longspan, python, commit, dirty, command, time. `driver`
        and `triton` are None where there is none; `commit` and `dirty` are None outside of a git
        checkout, unless LONGSPAN_COMMIT names the commit (for copies of a checkout).
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    commit, dirty = _commit()
    return {
        "device": _device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "longspan": __version__,
        "python": platform.python_version(),
        "commit": commit,
        "dirty": dirty,
        "command": _command(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        pass
    return f"{name} ({torch.get_num_threads()} threads)"


def _driver() -> str | None:
    found = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    if named := os.environ.get("LONGSPAN_COMMIT"):
        return named, False
    here = str(Path(__file__).parent)
    commit = _run("git", "-C", here, "rev-parse", "HEAD")
    if commit is None or _run("git", "-C", here, "ls-files", __file__) is None:
        return None, None  # no checkout, or another project's, with longspan installed inside
    return commit, bool(_run("git", "-C", here, "status", "--porcelain"))


def _command() -> str:
    """The command line; of absolute paths only the last part, to keep this machine out of it."""
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv]
    return shlex.join(["python", *words])


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
