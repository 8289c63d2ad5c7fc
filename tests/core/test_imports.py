"""Importing is cheap and loads no extra; every public name resolves."""

from __future__ import annotations

import subprocess
import sys

import pytest

import longspan

HEAVY = ("triton", "transformers", "matplotlib", "numpy.testing", "accelerate", "rich", "cyclopts")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_loads_no_extra():
    code = f"import sys, longspan; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run(code) == "[]"


def test_calls_on_the_cpu_load_no_kernel():
    """torch itself loads triton, where there is one, on the first call of a custom operator."""
    code = (
        "import sys, torch, longspan; q = torch.randn(1, 1, 8, 4);"
        "[longspan.attention(q, q, q, m.config_class(), is_causal=True)"
        " for m in longspan.mechanisms.MECHANISMS.values()];"
        "print(any('.impl.triton' in name for name in sys.modules))"
    )
    assert run(code) == "False"


def test_registry_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import longspan.mechanisms as m;"
        "print(sorted(m.MECHANISMS))"
    )
    assert "exact" in run(code)


def test_triton_absent():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, longspan\n"
        "q = torch.randn(1, 1, 8, 4)\n"
        "for m in longspan.mechanisms.MECHANISMS.values():\n"
        "    longspan.attention(q, q, q, m.config_class(), is_causal=True)\n"
        "print('ok')"
    )
    assert run(code) == "ok"


@pytest.mark.parametrize("name", longspan.__all__)
def test_public_names_resolve(name):
    assert getattr(longspan, name) is not None
    assert name in dir(longspan)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = longspan.nothing
