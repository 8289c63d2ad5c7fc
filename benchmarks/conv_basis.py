"""Time Conv-Basis attention beside exact attention, in one run on one machine.

Inputs are planted: rotated constants, key content constant in each of k segments, so that the
mechanism is exact up to rounding and the check lets every head pass. Every case is compared with
a float64 evaluation of the same basis (sampled rows) before its clock starts.

Rows, by `stage_name`: "apply" (engine alone, basis given), "attention" (recover, apply, check),
"unchecked" (recover and apply), "recover", and exact attention.

    python benchmarks/conv_basis.py --device cpu --out rows.jsonl
    python benchmarks/conv_basis.py --device cuda --out rows.jsonl [--tune]
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longspan import ConvBasisConfig, conv_basis_attention, conv_basis_recover
from longspan._triton.launch import KernelConfig
from longspan.bench.environment import environment
from longspan.bench.measure import Timing, append_rows, make_row, peak_bytes, time_call
from longspan.conv_basis.basis import ConvBasis
from longspan.conv_basis.impl.means import rotate
from longspan.conv_basis.ops import toeplitz_fwd

CONFIG = ConvBasisConfig(num_bases=16, min_length=0, threshold=0.5, noise=0.005)
UNCHECKED = dataclasses.replace(CONFIG, on_violation="return")


def draw(length: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device):
    """query, key, value (1, heads, length, dim); 16 segments at random borders."""
    generator = torch.Generator().manual_seed(0)
    borders = torch.randperm(length - 1, generator=generator)[:15].sort().values + 1
    segment = torch.zeros(length, dtype=torch.int64)
    segment[borders] = 1
    segment = segment.cumsum(0).to(device)
    speed = 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
    angle = (torch.arange(length)[:, None] * speed).float().to(device)
    query = torch.randn(1, heads, 1, dim, generator=generator).to(device)
    key = torch.randn(1, heads, 16, dim, generator=generator).to(device)
    value = torch.randn(1, heads, length, dim, generator=torch.Generator(device).manual_seed(1),
                        device=device, dtype=dtype)  # fmt: skip
    query = rotate(query.expand(-1, -1, length, -1), angle).to(dtype)
    return query, rotate(key[:, :, segment], angle).to(dtype), value


def expected(basis: ConvBasis, value: Tensor, head: int, rows: Tensor) -> Tensor:
    """Rows of the modelled attention in float64, weight by weight."""
    n = value.shape[2]
    starts = basis.starts[0, head].clone()
    keys = torch.arange(n, device=value.device)
    segment = torch.searchsorted(starts, keys, right=True) - 1
    kernels = basis.log_kernels[0, head].double()
    out = []
    for row in rows.tolist():
        lag = row - keys[: row + 1]
        scores = kernels[segment[: row + 1], lag]
        out.append(torch.softmax(scores, -1) @ value[0, head, : row + 1].double())
    return torch.stack(out)


def relative(actual: Tensor, oracle: Tensor) -> float:
    """Relative Frobenius error."""
    return float((actual.double() - oracle).norm() / oracle.norm())


class Run:
    """Collects rows, writes each as soon as it exists, and prints a short line."""

    def __init__(self, path: str, device: torch.device, heads: int, dim: int, dtype: torch.dtype):
        self.path, self.device, self.heads, self.dim, self.dtype = path, device, heads, dim, dtype
        self.environment = environment(device)
        self.exact: dict[tuple[int, str], float] = {}

    def time(self, function: Callable[[], Any]) -> Timing:
        """At least three calls; on CUDA as many as fit 100 ms."""
        return time_call(function, device=self.device, warmup_ms=10.0)

    def add(self, mechanism: str, impl: str, name: str, stage: str, length: int,
            timing: Timing | None, **more: Any) -> None:  # fmt: skip
        """Store one measurement; `speedup` is against exact attention of the same run."""
        base = self.exact.get((length, stage))
        if timing is not None and base is not None:
            more["speedup"] = round(base / timing.ms_p50, 2)
        shape = {"batch": 1, "heads": self.heads, "kv_heads": self.heads, "length": length,
                 "head_dim": self.dim, "dtype": str(self.dtype).removeprefix("torch."),
                 "is_causal": True}  # fmt: skip
        row = make_row(mechanism=mechanism, impl=impl, config=more.pop("config", ""), shape=shape,
                       stage=stage, timing=timing, environment=self.environment,
                       verified=more.pop("verified", True), stage_name=name, **more)  # fmt: skip
        append_rows(self.path, [row])
        clock = "not timed" if timing is None else f"{timing.ms_p50:.2f} ms"
        keep = (
            "speedup",
            "error",
            "own_error",
            "paths",
            "floor_ms",
            "block",
            "peak_bytes",
            "verified",
        )
        print(mechanism, impl, name, stage, length, clock,
              {k: row[k] for k in keep if row.get(k) is not None}, flush=True)  # fmt: skip


def exact(run: Run, inputs: tuple[Tensor, ...], passes: list[str]) -> None:
    """Torch's exact attention; the fastest of its kernels is the baseline."""
    length = inputs[0].shape[2]
    leaves = [t.detach().requires_grad_() for t in inputs]
    grad = torch.randn_like(inputs[2])
    names = {"sdpa": None}
    if run.device.type == "cuda":
        names = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
        if length > 40000:
            del names["fa2"]
    for name, backend in names.items():
        chosen = sdpa_kernel(backend) if backend else torch.enable_grad()

        def forward() -> Tensor:
            with torch.no_grad():
                return F.scaled_dot_product_attention(*inputs, is_causal=True)

        def both() -> Any:
            out = F.scaled_dot_product_attention(*leaves, is_causal=True)
            return torch.autograd.grad(out, leaves, grad)

        with chosen:
            for stage, function in (("forward", forward), ("forward_backward", both)):
                if stage not in passes:
                    continue
                timing = run.time(function)
                place = (length, stage)
                run.exact[place] = min(run.exact.get(place, float("inf")), timing.ms_p50)
                run.add("exact", name, "exact", stage, length, timing)


def floor_ms(run: Run, length: int, stage: str) -> float:
    """Memory traffic of the blocked engine at the measured copy rate, in ms.

    Forward, in units of U = H N D float32: read V (half of U in bfloat16), write the padded blocks
    2, transform 2 + 2, reorder 2 + 2, product 2 + 2, back 2 + 2, divide 2, output half. The
    backward passes V and the upstream gradient (2 x 8.5), two products, and two ways back.
    """
    unit = run.heads * length * run.dim * 4 / RATES["copy"]
    return (20.0 if stage == "forward" else 62.0) * unit * 1e3


RATES = {"copy": 0.0}


def paths(basis: ConvBasis, value: Tensor) -> list[int]:
    """Heads by how they were computed: float32, float64, weight by weight, half precision."""
    with torch.no_grad():
        path = toeplitz_fwd(basis.log_kernels, basis.starts, basis.key_offset, value, None,
                            value.shape[2], True, 0, 0, "auto")[2]  # fmt: skip
    return torch.bincount(path.flatten().long(), minlength=4).tolist()


def ours(run: Run, inputs: tuple[Tensor, ...], passes: list[str]) -> ConvBasis:
    """Check against float64, then time the parts and the whole."""
    query, key, value = inputs
    length = query.shape[2]
    basis = conv_basis_recover(query, key, config=CONFIG)
    kernels = basis.log_kernels
    rows = torch.linspace(0, length - 1, 24).long()
    with torch.no_grad():
        # float32 values, so that rounding of the output to bfloat16 does not hide the engine's
        part = basis.apply(value.float()).output
        error = max(relative(part[0, h, rows], expected(basis, value, h, rows)) for h in (0, 1))
        plain = basis.apply(value).output
        whole = conv_basis_attention(query, key, value, config=CONFIG)
    agreement = relative(whole[0, 0, rows], expected(basis, value, 0, rows))
    narrow = max(relative(plain[0, h, rows], expected(basis, value, h, rows)) for h in (0, 1))
    found = float(basis.num_bases.float().mean())
    limit = 1e-4 if run.dtype is torch.float32 else 1e-2
    facts = {"error": float(f"{error:.2e}"), "whole_error": float(f"{agreement:.2e}"),
             "own_error": float(f"{narrow:.2e}"), "paths": paths(basis, value),
             "segments": found, "verified": error <= 1e-4 and agreement <= limit,
             "config": CONFIG}  # fmt: skip

    def apply() -> Any:
        with torch.no_grad():
            return basis.apply(value).output

    def recover() -> Any:
        with torch.no_grad():
            return conv_basis_recover(query, key, config=CONFIG)

    def unchecked() -> Any:
        with torch.no_grad():
            return conv_basis_attention(query, key, value, config=UNCHECKED)

    def attention() -> Any:
        with torch.no_grad():
            return conv_basis_attention(query, key, value, config=CONFIG)

    def timed(name: str, stage: str, function: Callable[[], Any]) -> None:
        timing = run.time(function)
        run.add("conv_basis", "auto", name, stage, length, timing,
                peak=peak_bytes(function, run.device),
                floor_ms=round(floor_ms(run, length, stage), 3), **facts)  # fmt: skip

    if "forward" in passes:
        for name, function in (("apply", apply), ("recover", recover), ("unchecked", unchecked),
                               ("attention", attention)):  # fmt: skip
            timed(name, "forward", function)
    if "forward_backward" in passes:
        leaves = [t.detach().requires_grad_() for t in inputs]
        grad = torch.randn_like(value)
        for name, config in (("unchecked", UNCHECKED), ("attention", CONFIG)):

            def both(config: ConvBasisConfig = config) -> Any:
                out = conv_basis_attention(*leaves, config=config)
                return torch.autograd.grad(out, leaves, grad)

            timed(name, "forward_backward", both)
    del kernels
    return basis


TILES: dict[str, list[Any]] = {
    "BLOCK": [128, 256],  # only shown: the engine picks one by the length
    "MIX_TILE": [
        (64, 32, 8, 3),
        (64, 32, 8, 2),
        (64, 32, 8, 1),
        (64, 64, 8, 2),
        (64, 32, 4, 2),
        (32, 32, 4, 2),
        (32, 64, 4, 1),
        (64, 16, 4, 2),
    ],
    "WEIGHT_TILE": [(16, 0, 4, 1), (16, 0, 8, 1), (32, 0, 4, 1), (8, 0, 4, 1)],
    "ROW_TILE": [
        (64, 32, 8, 1),
        (128, 32, 8, 1),
        (64, 64, 8, 1),
        (32, 32, 4, 1),
        (64, 32, 4, 1),
        (32, 64, 4, 1),
    ],
    "VALUE_TILE": [(64, 0, 8, 1), (128, 0, 8, 1)],
    "KERNEL_TILE": [(128, 64, 8, 1), (128, 32, 8, 1), (64, 64, 4, 1), (64, 32, 4, 1)],
    "TABLE_TILE": [(0, 256, 4, 1), (0, 128, 4, 1), (0, 512, 4, 1)],
    "BACK_ROW_TILE": [(64, 32, 8, 1), (32, 32, 4, 1), (128, 32, 8, 1), (64, 64, 8, 1)],
    "PAIR_TILE": [(64, 64, 8, 1), (32, 32, 4, 1), (16, 64, 4, 1)],
}  # of the kernels for half precision: rows, columns, warps, stages, registers


def tune(run: Run, inputs: tuple[Tensor, ...], basis: ConvBasis) -> None:
    """Every tile of the kernels for half precision, one at a time, each result checked.

    The fastest stays for the rest of the run.
    """
    from longspan.conv_basis.impl.triton import half

    value = inputs[2]
    length = value.shape[2]
    rows = torch.linspace(0, length - 1, 8).long()
    want = expected(basis, value, 1, rows)
    leaf = value.detach().requires_grad_()
    log_kernels = basis.log_kernels.detach().requires_grad_()
    leaves = (log_kernels, leaf)
    own = dataclasses.replace(basis, log_kernels=log_kernels)
    upstream = torch.randn_like(value)

    def forward() -> Tensor:
        with torch.no_grad():
            return basis.apply(value).output

    def both() -> Any:
        return torch.autograd.grad(own.apply(leaf).output, leaves, upstream)

    first = both()
    for name, tiles in TILES.items():
        if not hasattr(half, name):
            continue
        best, least = getattr(half, name), float("inf")
        is_back = name.startswith(("BACK", "PAIR", "SUM"))
        for tile in tiles:
            setattr(half, name, tile if isinstance(tile, int) else KernelConfig(*tile))
            try:
                if is_back:
                    error = max(relative(a, b.double()) for a, b in zip(both(), first, strict=True))
                else:
                    error = relative(forward()[0, 1, rows], want)
                timing = run.time(both if is_back else forward)
            except Exception as problem:  # a tile that does not fit the device
                print(name, tile, type(problem).__name__, str(problem)[:100], flush=True)
                continue
            if error <= 1e-2 and timing.ms_p50 < least and not isinstance(tile, int):
                best, least = KernelConfig(*tile), timing.ms_p50
            stage = "forward_backward" if is_back else "forward"
            run.add("conv_basis", "triton", "tune", stage, length, timing, tile=f"{name} {tile}",
                    error=float(f"{error:.2e}"), verified=error <= 1e-2)  # fmt: skip
            print("   ", name, tile, f"{error:.1e}", flush=True)
        setattr(half, name, best)
        print("==", name, best, flush=True)
    profile(forward, "forward")
    profile(both, "forward and backward")


def profile(function: Callable[[], Any], name: str) -> None:
    """Print the time of each kernel, longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        function()
        torch.cuda.synchronize()
    print(f"-- kernels of {name}, ms")
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    for event in events[:25]:
        print(f"{event.self_device_time_total / 1e3:9.3f} {event.count:4d} {event.key[:90]}")


def copy_rate(device: torch.device) -> float:
    """Bytes read and written in a second by a copy of 1 GiB (128 MiB on the CPU)."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**25, device=device).normal_()
    target = torch.empty_like(source)
    return 8 * source.numel() / time_call(lambda: target.copy_(source), device=device).ms_p50 * 1e3


def main() -> None:
    """Run and append rows to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="JSON lines file to append to")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--lengths", help="default: 2048,4096,8192,32768; cuda: up to 131072")
    parser.add_argument("--heads", type=int, help="default: 16 on the CPU, 32 on a GPU")
    parser.add_argument("--dim", type=int, help="default: 64 on the CPU, 128 on a GPU")
    parser.add_argument("--dtype", help="default: float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--passes", default="forward,forward_backward")
    parser.add_argument(
        "--tune", action="store_true", help="first try kernel tiles and keep the fastest (CUDA)"
    )
    parser.add_argument("--profile", action="store_true", help="print times of kernels (CUDA)")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    device = torch.device(options.device)
    lengths = options.lengths or ("4096,8192,32768,131072" if on_gpu else "2048,4096,8192,32768")
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    run = Run(options.out, device, options.heads or (32 if on_gpu else 16),
              options.dim or (128 if on_gpu else 64), dtype)  # fmt: skip
    RATES["copy"] = copy_rate(device)
    print(f"copy: {RATES['copy'] / 1e9:.0f} GB/s", flush=True)
    passes = options.passes.split(",")
    if options.tune:
        inputs = draw(32768, run.heads, run.dim, dtype, device)
        tune(run, inputs, conv_basis_recover(*inputs[:2], config=CONFIG))
        del inputs
    for length in map(int, lengths.split(",")):
        start = time.perf_counter()
        inputs = draw(length, run.heads, run.dim, dtype, device)
        if options.profile:
            leaves = [t.detach().requires_grad_() for t in inputs]

            def both(leaves: list[Tensor] = leaves) -> Any:
                out = conv_basis_attention(*leaves, config=CONFIG)
                return torch.autograd.grad(out, leaves, leaves[2].detach())

            both()
            profile(both, f"the whole, forward and backward, {length} tokens")
        else:
            exact(run, inputs, passes)
            ours(run, inputs, passes)
        print(f"-- {length}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
