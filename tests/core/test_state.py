"""State files: whole or absent, refused when they do not fit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from longspan import ConfigError
from longspan._state import load_state, save_state


@dataclass(frozen=True)
class Settings:
    window: int = 4


def test_round_trip(tmp_path):
    tensors = {"key": torch.randn(2, 3).transpose(0, 1), "half": torch.randn(2).bfloat16()}
    save_state(tmp_path / "s", "KindState", Settings(), tensors, {"seen": 2**40})
    got, numbers = load_state(tmp_path / "s", "KindState", Settings())
    assert numbers == {"seen": 2**40}
    for name, tensor in tensors.items():
        assert torch.equal(got[name], tensor)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_refusals(tmp_path):
    path = tmp_path / "s"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_state(path, "KindState", Settings())
    save_state(path, "KindState", Settings(), {"a": torch.zeros(1)}, {})
    with pytest.raises(ConfigError, match="expected a OtherState"):
        load_state(path, "OtherState", Settings())
    with pytest.raises(ConfigError, match="window is 4, not 8"):
        load_state(path, "KindState", Settings(window=8))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        load_state(path, "KindState", Settings())


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s"
    save_state(path, "KindState", Settings(), {"a": torch.ones(1)}, {})

    def full(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        save_state(path, "KindState", Settings(), {"a": torch.zeros(1)}, {})
    assert load_state(path, "KindState", Settings())[0]["a"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
