"""docs/scaling.md is what the benchmark rows say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_scaling_page_comes_from_the_rows():
    subprocess.run(
        [sys.executable, ROOT / "tools" / "scaling.py", "--check"],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
