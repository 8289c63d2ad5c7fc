"""Infini-attention against torch's attention on the segments alone: checks first, then times.

    python benchmarks/infini.py --out rows.jsonl [--parts train,pieces,overlap,packed,loop] [--tune]
    python benchmarks/infini.py --out rows.jsonl --parts cpu

The bar is what torch's fastest backend takes for the segments as independent sequences: the same
local attention without a memory. The floor adds to it the bytes that a memory must move if nothing
is fused with the local kernel: keys and values once, queries and local outputs once, the result.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longspan import (
    InfiniConfig,
    infini_attention,
    infini_attention_chunk,
    infini_attention_varlen,
)
from longspan._triton.launch import KernelConfig
from longspan.bench.environment import environment
from longspan.bench.measure import Timing, append_rows, make_row, peak_bytes, time_call
from longspan.infini.features import elu_plus_one
from longspan.infini.impl.triton.delta import affine_scan, segment_maps, segment_turns
from longspan.infini.impl.triton.mix import Layout, mix
from longspan.infini.impl.triton.mix_bwd import mix_backward
from longspan.infini.impl.triton.scan import scan_states
from longspan.infini.impl.triton.sums import Delta, segment_sums, segment_sums_backward

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
HEADS, DIM, SEGMENT = 32, 128, 2048
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
LIMIT = 1e-2  # relative Frobenius error that counts as verified in bfloat16


def draw(length: int, heads: int = HEADS, kv_heads: int | None = None) -> tuple[Tensor, ...]:
    """query, key, value (1, H, length, DIM) and a gate (H,) from -3 to 3."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    counts = (heads, kv_heads or heads, kv_heads or heads)
    made = (
        torch.randn(1, h, length, DIM, device=DEVICE, dtype=DTYPE, generator=generator)
        for h in counts
    )
    return *made, torch.linspace(-3, 3, heads, device=DEVICE)


def error(actual: Tensor, oracle: Tensor) -> float:
    """Relative Frobenius error."""
    return float((actual.detach().double() - oracle.detach()).norm() / oracle.norm())


class Run:
    """Collects rows, writes each as soon as it exists, and prints a short line."""

    def __init__(self, path: str) -> None:
        self.path, self.environment = path, environment(DEVICE)

    def add(self, impl: str, stage: str, length: int, timing: Timing | None, **more: Any) -> None:
        """Store one measurement."""
        shape = {
            "batch": 1, "heads": more.pop("heads", HEADS), "kv_heads": more.pop("kv_heads", HEADS),
            "length": length, "head_dim": DIM, "dtype": "bfloat16", "is_causal": True,
        }  # fmt: skip
        row = make_row(
            mechanism=more.pop("mechanism", "infini"), impl=impl, config=more.pop("config", ""),
            shape=shape, stage=stage, timing=timing, environment=self.environment,
            verified=more.pop("verified", True), **more,
        )  # fmt: skip
        append_rows(self.path, [row])
        keep = ("errors", "speed", "peak_bytes", "us_per_token", "floor_ms", "ratio_loop", "tile")
        notes = {name: row[name] for name in keep if row.get(name) is not None}
        clock = "" if timing is None else f"{timing.ms_p50:.3f} ms"
        print(row["mechanism"], impl, stage, length, clock, notes, flush=True)


def check(config: InfiniConfig, impl: str, length: int) -> dict[str, float]:
    """Errors of output, state and gradients against the loop in float64, on four heads."""
    query, key, value, gate = draw(length, 4, 2)
    grad = torch.randn_like(query)

    def results(dtype: torch.dtype, which: str) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (query, key, value)]
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        share = gate.to(wide).requires_grad_()
        result = infini_attention(*leaves, gate=share, enable_gqa=True, config=config, impl=which)
        grads = torch.autograd.grad(result.output, [*leaves, share], grad.to(dtype))
        return [result.output.detach(), result.final_state.memory.detach(), *grads]

    want = results(torch.float64, "reference")
    names = ("o", "memory", "dq", "dk", "dv", "dgate")
    return {n: float(f"{error(a, w):.2e}")
            for n, a, w in zip(names, results(DTYPE, impl), want, strict=True)}  # fmt: skip


def segments_of(tensor: Tensor) -> Tensor:
    """(1, H, S * SEGMENT, D) as a batch of segments (S, H, SEGMENT, D), a view."""
    return tensor.unflatten(2, (-1, SEGMENT)).transpose(1, 2).squeeze(0)


def exact_segments(run: Run, length: int) -> dict[str, float]:
    """Torch's backends on the segments as independent sequences; the best of each stage in ms."""
    query, key, value, _ = draw(length)
    parts = [segments_of(t) for t in (query, key, value)]
    leaves = [t.contiguous().requires_grad_() for t in parts]
    grad = torch.randn_like(leaves[0])
    best: dict[str, float] = {}
    for name, backend in BACKENDS.items():
        with sdpa_kernel(backend):

            def forward() -> Tensor:
                with torch.no_grad():
                    return F.scaled_dot_product_attention(*leaves, is_causal=True)

            def both() -> Any:
                out = F.scaled_dot_product_attention(*leaves, is_causal=True)
                return torch.autograd.grad(out, leaves, grad)

            for stage, function in (("forward", forward), ("forward_backward", both)):
                timing = time_call(function, device=DEVICE)
                run.add(name, stage, length, timing, mechanism="exact",
                        config=f"segments of {SEGMENT}")  # fmt: skip
                best[stage] = min(best.get(stage, 1e9), timing.ms_p50)
    return best


def ours(
    run: Run, config: InfiniConfig, impl: str, length: int, best: dict[str, float],
    rates: dict[str, float], own: bool = False,
) -> None:  # fmt: skip
    """Verify, then time forward and forward + backward; `own` passes unrotated queries and keys."""
    errors = check(config, impl, 4 * SEGMENT + 100)
    verified = max(errors.values()) <= LIMIT
    query, key, value, gate = draw(length)
    leaves = [t.requires_grad_() for t in (query, key, value, gate)]
    more = {}
    if own:
        more = {"memory_query": query.detach().flip(0).clone().requires_grad_(),
                "memory_key": key.detach().clone().requires_grad_()}  # fmt: skip
    wanted = [*leaves, *more.values()]
    grad = torch.randn_like(query)

    def forward() -> Tensor:
        with torch.no_grad():
            return infini_attention(
                query, key, value, gate=gate, config=config, impl=impl, **more
            ).output

    def both() -> Any:
        out = infini_attention(
            query, key, value, gate=gate, config=config, impl=impl, **more
        ).output
        return torch.autograd.grad(out, wanted, grad)

    moved = query.numel() * query.element_size() / rates["copy"] / 1e6  # ms for one tensor
    label = impl if not own else f"{impl}, own memory keys"
    for stage, function, tensors in (("forward", forward, 5), ("forward_backward", both, 16)):
        timing = time_call(function, device=DEVICE)
        run.add(
            label, stage, length, timing, config=config, errors=errors, verified=verified,
            speed=round(best[stage] / timing.ms_p50, 3), peak=peak_bytes(function, DEVICE),
            floor_ms=round(best[stage] + tensors * moved, 3),
        )  # fmt: skip


def pieces(run: Run, length: int, rates: dict[str, float]) -> None:
    """Where the time goes: each kernel alone, beside the bytes that it must move."""
    query, key, value, gate = draw(length)
    grad = torch.randn_like(query)
    count = length // SEGMENT
    memory, total = segment_sums(key, value, None, SEGMENT, count)
    memory[:, :, 0], total[:, :, 0] = 0, 0
    memory, total = scan_states(memory), scan_states(total)
    written = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    layout = Layout(SEGMENT, 0, 0, length, True)
    reads = (query, value, memory, total, gate, written, None, layout)
    scratch, more = memory.clone(), (query, grad)
    maps = segment_maps(key, total, None, SEGMENT, count)
    weights = maps + maps.transpose(-1, -2)
    row, state = query.numel() * query.element_size(), memory.numel() * 4
    sums = (memory, total, key, value, None, SEGMENT, count)
    for name, moved, function in (
        ("states", 2 * row + state, lambda: segment_sums(key, value, None, SEGMENT, count)),
        ("scan", 2 * state, lambda: scan_states(scratch)),
        ("mix", 3 * row + state, lambda: mix(*reads)),
        ("mix backward", 7 * row + 2 * state, lambda: mix_backward(grad, *reads)),
        ("states backward", 4 * row + state, lambda: segment_sums_backward(*sums)),
        ("states backward, added to others", 6 * row + state,
         lambda: segment_sums_backward(*sums, None, *more)),
        ("maps", row + state, lambda: segment_maps(key, total, None, SEGMENT, count)),
        ("affine scan", 3 * state, lambda: affine_scan(scratch, maps)),
        ("turns", row + state, lambda: segment_turns(key, total, weights, None, SEGMENT)),
        ("states backward, delta", 6 * row + 2 * state,
         lambda: segment_sums_backward(*sums, None, *more, Delta(total, weights))),
        ("add of two gradients", 3 * row, lambda: query + grad),
    ):  # fmt: skip
        timing = time_call(function, device=DEVICE, warmup_ms=10.0, measure_ms=50.0)
        run.add(f"kernel {name}", "piece", length, timing,
                floor_ms=round(moved / rates["copy"] / 1e6, 3))  # fmt: skip


def scaling(run: Run, lengths: list[int]) -> None:
    """Time per token over the length; forward only, 32 query heads over 8 key heads."""
    config = InfiniConfig(segment_length=SEGMENT)
    for length in lengths:
        query, key, value, gate = draw(length, HEADS, 8)

        def forward(inputs: Any = (query, key, value), gate: Tensor = gate) -> Tensor:
            with torch.no_grad():
                return infini_attention(*inputs, gate=gate, enable_gqa=True, config=config).output

        timing = time_call(forward, device=DEVICE)
        run.add("triton", "forward", length, timing, kv_heads=8, config=config,
                us_per_token=round(timing.ms_p50 * 1e3 / length, 5))  # fmt: skip
        del query, key, value
        torch.cuda.empty_cache()


def stream(run: Run) -> None:
    """Prefill in chunks of 16384 and decode: memory and time must not depend on the length."""
    config = InfiniConfig(segment_length=SEGMENT)
    query, key, value, gate = draw(16384, HEADS, 8)
    settings: dict[str, Any] = {"gate": gate, "enable_gqa": True, "config": config}
    for chunks in (2, 64):

        def prefill(chunks: int = chunks) -> Any:
            state = None
            for _ in range(chunks):
                state = infini_attention_chunk(query, key, value, state, **settings).final_state
            return state

        with torch.no_grad():
            prefill()
            peak = peak_bytes(prefill, DEVICE)
            timing = time_call(prefill, device=DEVICE, measure_ms=50.0)
            length = chunks * 16384
            run.add("triton", "prefill in chunks", length, timing, kv_heads=8, config=config,
                    peak=peak, us_per_token=round(timing.ms_p50 * 1e3 / length, 5))  # fmt: skip
            # the unfinished segment at its longest
            tail = [t[:, :, : SEGMENT - 2] for t in (query, key, value)]
            state = infini_attention_chunk(*tail, prefill(), **settings).final_state
            one = [t[:, :, :1] for t in (query, key, value)]

            def step(state: Any = state, one: Any = one) -> Any:
                return infini_attention_chunk(*one, state, **settings)

            timing = time_call(step, device=DEVICE)
            run.add("triton", "decode", length, timing, kv_heads=8, config=config,
                    peak=peak_bytes(step, DEVICE), state_bytes=state.num_bytes)  # fmt: skip


def python_loop(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, segment: int) -> Tensor:
    """The public form, written plainly: a Python loop over segments, state in float32."""
    share = torch.sigmoid(gate)[None, :, None, None]
    memory = query.new_zeros(*query.shape[:2], DIM, DIM, dtype=torch.float32)
    total = query.new_zeros(*query.shape[:2], DIM, 1, dtype=torch.float32)
    outputs = []
    for start in range(0, query.shape[2], segment):
        q, k, v = (t[:, :, start : start + segment] for t in (query, key, value))
        # A copy, because cuDNN's backward misreads the slices of a gradient that cat hands back.
        local = F.scaled_dot_product_attention(q, k, v, is_causal=True) * 1.0
        if start:
            phi = elu_plus_one(q.float())
            read = phi @ memory / (phi @ total)
            local = share * read + (1 - share) * local
        outputs.append(local.to(value.dtype))
        phi = elu_plus_one(k.float())
        memory = memory + phi.transpose(-1, -2) @ v.float()
        total = total + phi.sum(-2, keepdim=True).transpose(-1, -2)
    return torch.cat(outputs, 2)


def loop(run: Run, length: int = 8192) -> None:
    """Forward + backward of short segments beside the Python loop."""
    for segment in (64, 128, 256):
        config = InfiniConfig(segment_length=segment)
        leaves = [t.requires_grad_() for t in draw(length, 8)]
        grad = torch.randn_like(leaves[0])

        def plain(leaves: Any = leaves, segment: int = segment, grad: Tensor = grad) -> Any:
            return torch.autograd.grad(python_loop(*leaves, segment), leaves, grad)

        def fast(leaves: Any = leaves, config: InfiniConfig = config, grad: Tensor = grad) -> Any:
            out = infini_attention(*leaves[:3], gate=leaves[3], config=config).output
            return torch.autograd.grad(out, leaves, grad)

        apart = max(error(a, b.double()) for a, b in zip(fast(), plain(), strict=True))
        slow = time_call(plain, device=DEVICE, measure_ms=50.0)
        quick = time_call(fast, device=DEVICE)
        run.add("python loop", "forward_backward", length, slow, config=config, heads=8,
                kv_heads=8)  # fmt: skip
        run.add("triton", "forward_backward", length, quick, config=config, heads=8, kv_heads=8,
                verified=apart <= 2 * LIMIT, errors={"to_loop": apart},
                ratio_loop=round(slow.ms_p50 / quick.ms_p50, 2))  # fmt: skip


def overlap(run: Run, length: int) -> None:
    """Memory work on a second stream beside cuDNN's kernel: what a fork and join would save."""
    query, key, value, gate = draw(length)
    count = length // SEGMENT
    parts = [segments_of(t).requires_grad_() for t in (query, key, value)]
    grad = torch.randn_like(query)
    written = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    layout = Layout(SEGMENT, 0, 0, length, True)
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()

    def states() -> tuple[Tensor, Tensor]:
        memory, total = segment_sums(key, value, None, SEGMENT, count)
        memory[:, :, 0], total[:, :, 0] = 0, 0
        return scan_states(memory), scan_states(total)

    def local() -> Tensor:
        return F.scaled_dot_product_attention(*parts, is_causal=True)

    def both(first: Callable[[], Any], second: Callable[[], Any], apart: bool) -> tuple[Any, Any]:
        if not apart:
            return first(), second()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            one = first()
        two = second()
        main.wait_stream(side)
        for tensor in one:
            tensor.record_stream(main)
        return one, two

    def forward(apart: bool) -> Tensor:
        with torch.no_grad():
            (memory, total), near = both(states, local, apart)
            near = near.transpose(0, 1).reshape(query.shape)
            return mix(query, near, memory, total, gate, written, None, layout)

    memory, total = states()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = local()

        def local_backward() -> Any:
            return torch.autograd.grad(out, parts, segments_of(grad), retain_graph=True)

        def states_backward() -> Any:
            return segment_sums_backward(memory, total, key, value, None, SEGMENT, count)

        def backward(apart: bool) -> tuple[Any, Any]:
            return both(states_backward, local_backward, apart)

        same_forward = error(forward(True), forward(False).double())
        pairs = zip(*(sum(backward(x), ()) for x in (True, False)), strict=True)
        same_backward = max(error(a, b.double()) for a, b in pairs)
        for name, function, same in (("forward", forward, same_forward),
                                     ("backward", backward, same_backward)):  # fmt: skip
            for apart in (False, True):
                timing = time_call(
                    lambda function=function, apart=apart: function(apart), device=DEVICE
                )
                run.add(f"{name}, {'two streams' if apart else 'one stream'}", "piece", length,
                        timing, verified=same <= LIMIT, errors={"to_one_stream": same})  # fmt: skip


def packed(run: Run, length: int) -> None:
    """Documents of one packed call, beside one sequence of as many tokens: the cost of packing."""
    query, key, value, gate = (t.requires_grad_() for t in draw(length))
    config = InfiniConfig(segment_length=SEGMENT)
    leaves, grad = [query, key, value, gate], torch.randn_like(query)

    def one() -> Any:
        out = infini_attention(query, key, value, gate=gate, config=config).output
        return torch.autograd.grad(out, leaves, grad)

    def documents(cu: Tensor, longest: int) -> Any:
        flat = [t[0].transpose(0, 1) for t in (query, key, value)]
        out = infini_attention_varlen(*flat, cu, cu, longest, longest, gate=gate, config=config)
        return torch.autograd.grad(out, leaves, grad[0].transpose(0, 1))

    timing = time_call(one, device=DEVICE)
    run.add("triton", "forward_backward", length, timing, config=config)
    for count in (1, 4, 16, 64):
        marks = torch.linspace(0, length, count + 1).round().to(torch.int32)
        if count > 1:
            marks[1:-1] += 100  # bounds that are no multiples of a segment
        cu, longest = marks.to(DEVICE), int(marks.diff().max())
        first = int(marks[1])
        alone = infini_attention(*(t[:, :, :first] for t in (query, key, value)), gate=gate,
                                 config=config).output  # fmt: skip
        flat = [t[0].transpose(0, 1) for t in (query, key, value)]
        got = infini_attention_varlen(*flat, cu, cu, longest, longest, gate=gate, config=config)
        same = error(got[:first].transpose(0, 1)[None], alone.double())
        took = time_call(
            lambda cu=cu, longest=longest: documents(cu, longest), device=DEVICE, measure_ms=50.0
        )
        run.add(f"triton, {count} documents", "forward_backward", length, took, config=config,
                speed=round(timing.ms_p50 / took.ms_p50, 3), verified=same <= LIMIT,
                errors={"to_alone": same})  # fmt: skip


def cpu(path: str) -> None:
    """Plain torch on one thread of a CPU: processor time per token over the length."""
    torch.set_num_threads(1)
    where, config = environment("cpu"), InfiniConfig(segment_length=1024)
    generator = torch.Generator().manual_seed(0)
    for length in (4096, 16384, 65536):
        query, key, value = (torch.randn(1, 4, length, 64, generator=generator) for _ in range(3))
        with torch.no_grad():
            short = [t[:, :, :2500] for t in (query, key, value)]
            want = infini_attention(*(t.double() for t in short), config=config, impl="reference")
            apart = error(infini_attention(*short, config=config, impl="eager").output, want.output)
            spent = []
            for _ in range(5):
                before = time.process_time()
                infini_attention(query, key, value, config=config, impl="eager")
                spent.append((time.process_time() - before) * 1e3)
        spent.sort()
        shape = {"batch": 1, "heads": 4, "kv_heads": 4, "length": length, "head_dim": 64,
                 "dtype": "float32", "is_causal": True}  # fmt: skip
        row = make_row(
            mechanism="infini", impl="eager", config=config, shape=shape, stage="forward",
            timing=Timing(spent[1], spent[2], spent[3], "process_time"), environment=where,
            verified=apart <= 1e-5, errors={"o": apart}, threads=1, load=os.getloadavg()[0],
            us_per_token=round(spent[2] * 1e3 / length, 3),
        )  # fmt: skip
        append_rows(path, [row])
        print("cpu eager", length, row["us_per_token"], "us a token", apart, flush=True)


def tune(run: Run, length: int) -> None:
    """Other tiles for each kernel; each result is compared with the pinned one's."""
    query, key, value, gate = draw(length)
    count = length // SEGMENT
    memory, total = segment_sums(key, value, None, SEGMENT, count)
    memory[:, :, 0], total[:, :, 0] = 0, 0
    want_sums = memory.clone()
    memory, total = scan_states(memory), scan_states(total)
    written = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    layout = Layout(SEGMENT, 0, 0, length, True)
    reads = (query, value, memory, total, gate, written, None, layout)
    grad = torch.randn_like(query)
    sums = (memory, total, key, value, None, SEGMENT, count)
    maps = segment_maps(key, total, None, SEGMENT, count)
    delta = Delta(total, maps + maps.transpose(-1, -2))
    trials: list[tuple[str, Callable[[KernelConfig], Any], Any, list[tuple[int, ...]]]] = [
        ("sums", lambda c: segment_sums(key, value, None, SEGMENT, count, c)[0][:, :, 1:],
         want_sums[:, :, 1:],
         [(0, 64, 8, 3), (0, 64, 8, 2), (0, 64, 8, 4), (0, 128, 8, 2), (0, 64, 4, 2),
          (0, 64, 4, 3), (0, 32, 4, 3), (0, 32, 8, 4), (0, 64, 8, 3, 128), (0, 32, 8, 3, 128)]),
        ("sums_bwd", lambda c: segment_sums_backward(*sums, c, query, grad)[0], None,
         [(8, 64, 8, 2), (8, 64, 4, 1), (4, 64, 4, 1), (8, 128, 8, 1), (4, 128, 8, 1),
          (8, 64, 4, 2), (4, 64, 8, 2), (8, 64, 8, 1), (8, 32, 8, 2)]),
        ("mix", lambda c: mix(*reads, c), None,
         [(128, 4, 8, 2), (128, 2, 8, 2), (128, 4, 8, 1), (128, 1, 8, 1), (64, 4, 4, 2),
          (64, 4, 4, 1), (64, 8, 4, 2), (128, 4, 8, 3), (128, 2, 8, 1, 128)]),
        ("mix_bwd", lambda c: mix_backward(grad, *reads, c)[0], None,
         [(128, 4, 8, 1), (64, 4, 4, 1), (64, 2, 4, 1), (64, 8, 4, 1), (64, 4, 4, 2),
          (128, 2, 8, 1), (128, 4, 8, 2), (64, 4, 8, 1), (32, 8, 8, 1), (32, 8, 4, 1)]),
        ("memory_bwd", lambda c: mix_backward(grad, *reads, None, c)[2], None,
         [(64, 0, 8, 3), (64, 0, 8, 2), (128, 0, 8, 2), (64, 0, 4, 2), (32, 0, 4, 3),
          (64, 0, 8, 4), (32, 0, 8, 3)]),
        ("maps", lambda c: segment_maps(key, total, None, SEGMENT, count, c), None,
         [(0, 64, 8, 2), (0, 32, 8, 3), (0, 64, 4, 2), (0, 128, 8, 2), (0, 64, 8, 3),
          (0, 32, 8, 4)]),
        ("affine", lambda c: affine_scan(memory.clone(), maps, False, c), None,
         [(0, 32, 8, 2), (0, 32, 8, 1), (0, 32, 8, 3), (0, 16, 8, 2), (0, 64, 8, 2),
          (0, 16, 8, 1)]),
        ("affine_reverse", lambda c: affine_scan(memory.clone(), maps, True, c), None,
         [(0, 32, 8, 2), (0, 32, 8, 1), (0, 16, 8, 2)]),
        ("turns", lambda c: segment_turns(key, total, delta.weights, None, SEGMENT, c), None,
         [(0, 64, 4, 2), (0, 64, 8, 2), (0, 32, 8, 2), (0, 64, 4, 3), (0, 128, 8, 2)]),
        ("delta_bwd", lambda c: segment_sums_backward(*sums, c, query, grad, delta)[0], None,
         [(8, 32, 8, 1), (8, 64, 8, 1), (8, 64, 4, 1), (8, 128, 8, 1), (16, 64, 4, 1),
          (8, 64, 8, 2), (16, 32, 8, 1)]),
    ]  # fmt: skip
    for name, function, want, candidates in trials:
        for number, candidate in enumerate(candidates):
            sizes = KernelConfig(*candidate)
            try:
                got = function(sizes)
            except Exception as reason:  # a tile that does not fit is a result too
                print(name, candidate, "failed:", type(reason).__name__, flush=True)
                continue
            if number == 0 and want is None:
                want = got.clone()
            apart = error(got, want.double())
            timing = time_call(
                lambda function=function, sizes=sizes: function(sizes), device=DEVICE,
                warmup_ms=10.0, measure_ms=30.0,
            )  # fmt: skip
            run.add(f"tune {name}", "piece", length, timing, tile=list(candidate),
                    verified=apart <= LIMIT, errors={"to_pinned": apart})  # fmt: skip


def ceilings() -> dict[str, float]:
    """Measured: device copy in GB/s, bytes read and written."""
    source = torch.empty(2**28, device=DEVICE, dtype=torch.float32).normal_()
    target = torch.empty_like(source)
    copy = time_call(lambda: target.copy_(source), device=DEVICE).ms_p50
    return {"copy": 2 * source.numel() * 4 / copy / 1e6}


def main() -> None:
    """Run the chosen parts and append rows to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="JSON lines file to append to")
    parser.add_argument("--parts", default="train,pieces,overlap,packed,scaling,stream,loop")
    parser.add_argument("--tune", action="store_true", help="also try other tiles")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--lengths", default="32768,131072,524288,1048576", help="of scaling")
    options = parser.parse_args()
    if options.parts == "cpu":
        cpu(options.out)
        return
    run, parts, rates = Run(options.out), options.parts.split(","), ceilings()
    print(rates, flush=True)
    if "train" in parts:
        best = exact_segments(run, options.length)
        linear = InfiniConfig(segment_length=SEGMENT)
        ours(run, linear, "triton", options.length, best, rates)
        ours(run, linear, "triton", options.length, best, rates, own=True)
        delta = InfiniConfig(segment_length=SEGMENT, update="delta")
        ours(run, delta, "triton", options.length, best, rates)
    if "pieces" in parts:
        pieces(run, options.length, rates)
    if "overlap" in parts:
        overlap(run, options.length)
    if "packed" in parts:
        packed(run, options.length)
    if "loop" in parts:
        loop(run)
    if "stream" in parts:
        stream(run)
    if "scaling" in parts:
        scaling(run, [int(n) for n in options.lengths.split(",")])
    if options.tune:
        tune(run, options.length)


if __name__ == "__main__":
    main()
