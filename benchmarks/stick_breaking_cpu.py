"""Time and weigh stick-breaking attention on a CPU: the chunked form against the dense definition.

    python benchmarks/stick_breaking_cpu.py --out rows.jsonl

Each case runs in a process of its own, so that its peak memory is its own: what the process holds
at the end of the call beyond what it held before. float32, 2 heads of 64. The chunked form is
compared with the dense definition in float64 on the last rows before its clock starts. The dense
form holds several N x N tensors; lengths that would not fit are left out.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from longspan import StickBreakingConfig, stick_breaking_attention
from longspan.bench.environment import environment
from longspan.bench.measure import Timing, append_rows, make_row
from longspan.testing import stick_breaking_oracle

HEADS, DIM = 2, 64
CASES = {"eager": (4096, 8192, 16384, 32768), "reference": (4096, 8192)}
_TAIL = 64  # rows compared with float64


def main() -> None:
    """Run every case in a process; or, with --case, one of them in this one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="JSON lines file to append to")
    parser.add_argument("--case", nargs=3, metavar=("IMPL", "LENGTH", "PASS"))
    options = parser.parse_args()
    if options.case:
        impl, length, stage = options.case
        append_rows(options.out, [measure(impl, int(length), stage)])
        return
    for impl, lengths in CASES.items():
        for length in lengths:
            for stage in ("forward", "forward_backward"):
                case = [impl, str(length), stage]
                command = [sys.executable, __file__, "--out", options.out, "--case", *case]
                subprocess.run(command, check=True)


def measure(impl: str, length: int, stage: str) -> dict:
    """One row."""
    torch.manual_seed(0)
    q, k, v, up = (torch.randn(1, HEADS, length, DIM) for _ in range(4))
    config = StickBreakingConfig(early_stop=None)
    error = check(q, k, v, config, impl)
    for tensor in (q, k, v):
        tensor.requires_grad_(stage != "forward")

    def call() -> None:
        out = stick_breaking_attention(q, k, v, config=config, impl=impl)
        if stage != "forward":
            torch.autograd.grad(out, (q, k, v), up)

    samples, before = [], peak()
    for _ in range(3 if length <= 8192 else 1):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e3)
    samples.sort()
    timing = Timing(samples[0], samples[len(samples) // 2], samples[-1], "perf_counter")
    shape = {"batch": 1, "heads": HEADS, "kv_heads": HEADS, "length": length, "head_dim": DIM,
             "dtype": "float32", "is_causal": True}  # fmt: skip
    row = make_row(mechanism="stick_breaking", impl=impl, config=config, shape=shape, stage=stage,
                   timing=timing, environment=environment("cpu"), verified=error < 1e-4,
                   max_abs_error=error, peak=peak() - before, early_stop=None,
                   threads=torch.get_num_threads())  # fmt: skip
    shown = ("impl", "length", "pass", "ms_p50", "peak_bytes", "max_abs_error")
    print(json.dumps({name: row[name] for name in shown}), flush=True)
    return row


def check(q, k, v, config: StickBreakingConfig, impl: str) -> float:
    """Largest difference of the last rows from float64, at most 4,096 keys."""
    rows, keys = q[:, :, -_TAIL:], (k[:, :, -4096:], v[:, :, -4096:])
    offset = keys[0].shape[2] - _TAIL
    got = stick_breaking_attention(rows, *keys, query_offset=offset, config=config, impl=impl)
    want = stick_breaking_oracle(rows, *keys, query_offset=offset)
    return float((got - want[0]).abs().max())


def peak() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
