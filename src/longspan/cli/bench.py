"""`longspan bench`: time attention alone against the fastest exact kernel, by length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ._console import console
from ._inputs import check_device, command_line, numbers, run_folder

__all__ = ["bench"]


def bench(
    *,
    attention: list[str] | None = None,
    lengths: str = "512,1024,2048,4096",
    head_dims: str = "64",
    passes: str = "forward",
    batch: int = 1,
    heads: int = 4,
    kv_heads: int | None = None,
    dtype: str | None = None,
    show: list[Path] | None = None,
    out: Path | None = None,
    device: str | None = None,
) -> int:
    """Time mechanisms alone, after checking each against its reference.

    Parameters
    ----------
    attention
        A mechanism and its settings, e.g. window:window=512. Can be given several times.
    lengths
        Sequence lengths, e.g. 4096,16384,65536.
    head_dims
        Head sizes, e.g. 64,128.
    passes
        forward, backward, or both with a comma.
    batch
        Batch size.
    heads
        Query heads.
    kv_heads
        Key and value heads. Default: as many as query heads.
    dtype
        float32, bfloat16, float16. Default: bfloat16 on a GPU, else float32.
    show
        Files of rows to show instead of measuring. Can be given several times.
    out
        Folder of the run; the same folder again goes on where it stopped.
    device
        cpu, cuda, cuda:1. Default: the first GPU if there is one.
    """
    from ..bench.report import draw, write_bench_page
    from ..eval.rows import read_rows

    if show:
        _print([row for path in show for row in read_rows(path) if row.get("kind") == "bench"])
        return 0
    from ..bench.registry import check_dtype, default_specs, plan_cases, plan_shapes
    from ..bench.run import count_lines, run_bench
    from ._run import run_lines

    where = check_device(device)
    name = check_dtype(dtype or ("bfloat16" if where.type == "cuda" else "float32"))
    shapes = plan_shapes(
        numbers("--lengths", lengths),
        numbers("--head-dims", head_dims),
        passes.split(","),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads or heads,
        dtype=name,
    )
    cases = plan_cases(attention or default_specs())
    folder = run_folder(out, "bench", where.type)
    outcome = run_lines(
        folder,
        count_lines(cases, shapes),
        lambda rows, listener: run_bench(
            cases, shapes, rows, device=where, notes={"command": command_line()}, listener=listener
        ),
    )
    if outcome.rows:
        _print(outcome.rows)
        draw(outcome.rows, folder / "bench.png")
        report = write_bench_page(outcome.rows, folder / "bench.html")
        console.print(f"\nReport: {report}", soft_wrap=True)
    return outcome.exit_code


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    from ..bench.report import bench_tables, crossover_lines

    for table in bench_tables(rows):
        console.print(table)
    for line in crossover_lines(rows):
        console.print(line, soft_wrap=True)
