"""Time the stick-breaking kernels beside exact attention, in one run on one GPU.

Every case is compared with a float64 walk over the same inputs before its clock starts. Inputs
come in three regimes, because the cost of early stopping depends on them: "normal" (the stick is
spent within a tile), "alive" (logits near -10: every key is needed), "mixed" (heads with mean
-4, -6, -8 and spread 2, 2, 3).

    python benchmarks/stick_breaking.py --out rows.jsonl
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longspan.bench.environment import environment
from longspan.bench.measure import Timing, append_rows, make_row, peak_bytes
from longspan.bench.measure import time_call as _time_call
from longspan.stick_breaking.impl.triton.backward import stick_backward
from longspan.stick_breaking.impl.triton.decode import stick_decode
from longspan.stick_breaking.impl.triton.forward import stick_forward

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
STOP = 2.0**-24
REGIMES = {"alive": ([-10.0], [1.0]), "mixed": ([-4.0, -6.0, -8.0], [2.0, 2.0, 3.0])}
# Three calls of 60 ms, the default, can all lie before the clocks and the allocator settle.
time_call = functools.partial(_time_call, warmup_ms=150.0, measure_ms=400.0, least_calls=7)
PLAIN = {
    "logit_bias": None,
    "query_offset": 0,
    "key_lengths": None,
    "attend_current": False,
    "window": None,
}


def draw(regime: str, length: int, dim: int, heads: int = 32, kv_heads: int = 32, queries: int = 0):
    """query, key, value (1, heads, length, dim); one coordinate carries the mean of the logits."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)

    def normal(count: int, rows: int) -> Tensor:
        return torch.randn(1, count, rows, dim, device=DEVICE, generator=generator)

    query, key, value = (
        normal(heads, queries or length), normal(kv_heads, length), normal(kv_heads, length)
    )  # fmt: skip
    if regime in REGIMES:
        means, spreads = (
            torch.tensor(list_, device=DEVICE).repeat(kv_heads)[:kv_heads]
            for list_ in REGIMES[regime]
        )
        size = (-means * math.sqrt(dim)).sqrt()
        group = heads // kv_heads
        query *= spreads.repeat_interleave(group)[None, :, None, None]
        query[..., 0] = size.repeat_interleave(group)[None, :, None]
        key[..., 0] = -size[None, :, None]
    return query.to(DTYPE), key.to(DTYPE), value.to(DTYPE)


def walk64(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, grad_rest: Tensor, scale: float):
    """One head in float64, block of rows by block of rows: output, log_rest, dq, dk, dv."""
    q, k, v, grad, grad_rest = (t.double() for t in (q, k, v, grad, grad_rest))
    n = q.shape[0]
    rows = max(1, min(1024, 2**27 // n))
    output, log_rest = torch.zeros_like(grad), torch.zeros_like(grad_rest)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for lo in range(0, n, rows):
        hi = min(n, lo + rows)
        block = slice(lo, hi)
        logits = scale * q[block] @ k[:hi].T
        index = torch.arange(lo, hi, device=q.device)
        seen = torch.arange(hi, device=q.device) < index[:, None]
        logs = torch.where(seen, -F.softplus(logits), 0.0)
        log_rest[block] = logs.sum(1)
        nearer = log_rest[block, None] - logs.cumsum(1)
        weights = torch.where(seen, torch.exp(F.logsigmoid(logits) + nearer), 0.0)
        output[block] = weights @ v[:hi]
        share = weights * (grad[block] @ v[:hi].T)
        farther = share.cumsum(1) - share + grad_rest[block, None]
        beta = torch.where(seen, torch.sigmoid(logits), 0.0)
        dz = (1 - beta) * share - beta * farther
        dq[block] = scale * dz @ k[:hi]
        dk[:hi] += scale * dz.T @ q[block]
        dv[:hi] += weights.T @ grad[block]
    return output, log_rest, dq, dk, dv


def error(actual: Tensor, oracle: Tensor) -> float:
    """Relative Frobenius error."""
    return float((actual.double() - oracle).norm() / oracle.norm())


class Run:
    """Collects rows, writes each as soon as it exists, and prints a short line."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.environment = environment(DEVICE)

    def add(self, impl: str, stage: str, length: int, dim: int, timing: Timing | None, **more: Any):
        """Store one measurement."""
        shape = {
            "batch": 1, "heads": 32, "kv_heads": more.pop("kv_heads", 32), "length": length,
            "head_dim": dim, "dtype": "bfloat16", "is_causal": True,
        }  # fmt: skip
        row = make_row(
            mechanism=more.pop("mechanism", "stick_breaking"), impl=impl,
            config=more.pop("config", ""), shape=shape, stage=stage, timing=timing,
            environment=self.environment, verified=more.pop("verified", True), **more,
        )  # fmt: skip
        append_rows(self.path, [row])
        keep = ("regime", "early_stop", "visited", "errors", "workspace_bytes", "ratio_fa2", "rate")
        notes = {name: row[name] for name in keep if row.get(name) is not None}
        clock = "" if timing is None else f"{timing.ms_p50:.3f} ms"
        print(row["mechanism"], impl, stage, length, dim, clock, notes, flush=True)


def exact(run: Run, length: int, dim: int, rates: dict[str, float]) -> dict[str, float]:
    """FlashAttention-2 and cuDNN through torch; returns FA2's forward and forward+backward."""
    query, key, value = draw("normal", length, dim)
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    grad = torch.randn_like(value)
    found: dict[str, float] = {}
    for name, backend in (
        ("fa2", SDPBackend.FLASH_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        with sdpa_kernel(backend):

            def forward() -> Tensor:
                return F.scaled_dot_product_attention(query, key, value, is_causal=True)

            def both() -> Any:
                out = F.scaled_dot_product_attention(*leaves, is_causal=True)
                return torch.autograd.grad(out, leaves, grad)

            for stage, function in (("forward", forward), ("forward_backward", both)):
                timing = time_call(function, device=DEVICE)
                run.add(name, stage, length, dim, timing, mechanism="exact", regime="normal",
                        floor_ms=floor(stage, length, dim, 1.0, rates))  # fmt: skip
                if name == "fa2":
                    found[stage] = timing.ms_p50
    return found


def rival(run: Run, length: int, dim: int, rates: dict[str, float], fa2: dict[str, float]) -> None:
    """fla-core, where it is installed."""
    try:
        from fla.ops.stickbreaking_attn import parallel_stickbreaking_attn
    except ImportError:
        print("fla-core is not installed: skipped")
        return
    leaves = [t.transpose(1, 2).contiguous().requires_grad_() for t in draw("alive", length, dim)]
    grad = torch.randn_like(leaves[2])

    def forward() -> Tensor:
        with torch.no_grad():
            return parallel_stickbreaking_attn(*leaves, scale=dim**-0.5)[0]

    def both() -> Any:
        out = parallel_stickbreaking_attn(*leaves, scale=dim**-0.5)[0]
        return torch.autograd.grad(out, leaves, grad)

    for stage, function in (("forward", forward), ("forward_backward", both)):
        timing = time_call(function, device=DEVICE)
        run.add("fla-core 0.6.0", stage, length, dim, timing, regime="alive", verified=False,
                peak=peak_bytes(function, DEVICE), ratio_fa2=timing.ms_p50 / fa2[stage],
                floor_ms=floor(stage, length, dim, 1.0, rates))  # fmt: skip


def floor(stage: str, length: int, dim: int, visited: float, rates: dict[str, float]) -> float:
    """Milliseconds that the matrix products alone take at the measured rate."""
    products = {"forward": 2, "backward": 5, "forward_backward": 7}[stage]
    return products * 2 * dim * 32 * length * length / 2 * visited / rates["flops"] * 1e3


def ours(
    run: Run, regime: str, length: int, dim: int, stop: float | None, rates: dict[str, float],
    fa2: dict[str, float],
) -> None:  # fmt: skip
    """Verify one head against float64, then time forward, backward and both."""
    query, key, value = draw(regime, length, dim)
    grad = torch.randn_like(value)
    settings = {**PLAIN, "scale": dim**-0.5, "early_stop": stop}

    def forward() -> Any:
        return stick_forward(query, key, value, need_grad=True, **settings)

    part = forward()

    def backward() -> Any:
        return stick_backward(
            grad, None, query, key, value, part.output, part.residual, part.log_rest,
            part.visited, **settings,
        )  # fmt: skip

    def both() -> Any:
        new = forward()
        return stick_backward(
            grad, None, query, key, value, new.output, new.residual, new.log_rest, new.visited,
            **settings,
        )  # fmt: skip

    grads = backward()
    errors: dict[str, float] = {}
    worst = 0.0
    for head in range(len(REGIMES.get(regime, ([0],))[0])):
        at = (0, head)
        want = walk64(
            query[at], key[at], value[at], grad[at], torch.zeros_like(part.log_rest[at]), dim**-0.5
        )
        got = (part.output, part.log_rest, *grads[:3])
        worst = max(worst, float((part.output[at].double() - want[0]).abs().max()))
        for name, actual, expected in zip(
            ("o", "log_rest", "dq", "dk", "dv"), got, want, strict=True
        ):
            if name != "log_rest" or stop is None:  # a stopped walk does not know the far sticks
                errors[name] = max(errors.get(name, 0.0), error(actual[at], expected))
    verified = max(value for name, value in errors.items()) <= 5e-3
    tiles = part.visited.shape[-1]
    block = -(-length // tiles)
    block = 1 << (block - 1).bit_length()
    total = sum(-(-(min((t + 1) * block, length) - 1) // 64) for t in range(tiles))
    visited = float(part.visited.sum()) / (total * 32)
    results = sum(t.numel() * t.element_size() for t in grads[:3])
    for stage, function in (
        ("forward", forward),
        ("backward", backward),
        ("forward_backward", both),
    ):
        timing = time_call(function, device=DEVICE)
        peak = peak_bytes(function, DEVICE)
        workspace = None if stage != "backward" else peak - results
        run.add(
            "triton", stage, length, dim, timing, regime=regime, early_stop=stop, visited=visited,
            errors={name: float(f"{value:.2e}") for name, value in errors.items()},
            max_abs_error=worst, verified=verified, peak=peak, workspace_bytes=workspace,
            ratio_fa2=timing.ms_p50 / fa2[stage] if stage in fa2 else None,
            floor_ms=floor(stage, length, dim, visited, rates),
        )  # fmt: skip


def drift(run: Run, regime: str, length: int, dim: int) -> None:
    """Accuracy at extreme length: one head, full walk, no timing."""
    query, key, value = (t[:, -1:].contiguous() for t in draw(regime, length, dim, 3, 3))
    grad = torch.randn_like(value)
    settings = {**PLAIN, "scale": dim**-0.5, "early_stop": None}
    part = stick_forward(query, key, value, need_grad=True, **settings)
    grad_rest = torch.randn_like(part.log_rest)
    grads = stick_backward(
        grad, grad_rest, query, key, value, part.output, part.residual, part.log_rest,
        part.visited, **settings,
    )  # fmt: skip
    want = walk64(query[0, 0], key[0, 0], value[0, 0], grad[0, 0], grad_rest[0, 0], dim**-0.5)
    got = (part.output, part.log_rest, *grads[:3])
    errors = {
        name: float(f"{error(actual[0, 0], expected):.2e}")
        for name, actual, expected in zip(
            ("o", "log_rest", "dq", "dk", "dv"), got, want, strict=True
        )
    }
    run.add(
        "triton", "forward_backward", length, dim, None, regime=regime, errors=errors,
        verified=max(errors.values()) <= 5e-3, heads_checked=1,
    )  # fmt: skip


def graphed(function: Callable[[], Any]) -> Callable[[], Any]:
    """Replay of a CUDA graph of `function`: without the launch time of the host."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay


def decode(run: Run, length: int, dim: int, rates: dict[str, float]) -> None:
    """One query, 32 query heads over 8 key heads."""
    for regime in ("alive", "normal", "mixed"):
        query, key, value = draw(regime, length, dim, 32, 8, queries=1)
        cache = key.numel() * key.element_size() * 2
        for stop in (None, STOP):
            settings = {**PLAIN, "query_offset": length, "scale": dim**-0.5, "early_stop": stop}

            def call(settings: Any = settings, inputs: Any = (query, key, value)) -> Any:
                return stick_decode(*inputs, **settings)

            output, _, visited = call()
            errors = []
            for head in range(0, 12, 4):
                logits = dim**-0.5 * query[0, head].double() @ key[0, head // 4].double().T
                logs = -F.softplus(logits)
                nearer = logs.sum(1, keepdim=True) - logs.cumsum(1)
                weights = torch.exp(F.logsigmoid(logits) + nearer)
                errors.append(error(output[0, head], weights @ value[0, head // 4].double()))
            read = float(visited.float().mean()) * 64 / length
            for impl, function in (("triton", call), ("triton, CUDA graph", graphed(call))):
                timing = time_call(function, device=DEVICE)
                rate = cache * read / timing.ms_p50 / 1e6
                run.add(
                    impl, "decode", length, dim, timing, kv_heads=8, regime=regime,
                    early_stop=stop, visited=read, errors={"o": max(errors)},
                    verified=max(errors) <= 5e-3, rate=round(rate / rates["copy"], 3),
                    floor_ms=cache * read / rates["copy"] / 1e6,
                )  # fmt: skip


def ceilings() -> dict[str, float]:
    """Measured: bf16 matrix product in FLOP/s, device copy in GB/s (bytes read and written)."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE) for _ in range(2))
    product = time_call(lambda: a @ b, device=DEVICE).ms_p50
    source = torch.empty(2**28, device=DEVICE, dtype=torch.float32).normal_()
    target = torch.empty_like(source)
    copy = time_call(lambda: target.copy_(source), device=DEVICE).ms_p50
    return {
        "flops": 2 * 8192**3 / product * 1e3,
        "copy": 2 * source.numel() * 4 / copy / 1e6,
    }


def main() -> None:
    """Run the chosen parts and append rows to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="JSON lines file to append to")
    parser.add_argument("--parts", default="train,mixed,decode,drift")
    parser.add_argument("--dims", default="64,128")
    parser.add_argument("--lengths", default="4096,32768", help="of the part train")
    parser.add_argument("--regimes", default="alive,normal,mixed", help="of the part train")
    parser.add_argument("--no-rival", action="store_true", help="do not time fla-core")
    options = parser.parse_args()
    run = Run(options.out)
    parts = options.parts.split(",")
    rates = ceilings()
    print({name: f"{value:.4g}" for name, value in rates.items()}, flush=True)
    for dim in (int(d) for d in options.dims.split(",")):
        for length in map(int, options.lengths.split(",")) if "train" in parts else ():
            fa2 = exact(run, length, dim, rates)
            if not options.no_rival:
                rival(run, length, dim, rates, fa2)
            for regime in options.regimes.split(","):
                for stop in (None, STOP):
                    ours(run, regime, length, dim, stop, rates, fa2)
        if "mixed" in parts:
            fa2 = exact(run, 65536, dim, rates)
            ours(run, "mixed", 65536, dim, STOP, rates, fa2)
        if "drift" in parts:
            for regime in ("alive", "mixed"):
                drift(run, regime, 262144, dim)
    if "decode" in parts:
        decode(run, 131072, 128, rates)


if __name__ == "__main__":
    main()
