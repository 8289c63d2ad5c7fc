import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("cyclopts")

SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny random model on disk, with a byte-level tokenizer."""
    from longspan.testing.models import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "llama", layers=4)


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    """A text of about 5,000 characters."""
    path = tmp_path_factory.mktemp("text") / "A-Tale.txt"
    path.write_text("".join(f"Sentence {i} of a tale with {i * i % 97} ends. " for i in range(130)))
    return path


@pytest.fixture
def longspan(capsys, monkeypatch):
    """Run a command in this process: (exit code, stdout, stderr)."""
    from longspan.cli.__main__ import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["longspan", *map(str, arguments)])
        code = main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def spawn():
    """Start a command as a process of its own."""
    children = []

    def start(*arguments):
        path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "longspan.cli", *map(str, arguments)]
        child = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        if child.poll() is None:
            child.kill()
        child.communicate()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors on many threads wait for each other, above all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
