"""Kernels in Triton's interpreter: a job of its own, because the variable is read at import.

    TRITON_INTERPRET=1 python -m pytest tests/interpreter

Without the variable these files are not collected, so that `pytest` alone stays clean.
"""

from __future__ import annotations

import importlib.util
import os
import sys

collect_ignore_glob: list[str] = []

if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    late = "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret
    assert not late, "triton was imported before TRITON_INTERPRET was set"
