"""The kernels of the default mode (chunks) in their production configurations, default settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...._triton.aot import AotCase
from ...._triton.launch import KernelConfig
from .chunks_choose import _hyper_choose_kernel
from .chunks_configs import JOIN_ROWS, chunks_config
from .chunks_index import _hyper_statistics_kernel, _hyper_tree_kernel, tree_warps
from .chunks_means import _hyper_mean_kernel
from .chunks_near import _hyper_near_fwd_kernel
from .chunks_near_bwd import _hyper_near_key_bwd_kernel, _hyper_near_query_bwd_kernel
from .chunks_opened import _hyper_join_fwd_kernel, _hyper_opened_fwd_kernel
from .chunks_opened_bwd import _hyper_join_bwd_kernel, _hyper_opened_bwd_kernel

__all__ = ["chunk_cases"]

_TILED = {
    "choose": _hyper_choose_kernel,
    "near": _hyper_near_fwd_kernel,
    "opened": _hyper_opened_fwd_kernel,
    "near_query": _hyper_near_query_bwd_kernel,
    "near_key": _hyper_near_key_bwd_kernel,
    "column": _hyper_near_key_bwd_kernel,
    "opened_bwd": _hyper_opened_bwd_kernel,
}
_TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_SINGLE = ("bias_ptr", "lse_ptr", "delta_ptr", "top_ptr", "mass_ptr", "d_mean_k_ptr",
           "d_mean_v_ptr", "mean_ptr")  # fmt: skip
_INTEGERS = ("order_ptr", "next_ptr", "starts_ptr", "counts_ptr", "entries_ptr", "begins_ptr",
             "ends_ptr", "tile_list_ptr", "tile_ends_ptr", "chosen_ptr")  # fmt: skip
# Bytes a thread: a chunk of 512 keys of 128 dimensions is too large for the registers of a block.
KNOWN_SPILLS = {"tree 512/bfloat16/d128": 392}


def chunk_cases(capability: int) -> Iterator[AotCase]:
    """Configurations that run on devices of sm_<capability>: bf16, and on sm_80 float32."""
    half = torch.bfloat16
    shared = "large" if capability == 90 else "small"
    for dim in (64, 128):
        for kind in _TILED:
            yield _tiled(kind, dim, half, shared)
    if capability == 80:
        for kind in _TILED:
            yield _tiled(kind, 64, torch.float32, shared)
    for dim, node in ((64, 512), (64, 64), (128, 512)):
        nodes = max(1, 256 // node)
        sizes = KernelConfig(0, 0, tree_warps(node * nodes * dim), 3)
        yield _case(f"tree {node}", _hyper_tree_kernel, sizes, half, dim, SIZE=node, NODES=nodes,
                    IS_ROOT=node == 512, STEPS=4)  # fmt: skip
    one, eight = KernelConfig(0, 0, 1, 3), KernelConfig(0, 0, 8, 3)
    yield _case("statistics", _hyper_statistics_kernel, one, half, 128, SIZE=16)
    yield _case("mean", _hyper_mean_kernel, one, half, 128, BLOCK_N=16)
    yield _case("join", _hyper_join_fwd_kernel, eight, half, 128, BLOCK_M=JOIN_ROWS)
    yield _case("join_bwd", _hyper_join_bwd_kernel, eight, half, 128, BLOCK_M=JOIN_ROWS)


def _tiled(kind: str, dim: int, dtype: torch.dtype, shared: str) -> AotCase:
    sizes = chunks_config(kind, dim, dim, dtype, shared)
    return _case(kind, _TILED[kind], sizes, dtype, dim, IS_COLUMN=kind == "column",
                 BLOCK_M=sizes.block_m, BLOCK_N=sizes.block_n)  # fmt: skip


def _case(
    kind: str, kernel: Any, sizes: KernelConfig, dtype: torch.dtype, dim: int, **blocks: Any
) -> AotCase:  # fmt: skip
    known: dict[str, Any] = {
        "GROUP": 1, "DIM": dim, "VALUE_DIM": dim, "SPREAD": True, "BLOCK_D": dim,
        "BLOCK_DV": dim, "CHUNK": 512, "PER_CHUNK": 32,
        "PROBES": 16, "SLOTS": 16, "SINKS": 4, "HAS_COLUMNS": True, "HAS_VARIANCE": True,
        "UPCAST": False, **blocks,
    }  # fmt: skip
    constexprs = {n: known[n] for n in kernel.arg_names if n in known}
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constexprs:
            continue
        if name in _INTEGERS:
            signature[name] = "*i32"
        elif name.endswith("_ptr"):
            wide = name in _SINGLE or (name == "var_ptr" and kind == "statistics")
            wide = wide or (kind == "column" and name in ("dk_ptr", "dv_ptr"))
            signature[name] = "*fp32" if wide else _TYPES[dtype]
        else:
            signature[name] = "fp32" if name in ("scale", "spread") else "i32"
    label = f"{str(dtype).removeprefix('torch.')}/d{dim}"
    tiles = "x".join(str(blocks[n]) for n in ("BLOCK_M", "BLOCK_N") if n in blocks)
    return AotCase(
        name="/".join(("hyper", f"chunks {kind}", label, *([tiles] if tiles else []),
                       f"w{sizes.num_warps}s{sizes.num_stages}")),
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        spill_allowance=KNOWN_SPILLS.get(f"{kind}/{label}", 0),
        aligned=tuple(n for n in signature if n.endswith("_ptr") or n.startswith("stride_")),
    )  # fmt: skip
