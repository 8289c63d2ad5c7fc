"""Time context parallelism on the GPUs of one host, beside one GPU and torch's own ring attention.

    torchrun --nproc_per_node 2 benchmarks/distributed.py --out rows.jsonl

Every scheme is first compared with one GPU's result (`--check` tokens, output and gradients), then
timed forward and forward+backward: the slowest rank counts. "one GPU" is the mechanism's own
function, in the same run. Rows carry the bytes that a rank receives per call, as counted from the
calls to torch.distributed. On a machine without GPUs it runs on gloo, to try the script out.
"""

from __future__ import annotations

import argparse
import statistics
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from longspan import (
    ExactConfig,
    HyperConfig,
    InfiniConfig,
    StickBreakingConfig,
    WindowConfig,
    exact_attention,
    hyper_attention,
    infini_attention,
    stick_breaking_attention,
    window_attention,
)
from longspan.bench.environment import environment
from longspan.bench.measure import Timing, append_rows, make_row
from longspan.distributed import (
    ContextGroup,
    SequenceLayout,
    attend_across_ranks,
)

SEGMENT = 2048
KEEP = " parts kept"  # of names: recompute=False
CASES: dict[str, tuple[str, Any, str]] = {  # name -> scheme, config, layout
    "exact ring": ("ring", ExactConfig(), "zigzag"),
    "exact ulysses": ("ulysses", ExactConfig(), "contiguous"),
    "window neighbours": ("ring", WindowConfig(window=1024, num_sinks=4), "contiguous"),
    "stick-breaking ring": ("ring", StickBreakingConfig(), "zigzag"),
    "stick-breaking ring" + KEEP: ("ring", StickBreakingConfig(), "zigzag"),
    "stick-breaking early stop": ("ring", StickBreakingConfig(early_stop=2.0**-14), "contiguous"),
    "stick-breaking early stop" + KEEP:
        ("ring", StickBreakingConfig(early_stop=2.0**-14), "contiguous"),
    "stick-breaking ulysses": ("ulysses", StickBreakingConfig(), "contiguous"),
    "infini state passing": ("state_passing", InfiniConfig(segment_length=SEGMENT), "contiguous"),
    "infini delta": ("state_passing", InfiniConfig(segment_length=SEGMENT, update="delta"),
                     "contiguous"),
    "hyper clusters": ("clusters", HyperConfig(), "zigzag"),
    "hyper ulysses": ("ulysses", HyperConfig(), "contiguous"),
}  # fmt: skip


class Bench:
    """One run of the script on one rank."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.on_gpu = torch.cuda.is_available()
        dist.init_process_group("nccl" if self.on_gpu else "gloo", timeout=timedelta(seconds=120))
        self.device = torch.device("cpu")
        if self.on_gpu:
            self.device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.group = ContextGroup(timeout=60.0, exit_when_stopped=self.on_gpu)
        self.origin = environment(self.device)
        self.received = 0
        self._count_bytes()

    def inputs(self, length: int) -> list[torch.Tensor]:
        """Whole query, key, value and an upstream gradient, the same on every rank."""
        generator = torch.Generator(device=self.device).manual_seed(0)
        heads = (self.options.heads, self.options.kv_heads, self.options.kv_heads,
                 self.options.heads)  # fmt: skip
        return [
            torch.randn(1, h, length, self.options.head_dim, device=self.device,
                        generator=generator).to(self.dtype)
            for h in heads
        ]  # fmt: skip

    def layout(self, length: int, kind: str, config: Any) -> SequenceLayout:
        """Cut at segments where the mechanism wants that."""
        multiple = 1
        if isinstance(config, InfiniConfig):
            multiple = config.segment_length
        if isinstance(config, HyperConfig):
            multiple = config.chunk_size
        return SequenceLayout(length=length, ranks=self.group.size, kind=kind, multiple=multiple)

    def check(self, name: str) -> float:
        """Largest error against one GPU, relative to the largest value: output and gradients."""
        scheme, config, kind = CASES[name]
        length = self.options.check
        layout = self.layout(length, kind, config)
        tensors = self.inputs(length)
        whole = [t.clone().requires_grad_() for t in tensors[:3]]
        want = [one_gpu(config, *whole)]
        want += torch.autograd.grad(want[0], whole, tensors[3])
        mine = [layout.split(t, self.group.rank, 2).requires_grad_() for t in tensors[:3]]
        extra = {"recompute": False} if name.endswith(KEEP) else {}
        got = [attend_across_ranks(scheme, *mine, config, group=self.group, layout=layout, **extra)]
        got += torch.autograd.grad(got[0], mine, layout.split(tensors[3], self.group.rank, 2))
        worst = torch.zeros((), device=self.device)
        for g, w in zip(got, want, strict=True):
            apart = (g - layout.split(w, self.group.rank, 2)).abs().amax() / w.abs().amax()
            worst = torch.maximum(worst, apart.float().detach())
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return float(worst)

    def time(self, function: Any) -> tuple[Timing, int]:
        """Of the slowest rank; and the bytes that this rank receives per call."""
        for _ in range(2):
            function()
        self.received = 0
        function()
        received = self.received
        samples = []
        for _ in range(self.options.repeats):
            dist.barrier()
            samples.append(self._once(function))
        slowest = torch.tensor(samples, device=self.device, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        cuts = statistics.quantiles(slowest.tolist(), n=10, method="inclusive")
        return Timing(
            cuts[1], statistics.median(slowest.tolist()), cuts[7], "slowest rank"
        ), received

    def _once(self, function: Any) -> float:
        if not self.on_gpu:
            import time

            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def row(self, name: str, length: int, stage: str, timing: Timing, error: float, **notes: Any):
        """Append a row; only rank 0 writes."""
        _, config, kind = CASES.get(name, (name, ExactConfig(), "zigzag"))
        shape = {"batch": 1, "heads": self.options.heads, "kv_heads": self.options.kv_heads,
                 "length": length, "head_dim": self.options.head_dim,
                 "dtype": str(self.dtype).removeprefix("torch."), "is_causal": True}  # fmt: skip
        row = make_row(
            mechanism=type(config).__name__.removesuffix("Config").lower(), impl=name,
            config=config, shape=shape, stage=stage, timing=timing, environment=self.origin,
            verified=error <= self.options.limit, max_abs_error=error, ranks=self.group.size,
            layout=kind, **notes,
        )  # fmt: skip
        if self.group.rank == 0:
            append_rows(self.options.out, [row])
            print(name, length, stage, round(timing.ms_p50, 3), notes, flush=True)

    def _count_bytes(self) -> None:
        transfer, exchange = dist.batch_isend_irecv, dist.all_to_all_single

        def counting_transfer(operations):
            self.received += sum(
                op.tensor.numel() * op.tensor.element_size()
                for op in operations
                if op.op is dist.irecv
            )
            return transfer(operations)

        def counting_exchange(output, input, output_split_sizes=None, *args, **kwargs):
            share = (self.group.size - 1) / self.group.size  # a rank's part to itself stays
            if output_split_sizes is not None:
                kept = output_split_sizes[self.group.rank] / max(sum(output_split_sizes), 1)
                share = 1 - kept
            self.received += int(output.numel() * output.element_size() * share)
            return exchange(output, input, output_split_sizes, *args, **kwargs)

        dist.batch_isend_irecv, dist.all_to_all_single = counting_transfer, counting_exchange


def one_gpu(config: Any, query, key, value) -> torch.Tensor:
    """The mechanism's own function."""
    call = {"is_causal": True, "enable_gqa": True}
    if isinstance(config, InfiniConfig):
        return infini_attention(query, key, value, config=config, **call).output
    if isinstance(config, HyperConfig):
        return hyper_attention(query, key, value, config=config, **call)
    if isinstance(config, StickBreakingConfig):
        return stick_breaking_attention(query, key, value, config=config, **call)
    if isinstance(config, WindowConfig):
        return window_attention(query, key, value, config=config, **call)
    return exact_attention(query, key, value, config=config, **call)


def stages(function: Any, tensors: list[torch.Tensor], upstream: torch.Tensor):
    """(stage, call) for both passes."""

    def forward():
        with torch.no_grad():
            return function(*tensors)

    def both():
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(function(*leaves), leaves, upstream)

    return (("forward", forward), ("forward_backward", both))


def run_case(bench: Bench, name: str, length: int, error: float, single: dict[Any, float]) -> None:
    """One scheme at one length, beside one GPU."""
    scheme, config, kind = CASES[name]
    tensors = bench.inputs(length)
    layout = bench.layout(length, kind, config)
    for stage, call in stages(lambda *t: one_gpu(config, *t), tensors[:3], tensors[3]):
        key = (str(config), length, stage)
        if key not in single and length <= bench.options.one_gpu_most:
            timing, _ = bench.time(call)
            single[key] = timing.ms_p50
            bench.row(f"one GPU, {name.split()[0]}", length, stage, timing, 0.0)
    mine = [layout.split(t, bench.group.rank, 2) for t in tensors]
    del tensors

    extra = {"recompute": False} if name.endswith(KEEP) else {}

    def across(*qkv):
        return attend_across_ranks(scheme, *qkv, config, group=bench.group, layout=layout, **extra)

    for stage, call in stages(across, mine[:3], mine[3]):
        timing, received = bench.time(call)
        one = single.get((str(config), length, stage))
        bench.row(name, length, stage, timing, error, received_bytes=received,
                  speedup=None if one is None else one / timing.ms_p50)  # fmt: skip


def torch_ring(bench: Bench, length: int) -> None:
    """torch's context_parallel around SDPA, forward and backward, as it is meant to be used."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh(bench.device.type, (bench.group.size,))
    whole = bench.inputs(length)
    group = whole[0].shape[1] // whole[1].shape[1]
    whole[1:3] = [t.repeat_interleave(group, 1) for t in whole[1:3]]
    with context_parallel(mesh, buffers=whole, buffer_seq_dims=[2] * 4):
        q, k, v, up = (t.detach().clone() for t in whole)
        for stage, call in stages(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v], up
        ):
            timing, received = bench.time(call)
            bench.row("torch context_parallel, SDPA", length, stage, timing, 0.0,
                      received_bytes=received or None)  # fmt: skip


def link_rate(bench: Bench) -> None:
    """Measured: a ring step of 256 MB, and an all-to-all, in GB/s received per rank."""
    size = 2**26 if bench.on_gpu else 2**18
    sent = torch.empty(size, device=bench.device)
    got = torch.empty_like(sent)
    world = dist.group.WORLD

    def step():
        operations = [
            dist.P2POp(dist.isend, sent, (bench.group.rank + 1) % bench.group.size, world),
            dist.P2POp(dist.irecv, got, (bench.group.rank - 1) % bench.group.size, world),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    for name, call in (
        ("link: ring step", step),
        ("link: all_to_all", lambda: dist.all_to_all_single(got, sent)),
    ):
        timing, received = bench.time(call)
        rate = received / timing.ms_p50 / 1e6
        bench.row(name, size, "exchange", timing, 0.0, gigabytes_per_second=rate)


def main() -> None:
    """Check, then time, then write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="JSON lines file to append to")
    parser.add_argument("--lengths", default="65536,131072,262144,524288,1048576")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--check", type=int, default=16384, help="tokens of the comparison")
    parser.add_argument("--limit", type=float, default=0.02, help="relative error that is allowed")
    parser.add_argument("--one-gpu-most", type=int, default=262144, help="longest run on one GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--torch-ring", action="store_true", help="torch's context_parallel, too")
    for option, value in (("heads", 32), ("kv-heads", 8), ("head-dim", 128)):
        parser.add_argument(f"--{option}", type=int, default=value)
    bench = Bench(parser.parse_args())
    link_rate(bench)
    single: dict[Any, float] = {}
    errors = {name: bench.check(name) for name in bench.options.cases.split(",")}
    for length in (int(n) for n in bench.options.lengths.split(",")):
        for name, error in errors.items():
            if error > bench.options.limit:
                if bench.group.rank == 0:
                    print(f"{name}: error {error:.3g}, not timed", flush=True)
                continue
            run_case(bench, name, length, error, single)
        if bench.options.torch_ring:
            torch_ring(bench, length)
    bench.group.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
