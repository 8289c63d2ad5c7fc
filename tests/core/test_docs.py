"""What the documents show runs, and the README's tables are what the rows say."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import longspan

ROOT = Path(__file__).resolve().parents[2]
MODULES = [
    info.name
    for info in pkgutil.walk_packages(longspan.__path__, "longspan.")
    if ".impl.triton" not in info.name and not info.name.endswith("__main__")
]


@pytest.fixture
def tiny_scope(tmp_path_factory):
    """Names that the examples of the Hugging Face layer take for granted."""
    from transformers import AutoModelForCausalLM

    from longspan.testing.models import save_tiny_model, tiny_model

    path = tmp_path_factory.mktemp("tiny")
    save_tiny_model(path)
    return {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "path": path,
        "model": tiny_model("llama").model,
        "inputs": {"input_ids": torch.arange(8)[None], "max_new_tokens": 4},
        "input_ids": torch.randint(0, 256, (1, 600)),
        "patch": longspan.hf.patch,
        "convert_infini": longspan.hf.convert_infini,
        "load_adapter": longspan.hf.load_adapter,
    }


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    scope = {"torch": torch, "longspan": longspan}
    scope |= {public: getattr(longspan, public) for public in longspan.__all__}
    if name.startswith("longspan.hf"):
        scope |= request.getfixturevalue("tiny_scope")
    failed, _ = doctest.testmod(
        module, extraglobs=scope, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    assert failed == 0


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
)
def test_readme_snippets(code):
    exec(compile(code, "README.md", "exec"), {})


def test_readme_tables_come_from_the_rows():
    subprocess.run(
        [sys.executable, ROOT / "tools" / "readme_tables.py", "--check"],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )


def test_study_pages_come_from_the_rows():
    subprocess.run(
        [sys.executable, ROOT / "tools" / "studies.py", "--check"],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )


def test_no_machine_paths_in_tracked_text():
    shown = subprocess.run(
        ["git", "grep", "-nIE", r"(^|[^A-Za-z.])/(root|home|Users)/", "--", ".", ":!*.jsonl"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    lines = [line for line in shown.splitlines() if "test_docs.py" not in line]
    assert lines == []
