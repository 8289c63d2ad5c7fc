"""Where HyperAttention loses a passkey, and what brings it back: a dense simulation on a GPU.

    python benchmarks/hyper_passkey.py --model FOLDER --train BOOK.txt --texts FOLDER --out FILE

Prompts have the same number of tokens, five-digit keys and depths 0 to 0.85; a prompt counts if
each digit is the model's first choice given those before. Format and heads are picked on the
training book, results are on the held-out one. The simulation takes index, choice and columns from
the library and computes all scores of each query under the mask that these make, so it can also
show what no fast kernel does: an oracle's choice, single rows or heads that are exact. It is
checked against the library's own output first. Rows are written one by one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import hyper_attention
from longspan._validation import validate
from longspan.eval.rows import provenance
from longspan.hf import parse_config
from longspan.hyper import HyperConfig
from longspan.hyper.geometry import far_before
from longspan.hyper.impl import common
from longspan.hyper.index.lsh import draw_projections
from longspan.mechanisms import mechanism_of_config

ROWS = 1024  # queries whose scores are held at a time
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
MAGIC = "special magic number for river mentioned in the text"

#: name -> (before the filler, needle, after the filler up to the key)
FORMATS: dict[str, tuple[str, str, str]] = {
    "landmark": (TASK, f"\n{KEY}\n", "\nWhat is the pass key? The pass key is"),
    "plain": ("", f"\n\n{KEY}\n\n", "\n\nThe pass key is"),
    "question": ("", f"\n\n{KEY}\n\n", "\n\nWhat is the pass key? The pass key is"),
    "chat": (
        "<|im_start|>user\n" + TASK,
        f"\n{KEY}\n",
        "\nWhat is the pass key?<|im_end|>\n<|im_start|>assistant\nThe pass key is",
    ),
    "magic": (
        "Some special magic numbers are hidden within the following text. Memorize them.\n",
        " One of the special magic numbers for river is: {key}. ",
        f"\nWhat is the {MAGIC}? The {MAGIC} is:",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Patch:
    """What attention computes.

    config: None: exact. layers: where; None: all. exact_heads: (layer, head) that stay exact.
    exact_last, exact_first: queries at the end (the question), or all others, that stay exact.
    oracle: "": the library's choice; "clusters": the clusters of largest mass; "keys": the
        num_probes * cluster_size largest far scores, and no columns.
    max_error: heads of a call with a larger error are exact, as in HyperConfig.
    """

    config: HyperConfig | None = None
    layers: frozenset[int] | None = None
    exact_heads: frozenset[tuple[int, int]] = frozenset()
    exact_last: int = 0
    exact_first: int = 0
    oracle: str = ""
    max_error: float | None = None
    by_layer: dict[int, HyperConfig | None] | None = None


@dataclass
class Seen:
    """What a run of prompts notes on its way."""

    exact_heads: int = 0
    heads: int = 0
    recall: dict[tuple[int, int], list[float]] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True, help="a training book")
    parser.add_argument("--texts", type=Path, required=True, help="folder of held-out books")
    parser.add_argument("--book", default="Leviathan")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--few", type=int, default=20, help="prompts of the diagnosis")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--parts", default="formats,heads,table,diagnosis")
    parser.add_argument("--notes", type=Path, help="JSON of formats and heads, made or read")
    parser.add_argument("--stop-after", type=float, default=math.inf)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--library", action="store_true", help="its output, not the simulation")
    parser.add_argument("--settings", action="append", help="of the library; one row each")
    parser.add_argument("--share", default="0/1", help="i/n: this process makes rows i, i + n, ...")
    parser.add_argument("--out", type=Path, required=True)
    Bench(parser.parse_args()).run()


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.backends.cuda.matmul.allow_tf32 = True
        common._SCORES_AT_ONCE = 2**26
        self.options, self.begin = options, time.perf_counter()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
        )
        self.model.to(self.device).eval()
        self.layers = self.model.config.num_hidden_layers
        self.heads = self.model.config.num_attention_heads
        books = {path.stem: path for path in sorted(options.texts.glob("*.txt"))}
        heldout = next(path for name, path in books.items() if options.book in name)
        self.books = {
            "train": self.ids(options.train.read_text()), "heldout": self.ids(heldout.read_text()),
        }  # fmt: skip
        self.notes: dict[str, Any] = {}
        self.first = [self.tokenizer.bos_token_id] if self.ids("a", True) != self.ids("a") else []
        if options.notes and options.notes.exists():
            self.notes = json.loads(options.notes.read_text())
        options.out.parent.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        parts = self.options.parts.split(",")
        self.check()
        if "formats" in parts:
            self.pick_format()
        if "heads" in parts:
            self.rank_heads()
        if self.options.notes and not self.options.notes.exists():
            self.options.notes.write_text(json.dumps(self.notes))
        mine, shares = (int(part) for part in self.options.share.split("/"))
        table = [("table", *row) for row in self.table()] if "table" in parts else []
        jobs = table[:8]
        if "diagnosis" in parts:
            jobs += [("diagnosis", *row) for row in self.diagnosis()]
        jobs += table[8:]
        for number, (part, name, patch) in enumerate(jobs):
            if number % shares == mine and time.perf_counter() - self.begin < (
                self.options.stop_after
            ):
                count = self.options.prompts if part == "table" else self.options.few
                self.row(part, name, patch, count)

    # -- prompts

    def prompts(self, style: str, count: int, book: str) -> tuple[Tensor, Tensor, list[list[int]]]:
        """(count, tokens), digits (count, 5), positions of the digits of the needle."""
        head, needle, tail = FORMATS[style]
        hays = self.books[book]
        rows, digits, places = [], [], []
        for number in range(count):
            draw = random.Random(f"{book}-{number}")
            key = str(draw.randint(10_000, 99_999))
            depth = 0.85 * (number % 10) / 9
            start = draw.randrange(0, max(1, len(hays) - self.options.tokens))
            parts = [self.ids(part) for part in (head, needle.format(key=key), tail + " ")]
            parts[0] = self.first + parts[0]
            answer = self.ids(key)
            assert len(answer) == 5, "a tokenizer with one token for each digit"
            room = self.options.tokens - sum(map(len, parts)) - len(answer)
            hay = hays[start : start + room]
            assert len(hay) == room, "a longer book"
            cut = round(depth * room)
            row = [*parts[0], *hay[:cut], *parts[1], *hay[cut:], *parts[2], *answer]
            base = len(parts[0]) + cut
            places.append([base + at for at in _find_all(parts[1], answer)])
            rows.append(row)
            digits.append(answer)
        return torch.tensor(rows), torch.tensor(digits), places

    def ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        made = self.tokenizer(text, add_special_tokens=add_special_tokens)
        found: list[int] = made["input_ids"]
        return found

    # -- measuring

    def answer(
        self, style: str, count: int, book: str, patch: Patch, seen: Seen | None = None,
        look: Callable[..., None] | None = None,
    ) -> tuple[list[bool], list[float]]:  # fmt: skip
        """Per prompt: all digits right, and nats per digit."""
        rows, digits, places = self.prompts(style, count, book)
        right, losses = [], []
        for start in range(0, count, self.options.batch):
            part = slice(start, start + self.options.batch)
            ids, goal = rows[part].to(self.device), digits[part].to(self.device)
            with torch.no_grad(), self.patched(patch, seen, look, places[part]):
                hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
                chances = F.log_softmax(self.model.lm_head(hidden[:, -6:-1]).float(), -1)
            right += (chances.argmax(-1) == goal).all(-1).tolist()
            losses += (-chances.gather(2, goal[..., None])).mean((1, 2)).tolist()
        return right, losses

    @contextmanager
    def patched(
        self, patch: Patch, seen: Seen | None, look: Callable[..., None] | None,
        places: list[list[int]],
    ) -> Iterator[None]:  # fmt: skip
        original, layer = F.scaled_dot_product_attention, 0

        def attend(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            *rest: Any,
            **settings: Any,
        ) -> Tensor:
            nonlocal layer
            if attn_mask is not None:  # a layer with a sliding window
                return original(query, key, value, attn_mask, *rest, **settings)
            group = query.shape[1] // self.model.config.num_key_value_heads
            if key.shape[1] == query.shape[1]:
                key, value = key[:, ::group], value[:, ::group]
            number, layer = layer, layer + 1
            if look is not None:
                look(number, query, key, value, places)
            config = patch.config
            if patch.by_layer is not None:
                config = patch.by_layer.get(number)
            exact = [head for at, head in patch.exact_heads if at == number]
            all_exact = len(exact) == query.shape[1]
            if config is None or all_exact or (patch.layers and number not in patch.layers):
                if seen is not None:
                    seen.heads += query.shape[0] * query.shape[1]
                    seen.exact_heads += query.shape[0] * query.shape[1]
                return _exact(original, query, key, value)
            note = None if seen is None else (seen, number, places)
            if self.options.library:
                return hyper_attention(
                    query, key, value, is_causal=True, enable_gqa=True, config=config
                )
            output = simulate(query, key, value, config, patch.oracle, note)
            if exact:
                of = [head // group for head in exact]
                output[:, exact] = _exact(original, query[:, exact], key[:, of], value[:, of])
            if patch.exact_last or patch.exact_first or patch.max_error is not None:
                want = _exact(original, query, key, value)
                if patch.exact_last:
                    output[:, :, -patch.exact_last :] = want[:, :, -patch.exact_last :]
                if patch.exact_first:
                    output[:, :, : -patch.exact_first] = want[:, :, : -patch.exact_first]
                if patch.max_error is not None:
                    some = torch.arange(64, device=query.device) * query.shape[2] // 64
                    apart = (output[:, :, some] - want[:, :, some]).norm(dim=-1)
                    wrong = (apart / want[:, :, some].norm(dim=-1)).mean(-1) > patch.max_error
                    output = torch.where(wrong[..., None, None], want, output)
                    if seen is not None:
                        seen.exact_heads += int(wrong.sum())
            if seen is not None:
                seen.heads += query.shape[0] * query.shape[1]
                seen.exact_heads += len(exact) * query.shape[0]
            return output

        F.scaled_dot_product_attention = attend
        try:
            yield
        finally:
            F.scaled_dot_product_attention = original

    def row(self, part: str, name: str, patch: Patch, count: int) -> None:
        seen, begin = Seen(), time.perf_counter()
        style = self.notes.get("format", "plain")
        right, losses = self.answer(style, count, "heldout", patch, seen)
        share = seen.exact_heads / max(seen.heads, 1)
        configs = [patch.config] * self.layers
        if patch.by_layer is not None:
            configs = [patch.by_layer.get(layer) for layer in range(self.layers)]
        shares = [1.0 if config is None else self.visited(config) for config in configs]
        visited = _mean(shares)
        if patch.by_layer is None:
            visited = share + (1 - share) * shares[0]
        recall = {f"{layer}.{head}": _mean(values) for (layer, head), values in seen.recall.items()}
        best = [tuple(pair) for pair in self.notes.get("retrieval", [])[:16]]
        known = [recall[f"{a}.{b}"] for a, b in best if f"{a}.{b}" in recall]
        self.add(
            {"kind": "passkey", "part": part, "setting": name, "format": style, "prompts": count,
             "score": _mean(right), "loss": _mean(losses), "right": [int(x) for x in right],
             "visited": visited, "exact_heads": share, "config": str(patch.config),
             "by_depth": [_mean(right[depth::10]) for depth in range(10)] if count >= 10 else None,
             "recall_of_16_heads": _mean(known) if known else None, "recall": recall,
             "seconds": time.perf_counter() - begin}
        )  # fmt: skip

    def visited(self, config: HyperConfig) -> float:
        count = mechanism_of_config(config).visited_fraction
        assert count is not None
        return float(count(config, self.options.tokens, self.options.tokens, is_causal=True))

    def add(self, row: dict[str, Any]) -> None:
        text = {
            key: f"{value:.3f}" if isinstance(value, float) else value
            for key, value in row.items()
            if key not in ("right", "recall", "config")
        }
        print(f"{time.perf_counter() - self.begin:6.1f} s ", text, flush=True)
        whole = {
            **row,
            "model": self.options.model.name,
            "dtype": self.options.dtype,
            "tokens": self.options.tokens,
            **provenance(torch.device(self.device)),
        }
        with self.options.out.open("a") as file:
            file.write(json.dumps(whole) + "\n")

    # -- parts

    def check(self) -> None:
        """The simulation against the library, on small random inputs and on the model's own."""
        torch.manual_seed(0)
        q = torch.randn(2, 6, 700, 64, device=self.device) * 2
        k, v = (torch.randn(2, 3, 700, 64, device=self.device) for _ in range(2))
        for text in ("hyper:chunk_size=128", "hyper:chunk_size=64,window=32,index=kmeans"):
            config = parse_config(text)
            want = hyper_attention(
                q, k, v, is_causal=True, enable_gqa=True, config=config, impl="eager"
            )
            apart = (simulate(q, k, v, config) - want).abs().flatten(2).amax(-1)
            # TF32 may choose otherwise where two clusters are as good
            share = float((apart > 0.02).float().mean())
            print("check", text, "largest", float(apart.max()), "heads apart", share, flush=True)
            rows = (simulate(q, k, v, config) - want).abs().amax(-1) > 0.02
            assert float(rows.float().mean()) < 0.02, "the simulation is not the library"

    def pick_format(self) -> None:
        """Exact attention on the training book and, for the record, on the held-out one."""
        scores = {}
        for style in FORMATS:
            for book in ("train", "heldout"):
                begin = time.perf_counter()
                count = self.options.few
                right, losses = self.answer(style, count, book, Patch())
                self.add({"kind": "format", "format": style, "book": book, "prompts": count,
                          "score": _mean(right), "loss": _mean(losses),
                          "right": [int(x) for x in right],
                          "seconds": time.perf_counter() - begin})  # fmt: skip
                if book == "train":
                    scores[style] = (_mean(right), -_mean(losses))
        self.notes["format"] = max(scores, key=lambda style: scores[style])

    def rank_heads(self) -> None:
        """Heads by what they give the answer's digits of the needle's, and by their error."""
        mass = torch.zeros(self.layers, self.heads)
        error = torch.zeros(self.layers, self.heads)
        config = HyperConfig()
        count = self.options.batch

        def look(layer: int, query: Tensor, key: Tensor, value: Tensor, places: Any) -> None:
            keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
            scores = query[:, :, -6:-1] @ keys.transpose(2, 3) * query.shape[-1] ** -0.5
            scores[..., -5:] += torch.full((5, 5), -math.inf, device=query.device).triu(0)
            given = scores.softmax(-1)
            for entry, needle in enumerate(places):
                for digit in range(5):
                    at = [base + digit for base in needle]
                    mass[layer] += given[entry, :, digit][:, at].sum(-1).cpu() / (5 * count)
            want = _exact(F_SDPA, query, key, value)
            apart = (simulate(query, key, value, config) - want).norm(dim=-1) / want.norm(dim=-1)
            error[layer] += apart.mean((0, 2)).cpu()

        self.answer(self.notes.get("format", "plain"), count, "train", Patch(), None, look)
        for name, table in (("retrieval", mass), ("error", error)):
            order = table.flatten().argsort(descending=True).tolist()
            self.notes[name] = [[n // self.heads, n % self.heads] for n in order]
            self.notes[f"{name}_values"] = table.tolist()
        self.add({"kind": "heads", "format": self.notes.get("format"), "retrieval": mass.tolist(),
                  "error": error.tolist(), "book": "train"})  # fmt: skip

    def best_heads(self, name: str, count: int) -> frozenset[tuple[int, int]]:
        return frozenset((a, b) for a, b in self.notes.get(name, [])[:count])

    def table(self) -> list[tuple[str, Patch]]:
        def hyper(text: str = "", **settings: Any) -> Patch:
            config = parse_config("hyper" + (f":{text}" if text else ""))
            assert isinstance(config, HyperConfig)
            return Patch(config=config, **settings)

        if self.options.settings:
            named = {text: parse_config(text) for text in self.options.settings}
            return [
                (text, Patch(config=config if isinstance(config, HyperConfig) else None))
                for text, config in named.items()
            ]
        both = self.best_heads("retrieval", 16) | self.best_heads("error", 16)
        return [
            ("exact", Patch()),
            ("default", hyper()),
            ("p=32", hyper("num_probes=32")),
            ("p=48", hyper("num_probes=48")),
            ("pca of 8, p=48, window 128, chunks 256",
             hyper("window=128,chunk_size=256,cluster_size=8,num_probes=48")),
            ("16 retrieval heads exact", hyper(exact_heads=self.best_heads("retrieval", 16))),
            ("32 retrieval heads exact", hyper(exact_heads=self.best_heads("retrieval", 32))),
            ("16 retrieval + 16 wrong heads exact", hyper(exact_heads=both)),
            ("32 most wrong heads exact", hyper(exact_heads=self.best_heads("error", 32))),
            ("every second layer", hyper(layers=frozenset(range(0, self.layers, 2)))),
            ("pca of 8, p=48, window 128, chunks 256, 16 retrieval heads exact",
             hyper("window=128,chunk_size=256,cluster_size=8,num_probes=48",
                   exact_heads=self.best_heads("retrieval", 16))),
            ("k-means, p=32", hyper("index=kmeans,num_probes=32")),
            ("p=32, spread 3", hyper("num_probes=32,probe_spread=3")),
            ("pca of 8, p=64, window 128, chunks 256",
             hyper("window=128,chunk_size=256,cluster_size=8,num_probes=64")),
            ("max_error 0.1", hyper(max_error=0.1)),
            ("spread 0", hyper("probe_spread=0")),
        ]  # fmt: skip

    def diagnosis(self) -> list[tuple[str, Patch]]:
        config = HyperConfig()
        every = {(layer, head) for layer in range(self.layers) for head in range(self.heads)}
        third = self.layers // 3
        rows = [
            ("question exact, text approximate", Patch(config=config, exact_last=96)),
            ("question approximate, text exact", Patch(config=config, exact_first=96)),
            ("oracle clusters", Patch(config=config, oracle="clusters")),
            ("oracle keys", Patch(config=config, oracle="keys")),
            ("oracle keys, question only", Patch(config=config, oracle="keys", exact_first=96)),
            ("8 retrieval heads approximate",
             Patch(config=config, exact_heads=frozenset(every - self.best_heads("retrieval", 8)))),
            ("32 retrieval heads approximate",
             Patch(config=config, exact_heads=frozenset(every - self.best_heads("retrieval", 32)))),
            ("64 retrieval heads exact",
             Patch(config=config, exact_heads=self.best_heads("retrieval", 64))),
        ]  # fmt: skip
        for start in range(0, self.layers, third):
            layers = range(start, min(start + third, self.layers))
            rows.append((f"layers {layers[0]} to {layers[-1]} only",
                         Patch(config=config, layers=frozenset(layers))))  # fmt: skip
        return [(name, patch) for name, patch in rows]


F_SDPA = F.scaled_dot_product_attention


def _exact(attend: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    group = query.shape[1] // key.shape[1]
    output: Tensor = attend(
        query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), is_causal=True
    )
    return output


@torch.no_grad()
def simulate(
    query: Tensor, key: Tensor, value: Tensor, config: HyperConfig, oracle: str = "",
    note: tuple[Seen, int, list[list[int]]] | None = None,
) -> Tensor:  # fmt: skip
    """The estimator by its definition: (B, H, N, D_v), causal, structure="chunks"."""
    call = validate("simulate", query, key, value, is_causal=True, enable_gqa=True)
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    planes = None
    if config.index == "lsh":
        planes = draw_projections(0, kv_heads, dim, config.num_projections, query.device)
    index = common.chunk_index(call, config, planes, 0)
    clusters = index.counts.shape[2]
    chosen = common.choose(call, config, index)
    columns = common.make_columns(call, config, index)
    label = torch.full((batch, kv_heads, length), clusters, device=key.device)
    label[:, :, : index.labels.shape[2]] = torch.where(index.labels < 0, clusters, index.labels)
    output = torch.empty((batch, heads, length, value.shape[-1]), device=query.device)
    places = torch.arange(length, device=query.device)
    full = torch.tensor([length // config.chunk_size], device=query.device)
    for start in range(0, length, ROWS):
        stop = min(start + ROWS, length)
        rows, num = places[start:stop], stop - start
        before = far_before(rows[None], config, full).squeeze(0)
        most = int(before.max()) * config.clusters_per_chunk
        keys = torch.cat((key[:, :, :stop], columns.key[:, :, :most]), 2)
        values = torch.cat((value[:, :, :stop], columns.value[:, :, :most]), 2)
        q = (query[:, :, start:stop] * call.scale).reshape(batch, kv_heads, group * num, dim)
        scores = (q @ keys.transpose(2, 3)).view(batch, kv_heads, group, num, -1)
        scores[..., stop:] += columns.bias[:, :, None, None, :most]
        causal = places[:stop] <= rows[:, None]
        far = places[:stop] < (before * config.chunk_size)[:, None]
        seen = torch.arange(most, device=rows.device) // config.clusters_per_chunk < before[:, None]
        near = causal & ~far
        own = scores[..., :stop]
        if oracle:
            own.masked_fill_(~causal, -math.inf)
        if oracle == "keys":
            count = min(config.num_probes * config.cluster_size, stop)
            least = own.masked_fill(near, -math.inf).topk(count, -1).values[..., -1:]
            sinks = places[:stop] < config.num_sinks
            visible = (own >= least) & causal | near | (sinks & causal)
            own.masked_fill_(~visible, -math.inf)
            scores[..., stop:] = -math.inf
        else:
            picks = chosen[:, :, start:stop].long()
            if oracle == "clusters" and most:
                weight = torch.exp(own - own.amax(-1, keepdim=True))
                names = torch.arange(most, device=rows.device)
                member = (label[:, :, :stop, None] == names).to(weight.dtype)
                mass = weight.flatten(2, 3) @ member
                mass = mass.view(batch, heads, num, most).masked_fill(~seen, -1.0)
                best = mass.topk(min(config.num_probes, most), -1)
                picks = torch.where(best.values < 0, -1, best.indices)
            opened = torch.zeros(
                (batch, heads, num, clusters + 1), dtype=torch.bool, device=rows.device
            )
            opened.scatter_(3, torch.where(picks < 0, clusters, picks), True)
            opened[..., clusters] = True  # sinks
            opened = opened.view(batch, kv_heads, group, num, -1)
            at = label[:, :, None, None, :stop].expand(-1, -1, group, num, -1)
            visible = opened.gather(4, at).logical_or_(near).logical_and_(causal)
            own.masked_fill_(visible.logical_not(), -math.inf)
            scores[..., stop:].masked_fill_(opened[..., :most] | ~seen, -math.inf)
        if note is not None and stop == length:
            _note_recall(note, visible[..., -6:-1, :].flatten(1, 2))
        weights = scores.softmax(-1).flatten(2, 3)
        output[:, :, start:stop] = (weights @ values).view(batch, heads, num, -1)
    return output


def _note_recall(note: tuple[Seen, int, list[list[int]]], visible: Tensor) -> None:
    """How many of the needle's digits the answer's rows visit."""
    seen, layer, places = note
    shares = []
    for entry, needle in enumerate(places):
        hits = [visible[entry, :, d][:, [base + d for base in needle]].any(-1) for d in range(5)]
        shares.append(torch.stack(hits).float().mean(0))
    for head, share in enumerate(torch.stack(shares).mean(0).tolist()):
        seen.recall.setdefault((layer, head), []).append(share)


def _find_all(row: list[int], part: list[int]) -> list[int]:
    width = len(part)
    return [at for at in range(len(row) - width + 1) if row[at : at + width] == part]


def _mean(values: Any) -> float:
    values = [float(value) for value in values]
    return sum(values) / max(len(values), 1)


if __name__ == "__main__":
    main()
