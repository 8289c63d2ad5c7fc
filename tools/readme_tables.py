"""Write the tables and the picture of README.md from the registry and the benchmark rows.

    python tools/readme_tables.py [--check]

With --check nothing is written; the exit code is 1 if the README is not what the rows say.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from longspan.mechanisms import MECHANISMS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "forward.svg"
LENGTHS = (4096, 16384, 32768, 65536, 131072)
NAMES = {
    "exact-fa2": "exact, torch flash",
    "exact-cudnn": "exact, torch cuDNN",
    "window": "window 1024 + 4 sinks",
    "hyper": "HyperAttention, the paper's mode",
    "stick_breaking": "stick-breaking, every key visited",
}


def load_rows() -> list[dict]:
    """All verified rows, with the key under which the tables show them, later files last."""
    rows = []
    for path in sorted(RESULTS.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            row["shown"] = shown_as(row)
            if row["shown"] and row.get("verified") and row.get("ms_p50") is not None:
                rows.append(row)
    return rows


def shown_as(row: dict) -> str | None:
    """The line of the table that a row belongs to; None if it is not shown."""
    if row["mechanism"] == "exact":
        if "segments" in str(row["config"]):  # many short sequences beside Infini-attention
            return None
        impl = str(row["impl"]).lower()
        return {"fa2": "exact-fa2", "flash": "exact-fa2", "cudnn": "exact-cudnn"}.get(impl)
    if row["mechanism"] == "stick_breaking":
        full = row.get("regime") == "alive" and not row.get("early_stop")
        return "stick_breaking" if full and row["kv_heads"] == row["heads"] else None
    if row["mechanism"] == "hyper" and row.get("impl") == "triton":
        return "hyper" if "'recursion'" in str(row["config"]) else None
    if row["mechanism"] == "window" and row["impl"] == "triton":
        return "window" if "1024" in str(row["config"]) else None
    return None


def table(rows: list[dict]) -> str:
    """One table per head dim: milliseconds of the forward pass, forward and backward behind it."""
    parts = []
    for dim in (64, 128):
        head = " | ".join(f"n = {length:,}" for length in LENGTHS)
        lines = [f"| head dim {dim}, causal: ms forward / forward + backward | {head} |",
                 "|---" * (len(LENGTHS) + 1) + "|"]  # fmt: skip
        for key, name in NAMES.items():
            cells = []
            for length in LENGTHS:
                both = [
                    best(rows, key, dim, length, kind) for kind in ("forward", "forward_backward")
                ]
                shown = " / ".join("-" if ms is None else f"{ms:.3g}" for ms in both)
                cells.append("-" if both == [None, None] else shown)
            if set(cells) != {"-"}:
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        if len(lines) > 2:
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def best(rows: list[dict], key: str, dim: int, length: int, kind: str) -> float | None:
    """The newest median of a line, head dim, length and pass."""
    aliases = {"forward_backward": ("forward_backward", "forward+backward")}.get(kind, (kind,))
    found = [r["ms_p50"] for r in sorted(rows, key=lambda r: r["time"])
             if r["shown"] == key and r["head_dim"] == dim and r["length"] == length
             and r["pass"] in aliases and r["is_causal"]]  # fmt: skip
    return found[-1] if found else None


def mechanisms() -> str:
    """The registry as a table."""
    yes = {True: "yes", False: "no"}
    head = "| mechanism | what | paper | pretrained models | packed | training | streams | Triton |"
    lines = [head, "|---" * 8 + "|"]
    for m in MECHANISMS.values():
        link = f"[{m.paper}](https://arxiv.org/abs/{m.paper.removeprefix('arXiv:')})"
        lines.append(
            f"| `{m.name}` | {m.summary} | {link} | {yes[m.on_pretrained]} | {yes[m.has_varlen]} | "
            f"{yes[m.has_backward]} | {yes[m.state_name is not None]} | {yes[m.has_triton]} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict]) -> None:
    """Forward time against length at head dim 128."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "longspan"
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for (key, name), style in zip(NAMES.items(), ("o--", "s--", "D-", "v-", "^-"), strict=True):
        points = [(n, best(rows, key, 128, n, "forward")) for n in LENGTHS]
        points = [(n, ms) for n, ms in points if ms is not None]
        if points:
            axis.plot(*zip(*points, strict=True), style, label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(LENGTHS, [f"{n // 1024}k" for n in LENGTHS])
    axis.set_xlabel("tokens")
    axis.set_ylabel("forward, ms")
    axis.set_title("NVIDIA H100, bfloat16, 32 heads, head dim 128, causal", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


def filled(text: str, rows: list[dict]) -> str:
    """README text with both tables put between their marks."""
    for mark, content in (("table", table(rows)), ("mechanisms", mechanisms())):
        pattern = rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)"
        text, count = re.subn(
            pattern, lambda m, c=content: m[1] + c + "\n" + m[2], text, flags=re.S
        )
        assert count == 1, f"README.md must have exactly one pair of {mark} marks"
    return text


def main() -> int:
    """Fill in or check."""
    rows = load_rows()
    old = README.read_text()
    new = filled(old, rows)
    if "--check" in sys.argv:
        return int(new != old)
    README.write_text(new)
    draw(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
