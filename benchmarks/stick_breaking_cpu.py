"""Time and peak memory of stick-breaking attention on a CPU: eager against the reference.

    python benchmarks/stick_breaking_cpu.py --out rows.jsonl [--lengths 8192 32768] [--threads 1]

The dense reference holds several N x N matrices, so beyond a short length only its block-wise use
fits into memory: query rows `--blocks` at a time, by query_offset. The fastest block size is its
best. Each measurement is a process of its own, whose peak resident memory beyond the inputs is
`peak_bytes`; `cpu_seconds` is its processor time, which other jobs on the machine change less than
the clock's (`load` is the machine's load average at the end).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import torch
from torch import Tensor

from longspan import StickBreakingConfig, stick_breaking_attention
from longspan.bench.environment import environment
from longspan.bench.measure import Timing, append_rows, make_row

HEADS, DIM, TAIL = 1, 64, 256
CONFIG = StickBreakingConfig(early_stop=None)


def main() -> None:
    """Measure each implementation in its own process and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="JSON lines file to append to")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--blocks", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        impl, length, block = options.one.split(",")
        print(json.dumps(measure(impl, int(length), int(block), options.threads)))
        return
    where = environment("cpu")
    for length in options.lengths:
        for impl, block in [("eager", 0), *(("reference", b) for b in options.blocks)]:
            found = _in_a_process(f"{impl},{length},{block}", options.threads)
            shape = {"batch": 1, "heads": HEADS, "kv_heads": HEADS, "length": length,
                     "head_dim": DIM, "dtype": "float32", "is_causal": True}  # fmt: skip
            ms = found["seconds"] * 1e3
            row = make_row(
                mechanism="stick_breaking", impl=impl, config=CONFIG, shape=shape, stage="forward",
                timing=Timing(ms, ms, ms, "perf_counter, one call"), environment=where,
                verified=found["relative_error"] < 1e-4, peak=found["peak_bytes"], regime="normal",
                rows_at_a_time=block or None, relative_error=found["relative_error"],
                cpu_seconds=found["cpu_seconds"], threads=options.threads,
                cores=os.cpu_count(), load=os.getloadavg()[0],
            )  # fmt: skip
            append_rows(options.out, [row])
            print(f"{impl:10} n={length} rows at a time {block or '-':>5}: {ms / 1e3:.1f} s, "
                  f"processor {found['cpu_seconds']:.1f} s, peak {found['peak_bytes'] / 1e6:.0f} MB"
                  f", relative error {found['relative_error']:.1e}", flush=True)  # fmt: skip


def measure(impl: str, length: int, block: int, threads: int) -> dict[str, float]:
    """One call after a short one; the last rows are checked against the float64 reference."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, DIM, generator=generator) for _ in range(3))
    run(impl, q[:, :, :600], k[:, :, :600], v[:, :, :600], block)
    before, start, clock = _peak(), time.perf_counter(), time.process_time()
    output = run(impl, q, k, v, block)
    seconds, cpu_seconds, peak = (
        time.perf_counter() - start,
        time.process_time() - clock,
        _peak() - before,
    )
    tail = slice(length - TAIL, length)
    want = stick_breaking_attention(q[:, :, tail].double(), k.double(), v.double(), is_causal=True,
                                    query_offset=length - TAIL, config=CONFIG,
                                    impl="reference")  # fmt: skip
    error = float(torch.dist(output[:, :, tail].double(), want) / want.norm())
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak,
            "relative_error": error}  # fmt: skip


@torch.no_grad()
def run(impl: str, q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """The whole output; `block` rows at a time if it is not 0."""
    length = q.shape[2]
    output = torch.empty_like(v)
    for start in range(0, length, block or length):
        stop = min(length, start + (block or length))
        output[:, :, start:stop] = stick_breaking_attention(
            q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], is_causal=True,
            query_offset=start, config=CONFIG, impl=impl,
        )  # fmt: skip
    return output


def _in_a_process(one: str, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--out", "-", "--one", one, "--threads", str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def _peak() -> int:
    """Peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
