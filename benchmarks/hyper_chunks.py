"""HyperAttention's default mode against exact attention on a GPU: checks first, then times.

    python benchmarks/hyper_chunks.py --out results.jsonl [--tune] [--cases 131072-64,8192-64]

Before anything is timed, the last rows of one head are compared with plain torch in float64, with
the same index and the same choice. The index is a row of its own and part of the totals. The floor
adds the operations of all products at the rate of a large matrix product, or takes the bytes of
inputs, output and partial results at the copy rate, whichever is larger.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longspan import HyperConfig
from longspan._triton.launch import KernelConfig
from longspan._validation import Call, validate
from longspan.bench.environment import environment
from longspan.bench.measure import append_rows, make_row, peak_bytes, time_call
from longspan.hyper.impl.common import chunk_index
from longspan.hyper.impl.eager import eager_backward, eager_forward
from longspan.hyper.impl.triton.chunks_backward import triton_chunks_backward
from longspan.hyper.impl.triton.chunks_choose import triton_choose
from longspan.hyper.impl.triton.chunks_forward import triton_chunks_forward
from longspan.hyper.impl.triton.chunks_lists import make_lists
from longspan.hyper.impl.triton.chunks_means import cluster_means
from longspan.hyper.impl.triton.chunks_near import near_forward
from longspan.hyper.impl.triton.chunks_near_bwd import (
    column_backward,
    near_key_backward,
    near_query_backward,
)
from longspan.hyper.plan import ChunkIndex

HEADS = 32
CONFIG = HyperConfig()
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
DEVICE = torch.device("cuda")
_TOLERANCE = 1.2e-2  # relative error in bfloat16
_SLOW = 65536  # exact attention from here on: three calls
_ROWS = 256  # rows that are compared


class Case(NamedTuple):
    """One causal call: 32 heads, batch 1, bfloat16."""

    length: int
    dim: int

    @property
    def id(self) -> str:
        return f"{self.length}-{self.dim}"


CASES = [Case(131072, 64), Case(131072, 128), Case(8192, 64), Case(16384, 64), Case(32768, 64),
         Case(8192, 128), Case(32768, 128), Case(65536, 64)]  # fmt: skip

# kernel -> head dim -> candidates; what runs is pinned in chunks_configs.py.
TUNE: dict[str, dict[int, list[tuple[int, ...]]]] = {
    "choose": {
        64: [(64, 64, 4, 3), (32, 64, 2, 3), (32, 64, 1, 3), (16, 64, 1, 3), (32, 32, 1, 3),
             (64, 32, 4, 3), (64, 128, 4, 3), (64, 64, 2, 3), (32, 128, 2, 3), (128, 64, 8, 3),
             (128, 64, 4, 3)],
        128: [(64, 64, 4, 3), (32, 64, 2, 3), (64, 32, 4, 3), (64, 128, 4, 2), (128, 64, 8, 3)],
    },
    "near": {
        64: [(128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 3), (128, 64, 8, 3), (128, 32, 4, 3),
             (64, 128, 4, 3), (128, 64, 4, 2)],
        128: [(128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 32, 8, 3),
              (64, 64, 4, 2)],
    },
    "opened": {
        64: [(64, 16, 4, 1), (128, 16, 4, 1), (32, 16, 2, 1), (64, 16, 2, 1), (128, 16, 8, 1),
             (32, 16, 1, 1)],
        128: [(64, 16, 4, 1), (128, 16, 4, 1), (128, 16, 8, 1), (32, 16, 2, 1), (64, 16, 2, 1)],
    },
    "opened_bwd": {
        64: [(64, 16, 4, 1), (32, 16, 4, 1), (32, 16, 2, 1), (64, 16, 8, 1), (64, 16, 2, 1)],
        128: [(32, 16, 4, 1), (64, 16, 8, 1), (32, 16, 8, 1), (64, 16, 4, 1)],
    },
    "column": {
        64: [(64, 64, 4, 3), (64, 128, 8, 3), (32, 64, 4, 3), (64, 64, 4, 2), (32, 128, 4, 3)],
        128: [(64, 64, 8, 2), (64, 128, 8, 2), (32, 64, 4, 3)],
    },
}  # fmt: skip


def main() -> None:
    """Measure the ceilings; for each case check, time, write rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="JSON lines file to append to")
    parser.add_argument("--cases", default=",".join(case.id for case in CASES))
    parser.add_argument("--tune", action="store_true", help="time tile candidates, then stop")
    parser.add_argument("--kinds", default=",".join(TUNE), help="kernels that --tune tries")
    parser.add_argument("--tune-length", type=int, default=65536)
    options = parser.parse_args()
    if options.tune:
        tune(options.tune_length, options.kinds.split(","))
        return
    by_id = {case.id: case for case in CASES}
    ceilings = measure_ceilings()
    where = environment(DEVICE)
    for case in [by_id[name] for name in options.cases.split(",")]:
        measure(case, ceilings, where, options.out)


def measure_ceilings() -> dict[str, float]:
    """What this device reaches: bf16 matrix product in FLOP/s, copy in bytes/s."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = time_call(lambda: a @ b, device=DEVICE).ms_p50
    big = torch.randn(2**28, device=DEVICE)
    copy = time_call(lambda: big.clone(), device=DEVICE).ms_p50
    return {"flops": 2 * 8192**3 / product * 1e3, "bytes": 2 * big.nbytes / copy * 1e3}


def inputs(case: Case) -> tuple[Call, ChunkIndex]:
    """Random query, key, value without gradients, and the index."""
    q, k, v = (torch.randn(1, HEADS, case.length, case.dim, device=DEVICE, dtype=torch.bfloat16)
               for _ in range(3))  # fmt: skip
    call = validate("benchmark", q, k, v, is_causal=True)
    return call, chunk_index(call, CONFIG, None, 0)


@torch.no_grad()
def check(call: Call, index: ChunkIndex, kernels: dict[str, KernelConfig] | None = None) -> float:
    """Relative error of the last rows of the last head against plain torch in float64."""
    output, lse, chosen = triton_chunks_forward(call, CONFIG, index, None, kernels)
    start = max(0, call.query.shape[2] - _ROWS)
    head = slice(HEADS - 1, HEADS)
    wide = call._replace(
        query=call.query[:, head, start:].double(), key=call.key[:, head].double(),
        value=call.value[:, head].double(), query_offset=call.query_offset + start,
    )  # fmt: skip
    one = ChunkIndex(*(field[:, head] for field in index))
    want, want_lse, _ = eager_forward(wide, CONFIG, one, chosen[:, head, start:])
    found = relative(output[:, head, start:], want)
    _, _, exact = eager_forward(wide, CONFIG, one)
    same = (chosen[:, head, start:].sort(-1).values == exact.sort(-1).values).float().mean()
    print(f"  check {tuple(call.query.shape)}: output {found:.1e}, lse "
          f"{relative(lse[:, head, start:], want_lse):.1e}, choices equal {float(same):.4f}",
          flush=True)  # fmt: skip
    if not (found <= _TOLERANCE and relative(lse[:, head, start:], want_lse) <= _TOLERANCE):
        raise SystemExit(f"output of {call.query.shape}: relative error {found:.1e}")
    return found


@torch.no_grad()
def check_gradients(call: Call, index: ChunkIndex) -> dict[str, float]:
    """Relative errors of the gradients of one head, upstream zero but in the last rows."""
    up = torch.zeros_like(call.query)
    start = max(0, call.query.shape[2] - _ROWS)
    up[:, :, start:].normal_()
    output, lse, chosen = triton_chunks_forward(call, CONFIG, index)
    grads = triton_chunks_backward(call, CONFIG, index, chosen, up, None, output, lse)
    head = slice(HEADS - 1, HEADS)
    wide = call._replace(
        query=call.query[:, head, start:].double(), key=call.key[:, head].double(),
        value=call.value[:, head].double(), query_offset=call.query_offset + start,
    )  # fmt: skip
    one = ChunkIndex(*(field[:, head] for field in index))
    picks = chosen[:, head, start:]
    want, want_lse, _ = eager_forward(wide, CONFIG, one, picks)
    exact = eager_backward(wide, CONFIG, one, picks, up[:, head, start:].double(), None, want,
                           want_lse)  # fmt: skip
    ours = (grads[0][:, head, start:], grads[1][:, head], grads[2][:, head])
    pairs = zip(("dq", "dk", "dv"), ours, exact, strict=True)
    found = {name: relative(got, expected) for name, got, expected in pairs}
    print("  gradients " + ", ".join(f"{k} {v:.1e}" for k, v in found.items()), flush=True)
    if not all(error <= 2 * _TOLERANCE for error in found.values()):
        raise SystemExit(f"gradients of {call.query.shape}: {found}")
    return found


def relative(got: Tensor, want: Tensor) -> float:
    return float(torch.dist(got.double(), want.double()) / want.double().norm())


def work(case: Case) -> tuple[float, float, float]:
    """Operations of choice and columns, of near and opened keys; bytes. Of all heads."""
    chunks = case.length // CONFIG.chunk_size
    far = chunks * (chunks - 1) / 2 * CONFIG.chunk_size * CONFIG.clusters_per_chunk
    near = case.length * (CONFIG.window + CONFIG.chunk_size / 2)
    opened = case.length * CONFIG.num_probes * CONFIG.cluster_size
    product = 2 * case.dim
    slots = case.length * CONFIG.num_probes * (2 * case.dim + 8)
    moved = 4 * case.length * case.dim * 2 + 2 * slots + slots  # slots twice, queries gathered
    return (HEADS * 4 * product * far, HEADS * 2 * product * (near + opened), HEADS * moved)


def measure(case: Case, ceilings: dict[str, float], where: dict[str, Any], out: str) -> None:
    """Rows of exact attention and of HyperAttention for one case."""
    call, index = inputs(case)
    q, k, v = call[:3]
    up = torch.randn_like(q)
    shape = {"batch": 1, "heads": HEADS, "kv_heads": HEADS, "length": case.length,
             "head_dim": case.dim, "dtype": "bfloat16", "is_causal": True}  # fmt: skip
    errors = {"output": check(call, index), **check_gradients(call, index)}
    torch.cuda.empty_cache()
    far, near, moved = work(case)
    floors = {
        "forward": 1e3 * max((far + near) / ceilings["flops"], moved / ceilings["bytes"]),
        # dense parts: 5 products more; opened clusters: queries and dO gathered, slots written
        # and read
        "forward_backward": 1e3 * max((far * 9 / 4 + near * 7 / 2) / ceilings["flops"],
                                      3 * moved / ceilings["bytes"]),
    }  # fmt: skip
    rivals: dict[str, float] = {}

    def time_one(
        name: str, impl: str, stage: str, fn: Callable[[], Any], slow: bool = False,
        **notes: Any,
    ) -> None:  # fmt: skip
        timing = time_call(fn, device=DEVICE, warmup_ms=0 if slow else 25,
                           measure_ms=0 if slow else 60, least_calls=2)  # fmt: skip
        if name == "exact":
            rivals[f"{impl} {stage}"] = timing.ms_p50
        elif impl == "triton":
            notes |= {"relative_errors": errors, "speedup_over_cudnn":
                      rivals[f"cudnn {stage}"] / timing.ms_p50, "floor_ms": floors[stage],
                      "floor_ratio": timing.ms_p50 / floors[stage], "extra_bytes_over_qkvo":
                      (peak_bytes(fn, DEVICE) or 0) / (4 * q.nbytes)}  # fmt: skip
        row = make_row(
            mechanism=name, impl=impl, config=CONFIG if name == "hyper" else impl, shape=shape,
            stage=stage, timing=timing, environment=where, verified=name == "hyper", **notes,
        )  # fmt: skip
        append_rows(out, [row])
        print(f"d={case.dim:3} n={case.length:6} {name:6} {impl:24} {stage:16} "
              f"{timing.ms_p50:9.3f} ms " + " ".join(
                  f"{key} {value:.2f}" for key, value in notes.items()
                  if isinstance(value, float)), flush=True)  # fmt: skip

    with torch.no_grad():
        for name, backend in BACKENDS.items():
            if name == "flash" and case.length >= _SLOW:
                continue

            def exact(backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

            time_one("exact", name, "forward", exact, case.length >= _SLOW)

            def both(exact: Callable[[], Tensor] = exact) -> Any:
                with torch.enable_grad():
                    return torch.autograd.grad(exact(), (q, k, v), up)

            for t in (q, k, v):
                t.requires_grad_(True)
            time_one("exact", name, "forward_backward", both, case.length >= _SLOW)
            for t in (q, k, v):
                t.requires_grad_(False)
        make = functools.partial(chunk_index, call, CONFIG, None, 0)
        time_one("hyper", "triton", "forward",
                 lambda: triton_chunks_forward(call, CONFIG, make()))  # fmt: skip

        def train() -> Any:
            index = make()
            output, lse, chosen = triton_chunks_forward(call, CONFIG, index)
            return triton_chunks_backward(call, CONFIG, index, chosen, up, None, output, lse)

        time_one("hyper", "triton", "forward_backward", train)
        time_one("hyper", "index only", "forward", make)
        given = functools.partial(triton_chunks_forward, call, CONFIG, index)
        time_one("hyper", "triton, index given", "forward", given)
        means = cluster_means(k, v, index)
        output, lse, chosen = given()
        time_one("hyper", "triton, index given", "backward", lambda: triton_chunks_backward(
            call, CONFIG, index, chosen, up, None, output, lse))  # fmt: skip
        time_one("hyper", "triton, means only", "forward", lambda: cluster_means(k, v, index))
        time_one("hyper", "triton, choice only", "forward",
                 lambda: triton_choose(call, CONFIG, means, index.variance))  # fmt: skip
        time_one("hyper", "triton, near only", "forward",
                 lambda: near_forward(call, CONFIG, means, output.clone()))  # fmt: skip
        delta = torch.zeros_like(lse)
        d_mean = (means.key.float(), means.value.float())
        grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        shared = (call, CONFIG, means, up, lse, delta)
        time_one("hyper", "triton, near dq only", "backward",
                 lambda: near_query_backward(*shared, grads[0]))  # fmt: skip
        time_one("hyper", "triton, near dk dv only", "backward",
                 lambda: near_key_backward(*shared, *grads[1:]))  # fmt: skip
        time_one("hyper", "triton, columns only", "backward",
                 lambda: column_backward(*shared, d_mean))  # fmt: skip
        lists_of = chosen[0, :4].reshape(4, -1)
        time_one("hyper", "torch, lists of 4 heads", "forward",
                 lambda: make_lists(lists_of, index.counts.shape[2], 64))  # fmt: skip


Trial = tuple[int, str, tuple[int, ...]]  # head dim, kernel, fields of KernelConfig


def tune(length: int, kinds: list[str]) -> None:
    """Check and time the candidates of each kernel; the others run by default."""
    trials: list[Trial] = [
        (dim, kind, sizes) for kind in kinds for dim in TUNE[kind] for sizes in TUNE[kind][dim]
    ]
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        list(pool.map(warm, trials))  # compiles in parallel, into Triton's cache on disk
    for dim in (64, 128):
        call, index = inputs(Case(length, dim))
        check(call, index)
        torch.cuda.empty_cache()
        want = triton_chunks_forward(call, CONFIG, index)
        for trial in trials:
            if trial[0] == dim:
                print("tune d={} {} {}:".format(*trial), run_trial(trial, call, index, want),
                      flush=True)  # fmt: skip


def warm(trial: Trial) -> None:
    """Compile a candidate."""
    call, index = inputs(Case(2048, trial[0]))
    run_trial(trial, call, index, None)


@torch.no_grad()
def run_trial(
    trial: Trial, call: Call, index: ChunkIndex, want: tuple[Tensor, ...] | None
) -> str:  # fmt: skip
    """Time of the whole forward with a candidate; or why it does not run."""
    _, kind, sizes = trial
    if kind in ("opened_bwd", "column"):
        return backward_trial(kind, KernelConfig(*sizes), call, index, want)
    chosen = None if want is None or kind == "choose" else want[2]
    run = functools.partial(triton_chunks_forward, call, CONFIG, index, chosen,
                            {kind: KernelConfig(*sizes)})  # fmt: skip
    try:
        got = run()
    except Exception as error:  # a candidate may need too much shared memory
        return type(error).__name__
    if want is None:
        return ""
    error = relative(got[0], want[0])
    if not error <= _TOLERANCE:
        return f"WRONG: relative difference {error:.1e}"
    means = cluster_means(call.key, call.value, index)
    fn: Callable[[], Any] = run
    if kind == "choose":
        fn = functools.partial(
            triton_choose, call, CONFIG, means, index.variance, KernelConfig(*sizes)
        )
    elif kind == "near":
        fn = functools.partial(near_forward, call, CONFIG, means, torch.empty_like(got[0]),
                               KernelConfig(*sizes))  # fmt: skip
    return f"{time_call(fn, device=DEVICE, warmup_ms=10, measure_ms=40).ms_p50:.3f} ms"


def backward_trial(
    kind: str,
    sizes: KernelConfig,
    call: Call,
    index: ChunkIndex,
    forward: tuple[Tensor, ...] | None,
) -> str:
    """The same for a kernel of the backward; the time is that of the whole backward."""
    output, lse, chosen = forward or triton_chunks_forward(call, CONFIG, index)
    default = functools.partial(triton_chunks_backward, call, CONFIG, index, chosen, call.value,
                                None, output, lse)  # fmt: skip
    run = functools.partial(default, {kind: sizes})
    try:
        got = run()
    except Exception as error:
        return type(error).__name__
    if forward is None:
        return ""
    error = max(relative(a, b) for a, b in zip(got, default(), strict=True))
    if not error <= _TOLERANCE:
        return f"WRONG: relative difference {error:.1e}"
    return f"{time_call(run, device=DEVICE, warmup_ms=0, measure_ms=0).ms_p50:.3f} ms (backward)"


if __name__ == "__main__":
    main()
