"""Window attention against exact attention on a GPU: checks first, then times.

    python benchmarks/window.py --out results.jsonl [--tune] [--lengths 4096 131072]

The floor of the forward is the larger of its arithmetic at the rate that a large matrix product
reaches on this device, and of reading the inputs and writing the output at its copy rate.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longspan import WindowConfig, window_attention
from longspan._triton.launch import KernelConfig
from longspan._validation import validate
from longspan.bench.environment import environment
from longspan.bench.measure import append_rows, make_row, peak_bytes, time_call
from longspan.bench.selfcheck import run_selfcheck
from longspan.window.api import visited_fraction
from longspan.window.impl.triton.backward import triton_backward
from longspan.window.impl.triton.forward import triton_forward

HEADS = 32
CONFIG = WindowConfig(window=1024, num_sinks=4)
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
DEVICE = torch.device("cuda")
_SLOW_BACKWARD = 65536  # exact attention beyond this length: forward only
_TAIL = 256  # rows compared with float64 at each length
_TOLERANCE = 6e-3  # of the relative error in bfloat16, as in tests/gpu

# head dim -> candidates: fields of KernelConfig. What runs is pinned in
# longspan/window/impl/triton/configs.py.
TUNE: dict[str, dict[int, list[tuple[Any, ...]]]] = {
    "kernel": {
        64: [
            (64, 64, 4, 3),
            (128, 64, 8, 2, 128, False, True),
            (128, 64, 8, 3, 128, False, True),
            (128, 64, 8, 3, 128, True, True),
            (128, 64, 8, 4, 128, True, True),
            (64, 64, 4, 2, 128, False, True),
            (64, 64, 4, 3, 128, False, True),
            (64, 64, 4, 3, 128, True, True),
            (128, 128, 8, 2, 128, True, True),
        ],
        128: [
            (64, 64, 4, 3),
            (128, 32, 8, 4, 128, True),
            (128, 64, 8, 2, 128, False, True),
            (128, 64, 8, 2, 128, True, True),
            (64, 64, 4, 2, 168, True, True),
            (64, 64, 4, 3, None, False, True),
            (128, 64, 8, 3, None, False, True),
            (128, 32, 8, 4, 128, True, True),
            (128, 32, 8, 3, 128, False, True),
            (128, 128, 8, 2, None, False, True),
            (128, 128, 8, 2, None, True, True),
        ],
    },
    "query_kernel": {
        64: [
            (64, 64, 4, 3),
            (64, 64, 4, 2, None, False, True),
            (64, 64, 4, 3, None, False, True),
            (128, 64, 8, 2, 128, False, True),
            (128, 64, 8, 3, None, False, True),
            (64, 128, 4, 2, None, False, True),
        ],
        128: [
            (64, 64, 4, 2),
            (64, 64, 4, 2, None, False, True),
            (128, 64, 8, 2, None, False, True),
            (128, 32, 8, 3, 128, False, True),
            (64, 32, 4, 3, 168, False, True),
            (64, 128, 8, 2, None, False, True),
        ],
    },
    "key_kernel": {
        64: [
            (64, 64, 4, 2, None, True),
            (64, 64, 4, 2, None, True, True),
            (64, 64, 4, 3, None, True, True),
            (64, 64, 4, 2, None, False, True),
            (64, 128, 8, 2, 128, True, True),
            (64, 128, 8, 3, None, False, True),
        ],
        128: [
            (32, 128, 8, 2, None, True),
            (32, 128, 8, 2, None, True, True),
            (32, 128, 8, 2, None, False, True),
            (64, 128, 8, 2, None, True, True),
            (64, 64, 4, 2, None, True, True),
            (32, 64, 4, 3, 168, True, True),
        ],
    },
}


def main() -> None:
    """Check, measure the ceilings, time, write rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="JSON lines file to append to")
    parser.add_argument("--lengths", type=int, nargs="+",
                        default=[4096, 16384, 32768, 65536, 131072])  # fmt: skip
    told = f"time tile candidates of {', '.join(TUNE)} (default all), then stop"
    parser.add_argument("--tune", nargs="*", choices=list(TUNE), metavar="KERNEL", help=told)
    options = parser.parse_args()
    if options.tune is not None:
        tune(options.tune or list(TUNE), max(options.lengths))
        return
    errors = check()
    ceilings = measure_ceilings()
    where = environment(DEVICE)
    for dim in (64, 128):
        for length in options.lengths:
            rows = measure(length, dim, ceilings, errors["bfloat16"], where)
            append_rows(options.out, rows)
            show(rows)


def check() -> dict[str, float]:
    """Forward and gradients of every dtype against float64; the largest error for each dtype."""
    rows = [row for row in run_selfcheck(DEVICE, ["window"]) if row.impl == "triton"]
    for row in rows:
        print(f"check {row.case:14} {row.dtype:9} error {row.error:.2e} budget {row.budget:.2e}",
              "ok" if row.passed else f"FAILED {row.skipped_reason or ''}", flush=True)  # fmt: skip
    if not all(row.passed for row in rows):
        raise SystemExit("the kernels are wrong on this device; nothing was timed")
    return {
        dtype: max(r.error for r in rows if r.dtype == dtype) for dtype in {r.dtype for r in rows}
    }


def measure_ceilings() -> dict[str, float]:
    """What this device reaches: bf16 matrix product in FLOP/s, copy in bytes/s."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = time_call(lambda: a @ b, device=DEVICE).ms_p50
    big = torch.randn(2**28, device=DEVICE)
    copy = time_call(lambda: big.clone(), device=DEVICE).ms_p50
    found = {"flops": 2 * 8192**3 / product * 1e3, "bytes": 2 * big.nbytes / copy * 1e3}
    print(f"ceilings: {found['flops'] / 1e12:.0f} TFLOP/s, {found['bytes'] / 1e12:.2f} TB/s")
    return found


@torch.no_grad()
def tail_error(run: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor, window: int) -> float:
    """Relative error of the last rows of the first and the last head, against float64."""
    got, length = run(), q.shape[2]
    p = torch.arange(length - _TAIL, length, device=DEVICE)[:, None]
    j = torch.arange(length, device=DEVICE)
    hidden = (j > p) | ((p - j >= window) & (j >= CONFIG.num_sinks))
    worst = 0.0
    for head in (0, HEADS - 1):
        query, key, value = (t[0, head].double() for t in (q, k, v))
        scores = query[-_TAIL:] @ key.T * q.shape[-1] ** -0.5
        want = scores.masked_fill_(hidden, float("-inf")).softmax(-1) @ value
        worst = max(worst, float(torch.dist(got[0, head, -_TAIL:].double(), want) / want.norm()))
    return worst


def inputs(length: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value with gradients, and an upstream gradient."""
    made = [torch.randn(1, HEADS, length, dim, device=DEVICE, dtype=torch.bfloat16)
            for _ in range(4)]  # fmt: skip
    return tuple(t.requires_grad_(i < 3) for i, t in enumerate(made))  # type: ignore[return-value]


def measure(
    length: int,
    dim: int,
    ceilings: dict[str, float],
    worst: float,
    where: dict[str, Any],
) -> list[dict[str, Any]]:
    """Rows of exact and of window attention at one length and head dim; worst: of `check`."""
    q, k, v, up = inputs(length, dim)
    shape = {"batch": 1, "heads": HEADS, "kv_heads": HEADS, "length": length, "head_dim": dim,
             "dtype": "bfloat16", "is_causal": True}  # fmt: skip
    visited = visited_fraction(CONFIG, length, length, is_causal=True)
    scores = HEADS * length * (length + 1) / 2
    rows = []

    def time_both(
        mechanism: str,
        config: Any,
        run: Callable[[], Tensor],
        share: float,
        backward: bool,
    ) -> None:
        error = tail_error(run, q, k, v, length if mechanism == "exact" else CONFIG.window)
        if not error <= _TOLERANCE:  # NaN included
            raise SystemExit(f"{mechanism} {config} at n={length}, d={dim}: error {error:.1e}")

        def forward() -> None:
            with torch.no_grad():
                run()

        def both() -> None:
            torch.autograd.grad(run(), (q, k, v), up)

        for stage, fn in (("forward", forward), ("forward_backward", both)):
            if stage != "forward" and not backward:
                continue
            products = 2 if stage == "forward" else 7  # 5 in a backward that shares the scores
            tensors = 4 if stage == "forward" else 12
            floor = 1e3 * max(products * 2 * dim * scores * share / ceilings["flops"],
                              tensors * q.nbytes / ceilings["bytes"])  # fmt: skip
            slow = length >= _SLOW_BACKWARD and mechanism == "exact"
            timing = time_call(fn, device=DEVICE, warmup_ms=0 if slow else 25,
                               measure_ms=0 if slow else 100, least_calls=3)  # fmt: skip
            rows.append(make_row(
                mechanism=mechanism, impl=str(config) if mechanism == "exact" else "triton",
                config=config, shape=shape, stage=stage, timing=timing, environment=where,
                verified=True, max_abs_error=worst if mechanism == "window" else None,
                relative_error=error, peak=peak_bytes(fn, DEVICE), floor_ms=floor,
                floor_ratio=timing.ms_p50 / floor, visited_fraction=share))  # fmt: skip

    for name, backend in BACKENDS.items():

        def exact(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        time_both("exact", name, exact, 1.0, length <= _SLOW_BACKWARD)

    def window() -> Tensor:
        return window_attention(q, k, v, is_causal=True, config=CONFIG, impl="triton")

    time_both("window", CONFIG, window, visited, True)
    for row in rows:
        if row["mechanism"] == "window":
            rivals = [r["ms_p50"] for r in rows
                      if r["mechanism"] == "exact" and r["pass"] == row["pass"]]  # fmt: skip
            row["speedup_over_best_exact"] = min(rivals) / row["ms_p50"] if rivals else None
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """One line per row."""
    for row in rows:
        ratio = row.get("speedup_over_best_exact")
        print(f"d={row['head_dim']:3} n={row['length']:6} {row['mechanism']:6} {row['impl']:6} "
              f"{row['pass']:16} {row['ms_p50']:9.3f} ms  floor {row['floor_ms']:8.3f}  "
              f"x{row['floor_ratio']:.2f}  error {row['relative_error']:.1e}"
              + (f"  {ratio:.1f} times exact" if ratio else ""),
              flush=True)  # fmt: skip


Trial = tuple[int, str, tuple[Any, ...]]  # head dim, kernel, fields of KernelConfig


def tune(kernels: list[str], length: int) -> None:
    """Check and time the candidates of each kernel; the other backward kernels run by default."""
    check()
    trials: list[Trial] = [
        (dim, name, sizes) for name in kernels for dim in TUNE[name] for sizes in TUNE[name][dim]
    ]
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        list(pool.map(warm, trials))  # compiles in parallel, into Triton's cache on disk
    for dim in sorted({trial[0] for trial in trials}):
        q, k, v, up = (t.detach() for t in inputs(length, dim))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            exact = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
            rival = time_call(exact, device=DEVICE, warmup_ms=0, measure_ms=0).ms_p50
        print(f"tune d={dim} n={length}: forward of cuDNN {rival:.3f} ms", flush=True)
        for trial in trials:
            if trial[0] == dim:
                print("tune d={} {} {}:".format(*trial), run_trial(trial, (q, k, v, up), rival),
                      flush=True)  # fmt: skip


def warm(trial: Trial) -> None:
    """Compile a candidate."""
    q, k, v, up = inputs(1024, trial[0])
    run_trial(trial, (q.detach(), k.detach(), v.detach(), up), None)


def run_trial(
    trial: Trial, tensors: tuple[Tensor, Tensor, Tensor, Tensor], rival: float | None
) -> str:
    """Time of a candidate, and how far its result is from the default's; or why it does not run."""
    _, argument, sizes = trial
    q, k, v, up = tensors
    call = validate("tune", q, k, v, is_causal=True)
    output, lse = triton_forward(call, CONFIG, None, None, 0, 0)
    if argument == "kernel":
        run = functools.partial(triton_forward, call, CONFIG, None, None, 0, 0)
    else:
        run = functools.partial(
            triton_backward, call, CONFIG, up, None, output, lse, None, None, 0, 0
        )
    want = (output, lse) if argument == "kernel" else run()
    run = functools.partial(run, **{argument: KernelConfig(*sizes)})
    try:
        got = run()
    except Exception as error:  # a candidate may need too much shared memory
        return type(error).__name__
    if rival is None:
        return ""
    apart = max(float(torch.dist(a, b) / b.norm()) for a, b in zip(got, want, strict=True))
    if not apart <= 5e-3:  # NaN included
        return f"WRONG: {apart:.1e} from the default"
    time = time_call(run, device=DEVICE).ms_p50
    told = f", {rival / time:.1f} times cuDNN" if argument == "kernel" else ""
    return f"{time:.3f} ms{told}, {apart:.0e} from the default"


if __name__ == "__main__":
    main()
