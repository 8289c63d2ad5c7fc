"""`longspan selfcheck`: do the kernels give the right numbers on this machine?"""

from __future__ import annotations

import sys
from typing import Any

from ._console import console, progress_bar

__all__ = ["selfcheck"]

_LINE = "{:<16}{:<8}{:<14}{:<10}"
_HEADINGS = _LINE.format("mechanism", "impl", "case", "dtype") + "error    budget   verdict"


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
    from ..mechanisms import MECHANISMS, get_mechanism
    from ._inputs import check_device

    where = check_device(device)
    names = [get_mechanism(name).name for name in mechanism or MECHANISMS]
    refusals: dict[tuple[str, str], str] = {}
    # On a terminal the bar moves below the lines; what is not one must not get them through it.
    out = None if sys.stdout.isatty() else sys.stdout
    print(_HEADINGS, file=out, flush=True)
    with progress_bar() as bar:
        task = bar.add_task(f"checking on {where}", total=len(names) * len(check_cases()))
        seen: set[tuple[str, str]] = set()

        def on_row(row: CheckRow) -> None:
            seen.add((row.mechanism, row.case))  # the first rows of a case: it has begun
            bar.update(task, completed=len(seen) - 1, description=f"{row.mechanism}, {row.case}")
            if row.skipped_reason is not None:
                refusals.setdefault((row.mechanism, row.impl), row.skipped_reason)
            print(_line(row), file=out, flush=True)  # each at once: a check that hangs has a name

        rows = run_selfcheck(where, names, on_row=on_row)
    for (name, impl), reason in refusals.items():
        console.print(f"{name}, {impl}: skipped, {reason}", markup=False, soft_wrap=True)
    wrong = [row for row in rows if row.skipped_reason is None and not row.passed]
    ran = sum(row.skipped_reason is None for row in rows)
    console.print(f"{ran} checks ran on {where}, {len(wrong)} are wrong.")
    return 1 if wrong else 0


def _line(row: Any) -> str:
    shown = _LINE.format(row.mechanism, row.impl, row.case, row.dtype)
    if row.skipped_reason is not None:
        return f"{shown}skipped"
    return f"{shown}{row.error:<9.1e}{row.budget:<9.1e}{'right' if row.passed else 'WRONG'}"
