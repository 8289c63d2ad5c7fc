"""`longspan selfcheck`: do the kernels give the right numbers on this machine?"""

from __future__ import annotations

from typing import Any

from ._console import console, progress_bar

__all__ = ["selfcheck"]


def selfcheck(*, mechanism: list[str] | None = None, device: str | None = None) -> int:
    """Compare every implementation that can run here with its float64 reference.

    Ends with exit code 1 if one of them is wrong.

    Parameters
    ----------
    mechanism
        Names of mechanisms. Can be given several times. Default: all.
    device
        cpu, cuda, cuda:1. Default: the first GPU if there is one.
    """
    from ..bench.selfcheck import CheckRow, check_cases, run_selfcheck
    from ..eval.report.terminal import plain_table
    from ..mechanisms import MECHANISMS, get_mechanism
    from ._inputs import check_device

    where = check_device(device)
    names = [get_mechanism(name).name for name in mechanism or MECHANISMS]
    with progress_bar() as bar:
        task = bar.add_task(f"checking on {where}", total=len(names) * len(check_cases()))
        seen: set[tuple[str, str]] = set()

        def on_row(row: CheckRow) -> None:
            seen.add((row.mechanism, row.case))  # the first rows of a case: it has begun
            bar.update(task, completed=len(seen) - 1, description=f"{row.mechanism}, {row.case}")

        rows = run_selfcheck(where, names, on_row=on_row)
    headings = ["mechanism", "impl", "case", "dtype", "error", "budget", "verdict"]
    console.print(plain_table(headings, [_cells(row) for row in rows]))
    wrong = [row for row in rows if row.skipped_reason is None and not row.passed]
    ran = sum(row.skipped_reason is None for row in rows)
    console.print(f"{ran} checks ran on {where}, {len(wrong)} are wrong.")
    return 1 if wrong else 0


def _cells(row: Any) -> list[str]:
    shown = [row.mechanism, row.impl, row.case, row.dtype]
    if row.skipped_reason is not None:
        return [*shown, "", "", f"skipped: {row.skipped_reason}"]
    verdict = "right" if row.passed else "WRONG"
    return [*shown, f"{row.error:.1e}", f"{row.budget:.1e}", verdict]
