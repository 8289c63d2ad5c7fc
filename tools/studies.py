"""Write the pages of docs/studies/ from the rows in docs/studies/rows/.

    python tools/studies.py [--check]

With --check nothing is written; the exit code is 1 if a page is not what its rows say.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from longspan.eval.rows import read_rows
from longspan.studies.registry import STUDIES
from longspan.studies.report import render_html, render_markdown

HOME = Path(__file__).resolve().parent.parent / "docs" / "studies"


def pages() -> dict[Path, str]:
    """What each page should hold; only studies with rows have pages."""
    made = {}
    for info in STUDIES.values():
        rows = HOME / "rows" / f"{info.name}.jsonl"
        if rows.exists():
            page = import_module(f"longspan.studies.{info.package}.page")
            report = page.build_report(read_rows(rows))
            made[HOME / f"{info.name}.md"] = render_markdown(report)
            made[HOME / f"{info.name}.html"] = render_html(report)
    return made


def main() -> int:
    """Write, or compare."""
    stale = [
        path
        for path, text in pages().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.name} is not what its rows say: run python tools/studies.py")
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages()[path], encoding="utf-8")
        print(path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
