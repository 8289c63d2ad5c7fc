# ruff: noqa: E501
"""Write docs/scaling.md: what each scheme would cost on 8, 64 and 1,024 GPUs, from measured rates.

    python tools/scaling.py [--check]

Kernel rates are the committed rows of benchmarks/results (one H100); the link inside a host is what
benchmarks/distributed.py measured (`link: ring step`), the one between hosts is assumed. With --check nothing is written; the exit code is
1 if the page is not what the rows say.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "scaling.md"
HEADS, KV_HEADS, DIM, SEGMENT, WINDOW, SINKS = 32, 8, 128, 2048, 1024, 4
HOST = 8  # GPUs of one host
INSIDE, BETWEEN = 360e9, 40e9  # bytes per second and GPU, one way: 80 % of NVLink 4 and of 400 Gb/s
LATENCY = 20e-6  # seconds per exchange
KEY_BYTES = 2 * KV_HEADS * DIM * 2  # of one token's key and value, bfloat16
LENGTHS = {"1M": 2**20, "10M": 10 * 2**20, "100M": 100 * 2**20}
RANKS = (8, 64, 1024)


def rows() -> list[dict]:
    """All verified rows with a time."""
    found = []
    for path in sorted(RESULTS.glob("h100-*.jsonl")):
        found += [json.loads(line) for line in path.read_text().splitlines()]
    return [r for r in found if r.get("verified") and r.get("ms_p50") and r["head_dim"] == DIM]


def seconds_per_score(found: list[dict], mechanism: str, impl: str, stage: str, **more) -> float:
    """Seconds per visible (query, key, head) of the longest measured causal run."""
    fit = [
        r for r in found
        if r["mechanism"] == mechanism and r["impl"] == impl and r["pass"] == stage
        and all(r.get(k) == v for k, v in more.items())
    ]  # fmt: skip
    best = max(fit, key=lambda r: r["length"])
    return best["ms_p50"] / 1e3 / (best["heads"] * best["length"] ** 2 / 2)


def seconds_per_token(found: list[dict], mechanism: str, stage: str, text: str = "") -> float:
    """Seconds per token and head of the longest run of a mechanism that is linear in length."""
    fit = [
        r for r in found
        if r["mechanism"] == mechanism and r["impl"] == "triton" and r["pass"] == stage
        and text in str(r["config"]) and r["heads"] == HEADS and r["kv_heads"] == HEADS
    ]  # fmt: skip
    best = max(fit, key=lambda r: r["length"])
    return best["ms_p50"] / 1e3 / best["heads"] / best["length"]


class Model:
    """Seconds of one attention layer, batch 1, forward and backward, on the slowest rank."""

    def __init__(self) -> None:
        found = rows()
        both = "forward_backward"
        self.flash = seconds_per_score(found, "exact", "flash", both, config="flash")
        self.cudnn_forward = seconds_per_score(found, "exact", "cudnn", "forward", config="cudnn")
        self.cudnn = seconds_per_score(found, "exact", "cudnn", both, config="cudnn")
        full = {"regime": "alive", "early_stop": None}
        self.stick = seconds_per_score(found, "stick_breaking", "triton", both, **full)
        self.stick_forward = seconds_per_score(found, "stick_breaking", "triton", "forward", **full)
        mixed = [
            r for r in found
            if r["mechanism"] == "stick_breaking" and r.get("regime") == "mixed"
            and r["early_stop"] and r["pass"] == both
        ]  # fmt: skip
        longest = max(mixed, key=lambda r: r["length"])
        self.stopped = longest["ms_p50"] / 1e3 / longest["heads"] / longest["length"]
        self.window = seconds_per_token(found, "window", both)
        self.linear = seconds_per_token(found, "infini", both, "update='linear'")
        self.delta = seconds_per_token(found, "infini", both, "update='delta'")
        links = [r for r in found_links() if r["ranks"] <= HOST]
        self.inside = max((r["gigabytes_per_second"] for r in links), default=INSIDE / 1e9) * 1e9
        self.inside_is_measured = bool(links)

    def link(self, ranks: int) -> float:
        """The slowest link on the way."""
        return self.inside if ranks <= HOST else BETWEEN

    def exact_ring(self, n: int, ranks: int) -> float:
        """R steps, each the longer of compute and transfer; the backward moves keys and float32
        gradients of keys: three times the bytes."""
        score_time = HEADS * n * n / 2 / ranks**2  # scores of one step
        shard = n / ranks * KEY_BYTES
        total = 0.0
        for cost, times in ((self.cudnn_forward, 1), (self.cudnn - self.cudnn_forward, 3)):
            step = score_time * cost
            moving = times * shard / self.link(ranks) + LATENCY
            total += step + (ranks - 1) * max(step, moving)
        return total

    def exact_ulysses(self, n: int, ranks: int) -> float | None:
        """Compute on H / R heads; nothing hides the two exchanges, forward and backward."""
        if ranks > HEADS:
            return None
        moved = (2 * HEADS + 2 * max(KV_HEADS, ranks)) * DIM * 2 * n / ranks * (ranks - 1) / ranks
        return HEADS * n * n / 2 / ranks * self.cudnn + 2 * (moved / self.link(ranks) + 2 * LATENCY)

    def stick_ring(self, n: int, ranks: int) -> float:
        """2 R steps of half a shard; a rank waits for its neighbours where it has one chunk and
        they have two (3 R against 2 R + 1 units); parts kept, so nothing is computed again."""
        ideal = HEADS * n * n / 2 / ranks * self.stick
        shard = n / ranks * KEY_BYTES
        return max(ideal * 3 * ranks / (2 * ranks + 1), 4 * ranks * shard / self.link(ranks))

    def stick_early_stop(self, n: int, ranks: int) -> float:
        """Sticks are spent in the own chunk or the one before: one more step."""
        step = 4 * n / ranks * KEY_BYTES / self.link(ranks) + 2 * LATENCY
        return HEADS * n / ranks * self.stopped + step

    def window_neighbours(self, n: int, ranks: int) -> float:
        """window + sinks rows there, their gradients back."""
        moved = 2 * (WINDOW + SINKS) * KEY_BYTES
        return HEADS * n / ranks * self.window + moved / self.link(ranks) + 4 * LATENCY

    def infini(self, n: int, ranks: int, *, delta: bool = False) -> float:
        """Memories of all ranks, forward, and their gradients, backward, in float32."""
        size = KV_HEADS * (DIM * DIM + DIM + (DIM * DIM if delta else 0)) * 4
        moved = 2 * ranks * size / self.link(ranks)
        return HEADS * n / ranks * (self.delta if delta else self.linear) + moved + 4 * LATENCY


def found_links() -> list[dict]:
    """Rows of benchmarks/distributed.py that measured a link."""
    lines = [
        line
        for path in RESULTS.glob("*distributed*.jsonl")
        for line in path.read_text().splitlines()
    ]
    return [r for r in map(json.loads, lines) if r["impl"] == "link: ring step"]


def measured_table() -> str:
    """What two GPUs of one host gave: the last run of each scheme, length and pass."""
    lines = [
        json.loads(line)
        for path in sorted(RESULTS.glob("*distributed*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    last = {(r["impl"], r["length"], r["pass"]): r for r in lines if r["verified"]}
    shown = ["| scheme | tokens | pass | one GPU | two GPUs | times one | received per rank |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for (impl, length, stage), row in last.items():
        if row.get("received_bytes") is None:
            continue
        speed = row.get("speedup")
        one = "-" if speed is None else text_of(row["ms_p50"] * speed / 1e3)
        times = "-" if speed is None else f"{speed:.2f}"
        shown.append(
            f"| {impl} | {length:,} | {stage.replace('_', ' + ')} | {one} | "
            f"{text_of(row['ms_p50'] / 1e3)} | {times} | {row['received_bytes'] / 1e6:,.1f} MB |"
        )
    for row in lines:
        if row["impl"].startswith("torch context_parallel"):
            shown.append(f"| {row['impl']} | {row['length']:,} | {row['pass'].replace('_', ' + ')} "
                         f"| - | {text_of(row['ms_p50'] / 1e3)} | - | - |")  # fmt: skip
    return "\n".join(shown)


def table(model: Model) -> str:
    """Rows: scheme and GPUs; columns: lengths; cells: milliseconds."""
    schemes = {
        "exact, ring": model.exact_ring,
        "exact, head exchange": model.exact_ulysses,
        "stick-breaking, ring": model.stick_ring,
        "stick-breaking, early stop, ring": model.stick_early_stop,
        "window, neighbours": model.window_neighbours,
        "Infini, memories": model.infini,
        "Infini delta, memories": lambda n, ranks: model.infini(n, ranks, delta=True),
    }
    lines = [f"| scheme | GPUs | {' | '.join(LENGTHS)} |", "|---|---|" + "---|" * len(LENGTHS)]
    for name, seconds in schemes.items():
        for ranks in RANKS:
            cells = [seconds(n, ranks) for n in LENGTHS.values()]
            shown = " | ".join("-" if cell is None else text_of(cell) for cell in cells)
            lines.append(f"| {name} | {ranks:,} | {shown} |")
    return "\n".join(lines)


def memory_table() -> str:
    """Bytes per rank of one layer's query, key, value and output."""
    lines = [f"| GPUs | {' | '.join(LENGTHS)} |", "|---|" + "---|" * len(LENGTHS)]
    for ranks in RANKS:
        sizes = [(2 * HEADS + 2 * KV_HEADS) * DIM * 2 * n / ranks for n in LENGTHS.values()]
        lines.append(f"| {ranks:,} | " + " | ".join(f"{s / 2**30:.3g} GiB" for s in sizes) + " |")
    return "\n".join(lines)


def text_of(seconds: float) -> str:
    """Two or three digits with a unit."""
    if seconds >= 1:
        return f"{seconds:,.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"
    return f"{seconds * 1e3:.3g} ms"


def page(model: Model) -> str:
    """The whole document."""
    rate = 4 * DIM / model.cudnn_forward  # FLOP/s
    hidden = {name: 2 * KV_HEADS / HEADS * rate / link
              for name, link in (("inside", model.inside), ("between", BETWEEN))}  # fmt: skip
    n = LENGTHS["1M"]
    share, share_of_64 = (
        1 - HEADS * n / ranks * model.linear / model.infini(n, ranks) for ranks in (1024, 64)
    )
    source = "measured" if model.inside_is_measured else "assumed: 80 % of NVLink 4"
    return f"""# Scaling on paper

What one attention layer would cost on many GPUs, forward and backward. **Beyond two GPUs this is a
simulation:** kernel rates are measured on one H100, the link inside a host on two (the rows in
`benchmarks/results`); nothing has been run on more. `benchmarks/distributed.py` makes the rows of
several GPUs; this page is written by `python tools/scaling.py`.

One layer, batch 1, causal, bfloat16: H = {HEADS} query heads, H_kv = {KV_HEADS} key heads, D = {DIM};
window {WINDOW} and {SINKS} sinks; segments of {SEGMENT} tokens. N tokens, R GPUs, n = N / R tokens
each.

| rate | value | from |
|---|---|---|
| exact, flash, forward and backward | {1e-12 * 3.5 * 4 * DIM / model.flash:.0f} TFLOP/s | measured |
| exact, cuDNN, forward and backward | {1e-12 * 3.5 * 4 * DIM / model.cudnn:.0f} TFLOP/s | measured |
| stick-breaking, every key, forward and backward | {model.stick / model.flash:.2f} times exact flash | measured |
| stick-breaking, early stop, mixed heads | {1e9 * model.stopped:.1f} ns per token and head | measured |
| window, forward and backward | {1e9 * model.window:.1f} ns per token and head | measured |
| Infini linear, delta, forward and backward | {1e9 * model.linear:.1f}, {1e9 * model.delta:.1f} ns per token and head | measured |
| link inside a host of {HOST}, one way | {model.inside / 1e9:.0f} GB/s per GPU | {source} |
| link between hosts, one way | {BETWEEN / 1e9:.0f} GB/s per GPU | assumed: 80 % of 400 Gb/s |
| one exchange | {LATENCY * 1e6:.0f} µs | assumed |

A causal score costs 4 D operations forward, 3.5 times that with the backward. On Hopper the library's
head exchange and its ring both run cuDNN's kernel.

## Measured on two GPUs

Two H100 of one host, NCCL; times of the slower rank, median of three. One GPU: the mechanism's own
function in the same run. Every scheme was compared with one GPU at 16,384 tokens, output and
gradients, before it was timed. "Received": what the first rank gets per call; in the rows of "window
neighbours" from 262,144 tokens on, and in stick-breaking's, rows that it keeps are counted, too.

{measured_table()}

Where one GPU takes a few milliseconds (windows, early stop, Infini), two gain little or lose: checks
and launches cost a few milliseconds per call, and in these runs a rank's own rows went through NCCL
as well, which moves them slowly. They no longer do; that has not been timed. The exact ring ran on
flash at first (1.14 and 1.17 times one GPU at 131,072 tokens, since one GPU takes cuDNN); on cuDNN's
kernels it reaches what the table shows.

## Formulas

b = 4 H_kv D = {KEY_BYTES} bytes: a token's key and value. c: seconds per score, w: per token and head.

- **Exact, ring.** R steps of N² H / (2 R²) scores. Forward they move n b bytes each, backward 3 n b
  (keys again, float32 gradients). A step takes max(compute, transfer). Transfer hides behind
  compute if n > 2 (H_kv / H) · rate / link: {hidden["inside"]:,.0f} tokens per GPU inside a host,
  {hidden["between"]:,.0f} between hosts.
- **Head exchange.** N² H c / (2 R), plus (2 H + 2 max(H_kv, R)) 2 D n (R - 1) / R bytes forward and
  the same backward, which nothing hides. R must divide H: at most {HEADS} GPUs here.
- **Stick-breaking, ring.** As exact, in 2 R half-shards; zigzag ranks wait for each other up to
  3 R / (2 R + 1). Parts kept; with `recompute=True` add one forward.
- **Stick-breaking, early stop.** n H w, and one or two steps of transfer: the work is local.
- **Window.** n H w, and (window + sinks) b bytes each way, whatever N and R are.
- **Infini.** n H w, and R · 4 H_kv (D² + D) bytes each way (delta: 2 D² + D): no N in it, but an
  R. For 1,024 GPUs that is {1024 * KV_HEADS * (DIM * DIM + DIM) * 4 / 2**20:.0f} MiB; a scan in log R rounds would move less, and is not written.

## Time of one layer, forward and backward

{table(model)}

"-": more GPUs than heads.

## Memory of one layer's query, key, value and output, per GPU

{memory_table()}

The feed-forward layer needs more than that unless it runs in chunks (`longspan.nn.ChunkedMLP`).

## Which scheme when

- **Window, early-stopping stick-breaking:** their own schemes, at any length and any number of GPUs;
  time falls as 1 / R until it meets the latency.
- **Infini:** passing memories. What it moves does not grow with N but with R: on 1,024 GPUs and 1M
  tokens it is {share:.0%} of the time, on 64 GPUs {share_of_64:.0%}.
- **Exact, up to {HOST} GPUs of one host:** head exchange or ring, which measure alike. The head
  exchange needs no balance between ranks; its bytes are a small part of the time from 1M tokens on.
- **Exact, more GPUs than a host or than heads:** the ring, with at least {hidden["between"]:,.0f} tokens on
  each GPU. Below that, links are waited for.
- **Stick-breaking, every key:** head exchange up to {HEADS} GPUs; the ring beyond.
- **HyperAttention, Conv-Basis, anything new:** head exchange, which is exact for whatever treats
  heads independently. With more GPUs than heads HyperAttention has an exchange of columns and opened
  clusters, which has not been timed.
- **100M tokens of exact attention** take {text_of(model.exact_ring(LENGTHS["100M"], 64))} per layer on 64 GPUs: no scheme mends N². That is
  what the linear mechanisms are for.

## Not in the simulation

Projections and feed-forward layers (1 / R, no exchange), FSDP's traffic, stragglers, and exchanges
that share a link with another parallelism.
"""


def main() -> int:
    """Write, or compare."""
    text = page(Model())
    if "--check" in sys.argv[1:]:
        return int(not PAGE.exists() or PAGE.read_text() != text)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
