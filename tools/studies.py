"""Write the pages of docs/studies/ and the claims in README.md from the rows in docs/studies/rows/.

    python tools/studies.py [--check]

With --check nothing is written; the exit code is 1 if a page is not what its rows say.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from longspan.eval.rows import read_rows
from longspan.studies.registry import STUDIES
from longspan.studies.report import Report, render_html, render_markdown

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "docs" / "studies"
README = ROOT / "README.md"
BEGIN, END = "<!-- claims -->", "<!-- /claims -->"


def pages() -> dict[Path, str]:
    """What each page should hold; only studies with rows have pages."""
    made = {}
    reports = []
    for info in STUDIES.values():
        rows = HOME / "rows" / f"{info.name}.jsonl"
        if rows.exists():
            page = import_module(f"longspan.studies.{info.package}.page")
            report = page.build_report(read_rows(rows))
            reports.append(report)
            made[HOME / f"{info.name}.md"] = render_markdown(report)
            made[HOME / f"{info.name}.html"] = render_html(report)
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    made[README] = before + BEGIN + "\n" + claims(reports) + END + rest.split(END)[1]
    return made


def claims(reports: list[Report]) -> str:
    """One line per claim, with its verdict and the page that has the rest."""
    lines = ["| claim | verdict | what we saw |", "|---|---|---|"]
    for report in reports:
        for verdict in report.verdicts:
            page = f"[{verdict.outcome}](docs/studies/{report.name}.md)"
            lines.append(f"| {verdict.claim} | {page} | {verdict.numbers} |")
    return "\n".join(lines) + "\n"


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
