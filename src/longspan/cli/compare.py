"""`longspan compare`: a real model reads a real text under several kinds of attention."""

from __future__ import annotations

from pathlib import Path

from ._console import console
from ._inputs import check_length, load_inputs, plan, run_folder

__all__ = ["compare"]


def compare(
    *,
    model: str = "smollm2-135m",
    text: Path | None = None,
    length: int | None = None,
    attention: list[str] | None = None,
    layers: str = "all",
    out: Path | None = None,
    quick: bool = False,
    device: str | None = None,
    dtype: str | None = None,
) -> int:
    """Compare kinds of attention on one model and text: loss, speed, memory, agreement.

    Writes rows.jsonl and report.html into a folder. Ctrl-C keeps what is finished; the same
    command with the same --out goes on from there.

    Parameters
    ----------
    model
        A name from `longspan models`, a local folder, or a hub name.
    text
        A UTF-8 text file. Default: the book that comes with longspan.
    length
        Tokens to read. Default: 4096, with --quick 1024.
    attention
        A mechanism and its settings, e.g. window:window=512,num_sinks=4. Can be given several
        times. Default: all that mean something on a pretrained model, see `longspan info`.
    layers
        Layers to change: all, global, last:10, or indices such as 0,3,5.
    out
        Folder of the run. Default: a new one under runs/.
    quick
        1024 tokens: about a minute on two cores.
    device
        cpu, cuda, cuda:1. Default: the first GPU if there is one.
    dtype
        float32, bfloat16 or float16. Default: float32 on a CPU, bfloat16 on a GPU.
    """
    count = check_length("--length", length if length is not None else 1024 if quick else 4096)
    from ..eval.compare import compare as run_compare
    from ..eval.report import comparison_table, headline, write_page
    from ._run import run_lines

    candidates = plan(attention, count, model=model)
    inputs = load_inputs(model, text, num_tokens=count, device=device, dtype=dtype)
    folder = run_folder(out, "compare", model, count)
    outcome = run_lines(
        folder,
        len(candidates),
        lambda rows, listener: run_compare(
            inputs.subject,
            candidates,
            rows,
            layers=layers,
            skip_refused=not attention,
            listener=listener,
        ),
    )
    if outcome.rows:
        console.print(comparison_table(outcome.rows, width=console.width))
        console.print(headline(outcome.rows), soft_wrap=True)
        report = write_page(outcome.rows, folder / "report.html", notes=outcome.notes)
        console.print(f"\nReport: {report}", soft_wrap=True)
    return outcome.exit_code
