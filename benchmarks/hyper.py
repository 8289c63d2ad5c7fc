"""HyperAttention's paper mode against exact attention on a GPU: checks first, then times.

    python benchmarks/hyper.py --out results.jsonl [--tune] [--cases causal-131072-64]

Each case is checked against plain torch in float64 with the same index, one head, output, lse and
gradients, before anything is timed. The floor adds the scores of leaves and nodes at the rate of a
large matrix product, or takes the bytes of inputs, partial results and output at the copy rate,
whichever is larger.
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

from longspan import HyperConfig, hyper_attention
from longspan._triton.launch import KernelConfig
from longspan._validation import Call, validate
from longspan.bench.environment import environment
from longspan.bench.measure import append_rows, make_row, peak_bytes, time_call
from longspan.hyper.impl.recursion import geometry_of, recursion_backward, recursion_forward
from longspan.hyper.impl.triton.backward import triton_backward
from longspan.hyper.impl.triton.forward import triton_forward
from longspan.hyper.impl.triton.index import triton_index
from longspan.hyper.index.lsh import draw_projections
from longspan.hyper.plan import SortedIndex

HEADS = 32
CONFIG = HyperConfig.paper(block_size=256, num_samples=256, min_length=2048)
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
DEVICE = torch.device("cuda")
SEED = 0
_TOLERANCE = 1.2e-2  # relative error in bfloat16, gradients included, as in tests/gpu
_SLOW = 65536  # exact attention from here on: three calls


class Case(NamedTuple):
    """One call: 32 heads, batch 1, bfloat16."""

    is_causal: bool
    length: int
    dim: int

    @property
    def id(self) -> str:
        return f"{'causal' if self.is_causal else 'full'}-{self.length}-{self.dim}"


CASES = [
    Case(True, 131072, 64), Case(True, 131072, 128), Case(False, 131072, 64),
    Case(True, 32768, 64), Case(True, 4096, 64), Case(True, 8192, 64), Case(True, 16384, 64),
    Case(True, 65536, 64), Case(True, 8192, 128), Case(True, 32768, 128), Case(False, 32768, 64),
    Case(False, 8192, 64),
]  # fmt: skip

# kernel -> head dim -> candidates; what runs is pinned in longspan/hyper/impl/triton/configs.py.
TUNE: dict[str, dict[int, list[tuple[Any, ...]]]] = {
    "hash": {
        64: [(64, 512, 4, 2), (128, 512, 4, 2), (64, 512, 8, 2), (128, 512, 8, 2), (32, 512, 4, 3),
             (32, 256, 4, 2), (64, 256, 4, 2)],
        128: [(64, 512, 4, 2), (128, 512, 8, 2), (64, 512, 8, 2), (32, 512, 4, 3),
              (64, 256, 4, 2)],
    },
    "node": {
        64: [(128, 64, 4, 2), (128, 64, 4, 4), (256, 64, 8, 3), (64, 64, 4, 3), (64, 128, 4, 3),
             (128, 32, 4, 4), (64, 32, 4, 4)],
        128: [(128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3), (128, 32, 4, 3)],
    },
    "leaf": {
        64: [(128, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (64, 64, 4, 2)],
        128: [(128, 64, 8, 2), (64, 64, 4, 3), (128, 128, 8, 2)],
    },
    "node_query": {
        64: [(64, 32, 4, 2), (64, 32, 4, 4), (64, 64, 4, 3), (32, 64, 4, 3), (64, 16, 4, 4)],
        128: [(64, 32, 4, 3), (64, 16, 4, 3), (32, 64, 4, 2)],
    },
    "leaf_query": {64: [(64, 128, 4, 2), (64, 32, 4, 3)], 128: [(128, 64, 8, 2)]},
    "node_key": {
        64: [(32, 64, 4, 4), (32, 64, 4, 2), (16, 64, 4, 4), (64, 64, 4, 3)],
        128: [(32, 128, 8, 4), (16, 128, 8, 4), (32, 64, 4, 3)],
    },
    "leaf_key": {64: [(64, 64, 4, 4), (32, 64, 4, 4)], 128: [(64, 128, 8, 2)]},
    "sample_key": {
        64: [(32, 64, 4, 3), (32, 64, 4, 4), (64, 128, 8, 2), (64, 64, 4, 4)],
        128: [(32, 128, 8, 3), (32, 64, 4, 3), (16, 128, 8, 4)],
    },
}  # fmt: skip


def main() -> None:
    """Measure the ceilings; for each case check, time, write rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="JSON lines file to append to")
    parser.add_argument("--cases", default=",".join(case.id for case in CASES))
    parser.add_argument("--tune", action="store_true", help="time tile candidates, then stop")
    parser.add_argument("--tune-length", type=int, default=131072)
    options = parser.parse_args()
    if options.tune:
        tune(options.tune_length)
        return
    by_id = {case.id: case for case in CASES}
    chosen = [by_id[name] for name in options.cases.split(",")]
    ceilings = measure_ceilings()
    where = environment(DEVICE)
    for case in chosen:
        rows = measure(case, ceilings, where)
        append_rows(options.out, rows)
        show(rows)


def measure_ceilings() -> dict[str, float]:
    """What this device reaches: bf16 matrix product in FLOP/s, copy in bytes/s."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = time_call(lambda: a @ b, device=DEVICE).ms_p50
    big = torch.randn(2**28, device=DEVICE)
    copy = time_call(lambda: big.clone(), device=DEVICE).ms_p50
    return {"flops": 2 * 8192**3 / product * 1e3, "bytes": 2 * big.nbytes / copy * 1e3}


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value with gradients, and an upstream gradient."""
    made = [torch.randn(1, HEADS, case.length, case.dim, device=DEVICE, dtype=torch.bfloat16)
            for _ in range(4)]  # fmt: skip
    return tuple(t.requires_grad_(i < 3) for i, t in enumerate(made))  # type: ignore[return-value]


def make_index(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Call, SortedIndex]:
    """The call without gradients, and its index."""
    call = validate("benchmark", q.detach(), k.detach(), v.detach(), is_causal=case.is_causal)
    planes = draw_projections(SEED, HEADS, case.dim, CONFIG.num_projections, DEVICE)
    return call, triton_index(call, CONFIG, planes, SEED)


@torch.no_grad()
def check(call: Call, index: SortedIndex, up: Tensor) -> dict[str, float]:
    """Relative errors of the last head against plain torch in float64 with the same index."""
    output, lse = triton_forward(call, CONFIG, index)
    grads = triton_backward(call, CONFIG, index, up, None, output, lse)
    head = slice(HEADS - 1, HEADS)
    wide = call._replace(**{name: getattr(call, name)[:, head].double()
                            for name in ("query", "key", "value")})  # fmt: skip
    one = SortedIndex(*(field[:, head] for field in index))
    want, want_lse = recursion_forward(wide, CONFIG, one)
    want_grads = recursion_backward(
        wide, CONFIG, one, up[:, head].double(), None, want, want_lse.double()
    )
    found = {}
    for name, got, exact in zip(("output", "lse", "dq", "dk", "dv"), (output, lse, *grads),
                                (want, want_lse, *want_grads), strict=True):  # fmt: skip
        found[name] = float(torch.dist(got[:, head].double(), exact.double()) / exact.norm())
        if not found[name] <= _TOLERANCE:  # NaN included
            raise SystemExit(f"{name} of {call.query.shape}: relative error {found[name]:.1e}")
    return found


def work(case: Case, call: Call) -> tuple[float, float]:
    """Scores of all heads, and bytes a forward moves: q, k, v, o and partial results twice."""
    geometry = geometry_of(call, CONFIG)
    scores = 0.0
    for leaf in geometry.leaves:
        rows, keys = leaf.q_end - leaf.q_start, leaf.k_end - leaf.k_start
        scores += rows * keys / (2 if case.is_causal else 1)
    for node in geometry.nodes:
        scores += (node.q_end - node.q_start) * (node.k_block + CONFIG.num_samples)
    partial = 2 * geometry.query_bases[-1] if geometry.leaves else 0
    return HEADS * scores, HEADS * 2.0 * case.dim * (4 * case.length + partial)


def measure(case: Case, ceilings: dict[str, float], where: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of exact attention and of HyperAttention for one case."""
    q, k, v, up = inputs(case)
    shape = {"batch": 1, "heads": HEADS, "kv_heads": HEADS, "length": case.length,
             "head_dim": case.dim, "dtype": "bfloat16", "is_causal": case.is_causal}  # fmt: skip
    call, index = make_index(case, q, k, v)
    errors = check(call, index, up)
    torch.cuda.empty_cache()
    scores, moved = work(case, call)
    rows: list[dict[str, Any]] = []

    def time_one(
        name: str, impl: str, stage: str, fn: Callable[[], Any], floor: float | None, slow: bool,
    ) -> None:  # fmt: skip
        timing = time_call(fn, device=DEVICE, warmup_ms=0 if slow else 25,
                           measure_ms=0 if slow else 100, least_calls=3)  # fmt: skip
        notes: dict[str, Any] = {} if floor is None else {
            "floor_ms": floor, "floor_ratio": timing.ms_p50 / floor}  # fmt: skip
        if name == "hyper":
            notes |= {"relative_errors": errors, "extra_bytes_over_qkvo":
                      (peak_bytes(fn, DEVICE) or 0) / (4 * q.nbytes)}  # fmt: skip
        rows.append(make_row(
            mechanism=name, impl=impl, config=CONFIG if name == "hyper" else impl, shape=shape,
            stage=stage, timing=timing, environment=where, verified=name == "hyper",
            **notes))  # fmt: skip

    def both(run: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(run(), (q, k, v), up)

    def quiet(run: Callable[[], Any]) -> Callable[[], Any]:
        return torch.no_grad()(run)

    for name, backend in BACKENDS.items():
        if name == "flash" and case.length >= _SLOW:
            continue

        def exact(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=case.is_causal)

        slow = case.length >= _SLOW
        time_one("exact", name, "forward", quiet(exact), None, slow)
        time_one("exact", name, "forward_backward", both(exact), None, slow)

    run = functools.partial(hyper_attention, q, k, v, is_causal=case.is_causal, config=CONFIG,
                            seed=SEED, impl="triton")  # fmt: skip
    for stage, fn, products, times in (
        ("forward", quiet(run), 2, 1), ("forward_backward", both(run), 7, 3),
    ):  # fmt: skip
        floor = 1e3 * max(products * 2 * case.dim * scores / ceilings["flops"],
                          times * moved / ceilings["bytes"])  # fmt: skip
        time_one("hyper", "triton", stage, fn, floor, False)
    time_one("hyper", "triton, CUDA graph", "forward", captured(run), None, False)
    output, lse = triton_forward(call, CONFIG, index)
    time_one("hyper", "triton, index only", "forward", lambda: make_index(case, q, k, v), None,
             False)  # fmt: skip
    time_one("hyper", "triton, index given", "forward",
             lambda: triton_forward(call, CONFIG, index), None, False)  # fmt: skip
    time_one("hyper", "triton, index given", "backward",
             lambda: triton_backward(call, CONFIG, index, up, None, output, lse), None,
             False)  # fmt: skip
    for row in rows:
        rivals = [r["ms_p50"] for r in rows if r["mechanism"] == "exact"
                  and r["impl"] == "cudnn" and r["pass"] == row["pass"]]  # fmt: skip
        if row["mechanism"] == "hyper" and row["impl"] == "triton" and rivals:
            row["speedup_over_cudnn"] = rivals[0] / row["ms_p50"]
    return rows


@torch.no_grad()
def captured(run: Callable[[], Tensor]) -> Callable[[], None]:
    """The call as a CUDA graph: what the device needs without the host's launches."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        want = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    graph.replay()
    torch.cuda.synchronize()
    if not torch.equal(output, want):
        raise SystemExit("the captured graph gives another output")
    return graph.replay


def show(rows: list[dict[str, Any]]) -> None:
    """One line per row."""
    for row in rows:
        kind = "causal" if row["is_causal"] else "full"
        ratio, floor = row.get("speedup_over_cudnn"), row.get("floor_ms")
        print(f"d={row['head_dim']:3} n={row['length']:6} {kind:6} {row['mechanism']:6} "
              f"{row['impl']:19} {row['pass']:16} {row['ms_p50']:9.3f} ms"
              + (f"  floor {floor:7.3f}" if floor else "")
              + (f"  {ratio:.1f} times cuDNN, {row['extra_bytes_over_qkvo']:.2f} of qkvo"
                 if ratio else ""), flush=True)  # fmt: skip


Trial = tuple[int, str, tuple[Any, ...]]  # head dim, kernel, fields of KernelConfig


def tune(length: int) -> None:
    """Check and time the candidates of each kernel; the others run by default."""
    trials: list[Trial] = [
        (dim, kind, sizes) for kind in TUNE for dim in TUNE[kind] for sizes in TUNE[kind][dim]
    ]
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        list(pool.map(warm, trials))  # compiles in parallel, into Triton's cache on disk
    for dim in (64, 128):
        case = Case(True, length, dim)
        q, k, v, up = (t.detach() for t in inputs(case))
        call, index = make_index(case, q, k, v)
        check(call, index, up)
        torch.cuda.empty_cache()
        for trial in trials:
            if trial[0] == dim:
                print("tune d={} {} {}:".format(*trial), run_trial(trial, call, index, up, True),
                      flush=True)  # fmt: skip


def warm(trial: Trial) -> None:
    """Compile a candidate."""
    case = Case(True, 4096, trial[0])
    q, k, v, up = (t.detach() for t in inputs(case))
    call, index = make_index(case, q, k, v)
    run_trial(trial, call, index, up, False)


@torch.no_grad()
def run_trial(trial: Trial, call: Call, index: SortedIndex, up: Tensor, timed: bool) -> str:
    """Time of the pass with a candidate against the default's; or why it does not run."""
    _, kind, sizes = trial
    chosen = KernelConfig(*sizes)
    default: Callable[[], tuple[Tensor, ...]]
    run: Callable[[], tuple[Tensor, ...]]
    if kind == "hash":
        planes = draw_projections(SEED, HEADS, trial[0], CONFIG.num_projections, DEVICE)
        default = functools.partial(triton_index, call, CONFIG, planes, SEED)
        run = functools.partial(default, hash_kernel=chosen)
    elif kind in ("node", "leaf"):
        default = functools.partial(triton_forward, call, CONFIG, index)
        run = functools.partial(default, **{f"{kind}_kernel": chosen})
    else:
        output, lse = triton_forward(call, CONFIG, index)
        default = functools.partial(triton_backward, call, CONFIG, index, up, None, output, lse)
        run = functools.partial(default, kernels={kind: chosen})
    try:
        got = run()
    except Exception as error:  # a candidate may need too much shared memory
        return type(error).__name__
    if not timed:
        return ""
    want = default()
    apart = max(float(torch.dist(a.float(), b.float()) / b.float().norm())
                for a, b in zip(got, want, strict=True))  # fmt: skip
    if not apart <= 5e-3:  # NaN included
        return f"WRONG: {apart:.1e} from the default"
    del got, want
    each = [time_call(fn, device=DEVICE, warmup_ms=0, measure_ms=30).ms_p50
            for fn in (default, run)]  # fmt: skip
    return f"{each[1]:.3f} ms, default {each[0]:.3f}, {each[1] - each[0]:+.3f}"


if __name__ == "__main__":
    main()
