"""Does the convolution help HyperAttention's sampled residual on the heads of a real model?

The model reads the second half of the bundled book. Each full causal attention call of the chosen
layers is repeated by sampled HyperAttention with several seeds and several weights of the control
variate; one row per layer: mean relative error of the output, and the mean over rows of the
variance of the estimated row sum, both as ratios to weight 0, and how many heads gain.

    python benchmarks/hyper_control.py --model smollm2-135m --length 2048 --out rows.jsonl
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from longspan import HyperConfig, exact_attention_with_lse, hyper_attention_with_lse
from longspan.bench.environment import environment
from longspan.eval.data import load_text
from longspan.models.loader import load

WEIGHTS = (0.0, 0.25, 0.5, 1.0)
SETTINGS: dict[str, Any] = {"residual": "uniform", "num_samples": 32, "window": 256}


class Recorder(TorchFunctionMode):
    """Keeps the inputs of the chosen attention calls; computes them as they are."""

    def __init__(self, layers: set[int]) -> None:
        super().__init__()
        self.layers, self.calls = layers, 0
        self.found: list[tuple[int, tuple[torch.Tensor, ...], float | None]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.nn.functional.scaled_dot_product_attention:
            if self.calls in self.layers:
                tensors = tuple(t.clone() for t in args[:3])
                self.found.append((self.calls, tensors, (kwargs or {}).get("scale")))
            self.calls += 1
        return func(*args, **(kwargs or {}))


def measure(
    qkv: tuple[torch.Tensor, ...], scale: float | None, rope_base: float, seeds: int
) -> dict[str, Any]:
    """Errors and variances of each weight, by head, then summed up."""
    common = {"is_causal": True, "enable_gqa": True, "scale": scale}
    exact = exact_attention_with_lse(*qkv, **common)
    later = slice(qkv[0].shape[2] // 2, None)
    errors, spreads = {}, {}
    for weight in WEIGHTS:
        config = HyperConfig(control_weight=weight, control_rope_base=rope_base, **SETTINGS)
        parts = [hyper_attention_with_lse(*qkv, config=config, seed=s, **common)
                 for s in range(seeds)]  # fmt: skip
        gaps = torch.stack([(p.output - exact.output)[0, :, later].norm(dim=(-1, -2))
                            for p in parts])  # fmt: skip
        errors[weight] = (gaps / exact.output[0, :, later].norm(dim=(-1, -2))).mean(0)  # (H,)
        shares = torch.stack([torch.exp(p.lse - exact.lse)[0, :, later] for p in parts])
        spreads[weight] = shares.var(0).mean(-1)
    row: dict[str, Any] = {"error": round(float(errors[0.0].mean()), 4)}
    for weight in WEIGHTS[1:]:
        ratio, change = spreads[weight] / spreads[0.0], errors[weight] / errors[0.0]
        row[f"variance_ratio_{weight}"] = [round(float(x), 3) for x in ratio]
        row[f"error_ratio_{weight}"] = [round(float(x), 3) for x in change]
    best = torch.stack([spreads[w] for w in WEIGHTS]).argmin(0)
    row["best_weight"] = [WEIGHTS[int(i)] for i in best]
    return row


def main() -> None:
    """Run and append rows to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", default="0,5,10,15,20,25,29")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--rope-base", type=float, default=100000.0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    loaded = load(options.model)
    text = load_text().text
    tokens = loaded.tokenizer(text[len(text) // 2 :], return_tensors="pt").input_ids
    recorder = Recorder({int(x) for x in options.layers.split(",")})
    with torch.no_grad(), recorder:
        loaded.model(tokens[:, : options.length], use_cache=False)
    facts = {"mechanism": "hyper", "stage_name": "control", "model": options.model,
             "length": options.length, "seeds": options.seeds, "settings": SETTINGS,
             **environment(torch.device("cpu"))}  # fmt: skip
    for layer, qkv, scale in recorder.found:
        with torch.no_grad():
            row = {"layer": layer, **measure(qkv, scale, options.rope_base, options.seeds)}
        print(json.dumps(row), flush=True)
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(json.dumps({**facts, **row}) + "\n")


if __name__ == "__main__":
    main()
