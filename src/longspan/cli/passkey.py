"""`longspan passkey`: find a number hidden in a long text, by length and depth."""

from __future__ import annotations

from pathlib import Path

from ._console import console
from ._inputs import check_length, load_inputs, numbers, plan, run_folder

__all__ = ["passkey"]


def passkey(
    *,
    model: str = "smollm2-135m",
    text: Path | None = None,
    attention: list[str] | None = None,
    lengths: str = "512,1024",
    depths: str = "0.1,0.5,0.9",
    trials: int = 5,
    haystack: str = "landmark",
    layers: str = "all",
    out: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> int:
    """Hide a pass key in a long prompt and ask for it.

    Parameters
    ----------
    model
        A name from `longspan models`, a local folder, or a hub name.
    text
        A UTF-8 text file, for --haystack book. Default: the book that comes with longspan.
    attention
        A mechanism and its settings, e.g. window:window=512. Can be given several times.
    lengths
        Tokens of prompt and answer together, e.g. 1024,4096.
    depths
        Where the key is hidden: 0 is the start of the text, 1 the end.
    trials
        Prompts per length and depth; each has its own key.
    haystack
        landmark: repeated sentences, as in Landmark Attention. book: natural text.
    layers
        Layers to change: all, global, last:10, or indices such as 0,3,5.
    out
        Folder of the run; the same folder again goes on where it stopped.
    device
        cpu, cuda, cuda:1.
    dtype
        float32, bfloat16 or float16. Default: float32 on a CPU, bfloat16 on a GPU.
    """
    from ..eval.jobs import passkey_jobs, run_jobs
    from ..eval.passkey import check_haystack
    from ..eval.report.terminal import passkey_tables
    from ._run import run_lines

    check_haystack(haystack)
    length_list = [check_length("--lengths", n, least=64) for n in numbers("--lengths", lengths)]
    depth_list = numbers("--depths", depths, float)
    check_length("--trials", trials, least=1)
    candidates = plan(attention, max(length_list), model=model)
    inputs = load_inputs(model, text, num_tokens=2, device=device, dtype=dtype)
    subject = inputs.subject
    jobs = passkey_jobs(
        subject,
        inputs.tokenizer,
        candidates,
        lengths=length_list,
        depths=depth_list,
        seeds=range(trials),
        haystack=haystack,
        book=inputs.text if haystack == "book" else None,
        layers=layers,
    )
    folder = run_folder(out, "passkey", model, haystack)
    outcome = run_lines(
        folder,
        len(jobs),
        lambda rows, listener: run_jobs(
            jobs,
            rows,
            device=inputs.subject.model.device,
            notes=inputs.subject.notes,
            listener=listener,
        ),
    )
    for table in passkey_tables(outcome.rows):
        console.print(table)
    console.print(f"Rows: {(folder / 'rows.jsonl').absolute()}", soft_wrap=True)
    return outcome.exit_code
