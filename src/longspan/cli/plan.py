"""`longspan plan`: which layers to change, by harm and time saved."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ..errors import ConfigError
from ._console import console, progress_bar
from ._inputs import check_length, load_inputs, numbers

__all__ = ["plan"]


def plan(
    *,
    model: str = "smollm2-135m",
    text: Path | None = None,
    attention: str = "hyper",
    tokens: int = 4096,
    documents: int = 2,
    budget: float = 0.01,
    layers: int | None = None,
    curve: str | None = None,
    out: Path = Path("plan.json"),
    device: str | None = None,
    dtype: str | None = None,
) -> int:
    """Calibrate a mechanism layer by layer, and write a plan for longspan.hf.patch.

    Parameters
    ----------
    model
        A name from `longspan models`, a local folder, or a hub name.
    text
        A UTF-8 text file to calibrate on. Default: the book that comes with longspan.
    attention
        A mechanism and its settings, e.g. hyper:num_probes=24.
    tokens
        Tokens of each document; plan for the length you will use.
    documents
        Stretches of the text, one after the other.
    budget
        Most harm of all changed layers together, nats per token (0.01 is 1 % of perplexity).
    layers
        Change so many layers instead, the least harmful per millisecond saved.
    curve
        Also measure the loss with so many layers changed, e.g. 0,5,10,15.
    out
        The plan, JSON: longspan.hf.patch(model, LayerPlan.load("plan.json")).
    device
        cpu, cuda, cuda:1.
    dtype
        float32, bfloat16 or float16. Default: float32 on a CPU, bfloat16 on a GPU.
    """
    from ..eval.calibrate import calibrate, loss_curve, order_layers, within_budget
    from ..hf.plan import LayerPlan, parse_config

    check_length("--tokens", tokens)
    config = parse_config(attention)
    counts = numbers("--curve", curve) if curve else []
    if documents < 1:
        raise ConfigError(f"--documents: {documents} came. Allowed: 1 or more. Pass 2.")
    if not budget >= 0:
        raise ConfigError(f"--budget: {budget} came. Allowed: 0 or more. Pass 0.01.")
    inputs = load_inputs(model, text, num_tokens=tokens * documents, device=device, dtype=dtype,
                         at="--tokens")  # fmt: skip
    subject = inputs.subject
    pieces = [subject.tokens[i * tokens : (i + 1) * tokens] for i in range(documents)]
    with progress_bar() as bar:
        task = bar.add_task("calibrating", total=1.0)
        result = calibrate(subject.model, pieces, config,
                           progress=lambda part: bar.advance(task, part))  # fmt: skip
    ordered = order_layers(result.costs)
    total = len(ordered)
    for count in [*counts, *([] if layers is None else [layers])]:
        if not 0 <= count <= total:
            raise ConfigError(
                f"--layers, --curve: {count} came. Allowed: 0 to {total}, the model's "
                f"full-attention layers. Pass for example {total // 2}."
            )
    kept = within_budget(ordered, budget) if layers is None else ordered[:layers]
    console.print("layer   harm (nats/token)   saves (ms)   changed")
    chosen = {cost.layer for cost in kept}
    for cost in ordered:
        console.print(
            f"{cost.layer:5d}   {cost.harm:17.6f}   {cost.saved_ms:10.2f}   "
            f"{'yes' if cost.layer in chosen else 'no'}"
        )
    measured = loss_curve(subject.model, pieces, config, ordered, counts)
    for count, loss in measured:
        change = 100 * math.expm1(loss - result.exact_loss)
        console.print(f"{count} layers changed: perplexity {math.exp(loss):.3f} ({change:+.2f} %)")
    saved = sum(cost.saved_ms for cost in kept)
    console.print(
        f"{len(kept)} of {total} layers changed: harm {sum(c.harm for c in kept):.4f} nats per "
        f"token, attention {saved:.1f} ms faster on {documents * tokens} tokens."
    )
    if saved < 0:
        console.print("Exact attention is faster at this length on this device.")
    document = json.loads(LayerPlan(configs={i: config for i in sorted(chosen)}).to_json())
    document["calibration"] = {
        **subject.facts,
        "tokens": tokens,
        "documents": documents,
        "exact_loss": result.exact_loss,
        "layers": [
            {"layer": c.layer, "harm": c.harm, "exact_ms": c.exact_ms, "changed_ms": c.changed_ms}
            for c in ordered
        ],
        "curve": [{"layers": count, "loss": loss} for count, loss in measured],
    }
    out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    console.print(f"Plan: {out.absolute()}", soft_wrap=True)
    return 0
