"""Every kernel in its production configurations, for the ahead-of-time compile check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...._triton.aot import AotCase
from ...._triton.launch import KernelConfig
from .backward import (
    _DELTA_ROWS,
    _window_delta_bwd_kernel,
    _window_key_bwd_kernel,
    _window_query_bwd_kernel,
    _window_sink_bwd_kernel,
)
from .configs import (
    ROW_PARTS,
    SINK_ROWS,
    SINK_TILE,
    forward_config,
    key_config,
    query_config,
    sink_config,
)
from .forward import _window_fwd_kernel
from .tiles import block_dim

__all__ = ["KNOWN_SPILLS", "cases"]

# Bytes a thread, measured on an H100 at n = 131072. Forward: stored and loaded between the loops, not
# in them; 5.9 ms, and 7.4 without the cap on registers (one block on a multiprocessor). Keys: the
# whole backward takes 20.3 ms, and 22.2 with the best tiles that do not spill.
KNOWN_SPILLS = {("window/fwd_tma", 128): 32, ("window/key_bwd_tma", 128): 24}

_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_SINGLE_POINTERS = ("lse_ptr", "delta_ptr", "dlse_ptr", "part_k_ptr", "part_v_ptr")
_SHARED = {80: ("medium", "small"), 90: ("large",)}


def cases(capability: int) -> list[AotCase]:
    """Configurations that run on devices of sm_<capability>, causal: bf16, and float32 on sm_80.

    The configurations of float32 are the same everywhere.
    """
    made: list[AotCase] = []
    for shared in _SHARED[capability]:
        for dim in (64, 128, 256):
            made.extend(_cases(dim, torch.bfloat16, shared))
            if shared == "medium" and dim <= 128:
                made.extend(_cases(dim, torch.float32, shared))
    return made


def _cases(dim: int, dtype: torch.dtype, shared: str) -> Iterator[AotCase]:
    label = f"{str(dtype).removeprefix('torch.')}/d{dim}/{shared}"
    for is_tma in (False, True):
        if is_tma and shared != "large":
            break
        kind = "_tma" if is_tma else ""
        sizes = forward_config(dim, dim, dtype, shared, is_tma)
        if sizes.is_tma == is_tma:
            yield _case(f"window/fwd{kind}", label, _window_fwd_kernel, sizes, dtype, dim,
                        BLOCK_N=sizes.block_n, BLOCK_S=SINK_TILE)  # fmt: skip
        sizes = query_config(dim, dim, dtype, shared, is_tma)
        if sizes.is_tma == is_tma:
            yield _case(f"window/query_bwd{kind}", label, _window_query_bwd_kernel, sizes, dtype,
                        dim, BLOCK_N=sizes.block_n, BLOCK_S=SINK_TILE)  # fmt: skip
        sizes = key_config(dim, dim, dtype, shared, is_tma)
        if sizes.is_tma == is_tma:
            yield _case(f"window/key_bwd{kind}", label, _window_key_bwd_kernel, sizes, dtype, dim,
                        BLOCK_N=sizes.block_n, ROWS=SINK_ROWS)  # fmt: skip
    if shared == "small":
        return  # the two others do not depend on the shared memory
    sizes = sink_config(dim, dim, dtype)
    yield _case("window/sink_bwd", label, _window_sink_bwd_kernel, sizes, dtype, dim,
                BLOCK_S=SINK_TILE, ROWS=SINK_ROWS)  # fmt: skip
    sizes = KernelConfig(_DELTA_ROWS, 0, 4, 1)
    yield _case("window/delta_bwd", label, _window_delta_bwd_kernel, sizes, dtype, dim)


def _case(
    name: str, label: str, kernel: Any, sizes: KernelConfig, dtype: torch.dtype, dim: int,
    **blocks: int,
) -> AotCase:  # fmt: skip
    known: dict[str, Any] = {
        "cu_q_ptr": None, "cu_k_ptr": None, "lengths_ptr": None, "GROUP": 1, "DIM": dim,
        "VALUE_DIM": dim, "BLOCK_M": sizes.block_m, "BLOCK_D": block_dim(dim),
        "BLOCK_DV": block_dim(dim), "IS_CAUSAL": True, "IS_PACKED": False, "HAS_LENGTHS": False,
        "HAS_DLSE": False, "FLIP": False, "UPCAST": False,
        "ONE_LOOP": sizes.is_one_loop, "PARTS": ROW_PARTS,
        "IS_TMA": sizes.is_tma, **blocks,
    }  # fmt: skip
    if not sizes.is_tma:
        known |= dict.fromkeys(("k_desc", "v_desc", "q_desc", "do_desc"))
    if name == "window/delta_bwd":
        known["dlse_ptr"] = None
    constexprs = {n: known[n] for n in kernel.arg_names if n in known}
    signature: dict[str, str] = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            continue
        if argument.endswith("_ptr"):
            signature[argument] = "*fp32" if argument in _SINGLE_POINTERS else _TYPES[dtype]
        elif argument.endswith("_desc"):
            rows = sizes.block_m if name == "window/key_bwd_tma" else sizes.block_n
            tile = f"1,1,{rows},{block_dim(dim)}"
            signature[argument] = f"tensordesc<{_TYPES[dtype][1:]}[{tile}]>"
        else:
            signature[argument] = "fp32" if argument == "scale" else "i32"
    tiles = "x".join(str(n) for n in (sizes.block_m, blocks.get("BLOCK_N")) if n)
    return AotCase(
        name=f"{name}/{label}/{tiles}/w{sizes.num_warps}s{sizes.num_stages}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        max_registers=sizes.max_registers,
        spill_allowance=KNOWN_SPILLS.get((name, dim), 0),
        aligned=tuple(n for n in signature if n.endswith("_ptr") or n.startswith("stride_")),
    )
