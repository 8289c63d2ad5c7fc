"""`longspan selfcheck`: do the kernels give the right numbers on this machine?"""

from __future__ import annotations

from ._console import console, step

__all__ = ["selfcheck"]


def selfcheck(*, device: str | None = None) -> int:
    """Compare every implementation that can run here with its float64 reference.

    Parameters
    ----------
    device
        cpu, cuda, cuda:1. Default: the first GPU if there is one.
    """
    from ..bench.selfcheck import run_selfcheck
    from ..eval.report.terminal import plain_table
    from ._inputs import check_device

    where = check_device(device)
    with step(f"checking on {where}"):
        rows = run_selfcheck(where)
    headings = list(rows[0])
    console.print(plain_table(headings, [[str(row[name]) for name in headings] for row in rows]))
    return 0
