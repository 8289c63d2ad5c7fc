"""`longspan ppl`: perplexity of a long text against the number of patched layers."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from ._console import console
from ._inputs import check_length, load_inputs, numbers, plan, run_folder

__all__ = ["ppl"]


def ppl(
    *,
    model: str = "smollm2-135m",
    text: Path | None = None,
    attention: list[str] | None = None,
    patched: str | None = None,
    window: int = 2048,
    stride: int | None = None,
    tokens: int = 8192,
    contexts: str | None = None,
    tail: int = 256,
    out: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> int:
    """Measure perplexity by number of patched layers, or loss on a tail by length of context.

    Parameters
    ----------
    model
        A name from `longspan models`, a local folder, or a hub name.
    text
        A UTF-8 text file. Default: the book that comes with longspan.
    attention
        A mechanism and its settings, e.g. window:window=512. Can be given several times.
    patched
        Numbers of layers to change, counted from the last, e.g. 0,5,10. Default: none and all.
    window
        Tokens read at once. Perplexities of different windows do not compare.
    stride
        How far each window starts after the one before. Default: the window (disjoint windows).
    tokens
        Tokens of the text to use.
    contexts
        Measure the loss on the last --tail tokens instead, given so many tokens before them,
        e.g. 256,1024,4096.
    tail
        Tokens of the tail, with --contexts.
    out
        Folder of the run; the same folder again goes on where it stopped.
    device
        cpu, cuda, cuda:1.
    dtype
        float32, bfloat16 or float16. Default: float32 on a CPU, bfloat16 on a GPU.
    """
    from ..eval.jobs import perplexity_jobs, run_jobs, tail_jobs
    from ..eval.layers import count_full_layers
    from ..eval.report.terminal import perplexity_table, tail_table
    from ._run import run_lines

    check_length("--window", window)
    context_list = numbers("--contexts", contexts) if contexts else None
    counts = numbers("--patched", patched) if patched else None
    if context_list and patched:
        raise ConfigError(
            "--contexts: came together with --patched. Allowed: one of them. Run the command twice."
        )
    needed = max(context_list) + tail if context_list else check_length("--tokens", tokens)
    candidates = plan(attention, window, model=model)
    inputs = load_inputs(model, text, num_tokens=needed, device=device, dtype=dtype, at="--tokens")
    subject = inputs.subject
    if context_list:
        jobs = tail_jobs(subject, candidates, context_list, tail=tail)
        table = tail_table
    else:
        total = count_full_layers(subject.model)
        jobs = perplexity_jobs(
            subject,
            candidates,
            counts or [0, total],
            window=window,
            stride=stride if stride is not None else window,
            num_bytes=len(inputs.tokenizer.decode(subject.tokens).encode()),
        )
        table = perplexity_table
    folder = run_folder(out, "ppl", model, needed)
    outcome = run_lines(
        folder,
        len(jobs),
        lambda rows, listener: run_jobs(
            jobs, rows, device=subject.model.device, notes=subject.notes, listener=listener
        ),
    )
    if outcome.rows:
        console.print(table(outcome.rows))
    console.print(f"Rows: {(folder / 'rows.jsonl').absolute()}", soft_wrap=True)
    return outcome.exit_code
