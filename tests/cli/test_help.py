import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from longspan.cli.__main__ import _COMMANDS

SOURCE = Path(__file__).resolve().parents[2] / "src"


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize("command", [(), *((name,) for name in _COMMANDS)])
def test_help_imports_neither_torch_nor_transformers(command):
    result = run("-X", "importtime", "-m", "longspan.cli", *command, "--help")
    imported = set(re.findall(r"\|\s+([\w.]+)$", result.stderr, re.MULTILINE))
    assert "cyclopts" in imported
    heavy = {"torch", "transformers", "matplotlib", "numpy", "jinja2", "triton"}
    assert not heavy & imported
    assert "Usage: longspan" in result.stdout


def test_help_takes_less_than_a_second():
    spent = []
    for _ in range(3):
        before = os.times()
        run("-m", "longspan.cli", "--help")
        after = os.times()
        spent.append(sum(after[2:4]) - sum(before[2:4]))  # of the child
    assert min(spent) < 1.0  # processor time, so that a busy machine does not fail the test


def test_help_names_every_command():
    text = run("-m", "longspan.cli", "--help").stdout
    assert all(f" {name} " in text for name in _COMMANDS)


def test_version():
    from longspan import __version__

    assert run("-m", "longspan.cli", "--version").stdout.strip() == __version__
    assert run("-m", "longspan", "--version").stdout.strip() == __version__
