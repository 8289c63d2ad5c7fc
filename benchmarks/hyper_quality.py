"""Quality of HyperAttention on a pretrained model: perplexity, captured mass, passkey.

Every table has exact attention and the controls (window and sinks alone at equal visited scores,
uniform samples alone). Documents are read in one batch; prompts are padded on the right, which
causal attention cannot see.

    python benchmarks/hyper_quality.py --texts books/ --tokens 8192 --out rows.jsonl
    python benchmarks/hyper_quality.py --model DIR --what passkey --prompts 100 --out rows.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import longspan
from longspan.bench.environment import environment
from longspan.bench.measure import append_rows
from longspan.eval.data import iter_texts
from longspan.eval.passkey import make_prompt
from longspan.hf import parse_config, patch
from longspan.hyper import HyperConfig, hardness
from longspan.hyper.index.chunks import build_chunk_index, cluster_means
from longspan.mechanisms import mechanism_of_config

SETTINGS = {
    "exact": "exact",
    "default": "hyper",
    "k-means of 16, p=16": "hyper:index=kmeans,probe_spread=0",
    "pca of 16, p=16": "hyper:index=pca,probe_spread=0",
    "pca of 16, p=16, spread 2": "hyper:index=pca,probe_spread=2",
    "pca of 16, p=24, spread 2": "hyper:index=pca,num_probes=24,probe_spread=2",
    "pca of 8, p=32, spread 2": "hyper:index=pca,cluster_size=8,num_probes=32,probe_spread=2",
    "pca of 16, chunks 1024, p=16, spread 2": "hyper:index=pca,chunk_size=1024,probe_spread=2",
    "LSH of 16, p=16": "hyper:index=lsh,probe_spread=0",
    "pca of 16, p=16, no columns": "hyper:index=pca,residual=none,probe_spread=2",
    "columns only": "hyper:index=pca,num_probes=0,probe_spread=0",
    "paper, LSH": 'hyper:structure=recursion,index=lsh,center_keys=false,residual=uniform,'
    "num_samples=256,num_projections=7,num_sinks=0",
    "paper, k-means": "hyper:structure=recursion,index=kmeans,residual=uniform,num_samples=256,"
    "num_projections=7,num_sinks=0",
    "uniform samples only": "hyper:index=pca,num_probes=0,residual=uniform,num_samples=32",
    "window 1024 + 4 sinks": "window:window=1024",
    "window 2048 + 4 sinks": "window:window=2048",
}  # fmt: skip
DEPTHS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def main() -> None:
    args = _arguments()
    loaded = longspan.models.load(args.model, device=args.device)
    model, tokenizer = loaded.model, loaded.tokenizer
    names = args.settings or list(SETTINGS)
    origin = {**environment(args.device), "model": loaded.name, "sha256": loaded.sha256}
    texts = [text for text in iter_texts(args.texts)][: args.documents]
    ids = _documents(tokenizer, [text.text for text in texts], args.tokens).to(args.device)
    for what in args.what.split(","):
        for row in _TABLES[what](model, tokenizer, ids, texts, names, args):
            print({k: v for k, v in row.items() if k != "heads"}, flush=True)
            if args.out:
                append_rows(args.out, [{"table": what, **row, **origin}])


def _perplexity(model, tokenizer, ids, texts, names, args):
    """All full-attention layers patched."""
    for name in names:
        config = parse_config(SETTINGS.get(name, name))
        started = time.perf_counter()
        with _patched(model, config, "all", args):
            losses = _losses(model, ids, args.batch)
        yield {
            "name": name,
            "config": str(config),
            "tokens": ids.shape[1],
            "documents": ids.shape[0],
            "visited": _visited(config, ids.shape[1]),
            "perplexity": float(losses.mean().exp()),
            "perplexity_second_half": float(losses[:, ids.shape[1] // 2 :].mean().exp()),
            "seconds": time.perf_counter() - started,
        }


def _layers(model, tokenizer, ids, texts, names, args):
    """Perplexity against the number of patched layers, last ones first."""
    total = _count_layers(model)
    for name in names:
        config = parse_config(SETTINGS.get(name, name))
        is_exact = mechanism_of_config(config).is_exact
        for count in [0] if is_exact else sorted({*range(0, total, 5), total}):
            chosen = f"last:{count}"
            with _patched(model, config, chosen, args) if count else contextlib.nullcontext():
                losses = _losses(model, ids, args.batch)
            yield {"name": name, "layers": count, "perplexity": float(losses.mean().exp()),
                   "visited": _visited(config, ids.shape[1])}  # fmt: skip


def _mass(model, tokenizer, ids, texts, names, args):
    """Captured mass per layer and head, by index, before and after RoPE."""
    captured = _capture(model, ids[:1])
    base = HyperConfig(index="pca", residual="centroid")
    kinds: dict[str, tuple[HyperConfig, bool]] = {
        "lsh": (HyperConfig(index="lsh", center_keys=False), False),
        "lsh, centred": (HyperConfig(index="lsh"), False),
        "pca": (base, False),
        "k-means": (HyperConfig(index="kmeans"), False),
        "pca, before RoPE": (base, True),
        "k-means, before RoPE": (HyperConfig(index="kmeans"), True),
    }
    for layer, (query, key, value) in enumerate(captured):
        for name, (config, unrotated) in kinds.items():
            index = None
            if unrotated:
                plain = _unrotate(model, key)
                index = build_chunk_index(plain, value, config, None, 0)
                index = _with_means_of(index, key, config)
            stats = hardness(query, key, value, is_causal=True, enable_gqa=True, config=config,
                             index=index)  # fmt: skip
            yield {
                "layer": layer,
                "name": name,
                "captured_mass": float(stats.captured_mass.mean()),
                "error": float(stats.error.mean()),
                "heads": {
                    "captured_mass": stats.captured_mass[0].tolist(),
                    "alpha": stats.alpha[0].tolist(),
                    "error": stats.error[0].tolist(),
                },
            }


def _passkey(model, tokenizer, ids, texts, names, args):
    """Share of prompts whose key is the model's first choice, token by token."""
    book = max((text.text for text in texts), key=len)
    count = lambda text: len(tokenizer(text)["input_ids"])  # noqa: E731
    prompts = []
    for number in range(args.prompts):
        depth = DEPTHS[number % len(DEPTHS)]
        prompts.append(make_prompt(count, length=args.tokens - 16, depth=depth, seed=number,
                                   haystack=args.haystack, book=book))  # fmt: skip
    for name in names:
        config = parse_config(SETTINGS.get(name, name))
        started = time.perf_counter()
        hits, losses = [], []
        with _patched(model, config, "all", args):
            for start in range(0, len(prompts), args.batch):
                for hit, loss in _answers(model, tokenizer, prompts[start : start + args.batch]):
                    hits.append(hit)
                    losses.append(loss)
        by_depth = {
            depth: sum(h for h, p in zip(hits, prompts, strict=True) if p.depth == depth)
            / max(1, sum(p.depth == depth for p in prompts))
            for depth in DEPTHS
        }
        yield {
            "name": name,
            "config": str(config),
            "prompts": len(prompts),
            "tokens": args.tokens,
            "found": sum(hits) / len(hits),
            "loss": sum(losses) / len(losses),
            "by_depth": by_depth,
            "visited": _visited(config, args.tokens),
            "seconds": time.perf_counter() - started,
        }


_TABLES = {"perplexity": _perplexity, "layers": _layers, "mass": _mass, "passkey": _passkey}


def _patched(model, config: Any, layers: str, args):
    if mechanism_of_config(config).is_exact:
        return contextlib.nullcontext()
    return patch(model, config, layers=layers, impl=args.impl)


def _visited(config: Any, length: int) -> float:
    mechanism = mechanism_of_config(config)
    return 1.0 if mechanism.is_exact else mechanism.visited_fraction(
        config, length, length, is_causal=True
    )  # fmt: skip


def _count_layers(model) -> int:
    from longspan.eval.layers import count_full_layers

    return count_full_layers(model)


def _documents(tokenizer, texts: list[str], tokens: int) -> Tensor:
    """(documents, tokens): from one third into each text."""
    rows = []
    for text in texts:
        part = text[len(text) // 3 :][: 8 * tokens]
        row = tokenizer(part, return_tensors="pt")["input_ids"][0, :tokens]
        if row.numel() == tokens:
            rows.append(row)
    if not rows:
        raise SystemExit(f"no text is long enough for {tokens} tokens")
    return torch.stack(rows)


@torch.no_grad()
def _losses(model, ids: Tensor, batch: int) -> Tensor:
    """(documents, tokens - 1) natural-log losses."""
    rows = []
    for start in range(0, ids.shape[0], batch):
        some = ids[start : start + batch]
        hidden = model.model(input_ids=some, use_cache=False).last_hidden_state
        losses = [
            F.cross_entropy(
                model.lm_head(hidden[:, at : at + 512][:, : some.shape[1] - 1 - at])
                .float().flatten(0, 1),
                some[:, at + 1 : at + 513].flatten(), reduction="none",
            ).view(some.shape[0], -1)
            for at in range(0, some.shape[1] - 1, 512)
        ]  # fmt: skip
        rows.append(torch.cat(losses, 1))
    return torch.cat(rows)


@torch.no_grad()
def _answers(model, tokenizer, prompts) -> list[tuple[bool, float]]:
    rows, keys = [], []
    for prompt in prompts:
        rows.append(tokenizer(prompt.text)["input_ids"])
        keys.append(tokenizer(f" {prompt.pass_key}", add_special_tokens=False)["input_ids"])
    longest = max(len(row) + len(key) for row, key in zip(rows, keys, strict=True))
    ids = torch.zeros((len(rows), longest), dtype=torch.int64, device=model.device)
    for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
        ids[i, : len(row) + len(key)] = torch.tensor(row + key)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    answers = []
    for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
        at = slice(len(row) - 1, len(row) + len(key) - 1)
        logits = model.lm_head(hidden[i, at]).float()
        target = torch.tensor(key, device=ids.device)
        answers.append((bool((logits.argmax(-1) == target).all()),
                        float(F.cross_entropy(logits, target))))  # fmt: skip
    return answers


@torch.no_grad()
def _capture(model, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rotated query, key and value of each layer's attention call."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    original = F.scaled_dot_product_attention

    def listen(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **settings: Any) -> Tensor:
        group = query.shape[1] // model.config.num_key_value_heads
        step = 1 if key.shape[1] != query.shape[1] else group
        found.append((query, key[:, ::step], value[:, ::step]))
        return original(query, key, value, *rest, **settings)

    F.scaled_dot_product_attention = listen
    try:
        model.model(input_ids=ids, use_cache=False)
    finally:
        F.scaled_dot_product_attention = original
    return found


def _unrotate(model, key: Tensor) -> Tensor:
    """Keys as they were before rotary embedding (halves rotated, as in Llama)."""
    places = torch.arange(key.shape[2], device=key.device)[None]
    cos, sin = model.model.rotary_emb(key, places)
    first, second = key.chunk(2, -1)
    return key * cos[:, None] - torch.cat((-second, first), -1) * sin[:, None]


def _with_means_of(index, key: Tensor, config: HyperConfig):
    """The clusters of `index` with the mean keys of other keys."""
    size, per_chunk = config.chunk_size, config.clusters_per_chunk
    batch, heads, length = index.labels.shape
    local = index.labels.reshape(-1, size).long()
    local = torch.where(local < 0, per_chunk, local % per_chunk)
    rows = key[:, :, :length].float().reshape(-1, size, key.shape[-1])
    means = cluster_means(rows, local, per_chunk)
    return index._replace(mean_key=means.reshape(batch, heads, -1, key.shape[-1]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="name or folder")
    parser.add_argument("--texts", type=Path, help="file, folder or archive; default: the book")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--what", default="perplexity", help=",".join(_TABLES))
    parser.add_argument("--settings", action="append", help="name of a row, or settings; repeats")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--haystack", default="book")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
