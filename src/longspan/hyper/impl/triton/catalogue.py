"""Every kernel in its production configurations, for the ahead-of-time compile check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...._triton.aot import AotCase
from ...._triton.launch import KernelConfig
from .backward import (
    _hyper_delta_bwd_kernel,
    _hyper_leaf_key_bwd_kernel,
    _hyper_leaf_query_bwd_kernel,
    _hyper_node_key_bwd_kernel,
    _hyper_node_query_bwd_kernel,
    _hyper_sample_key_bwd_kernel,
    _hyper_sample_sum_bwd_kernel,
)
from .chunks_catalogue import chunk_cases
from .configs import DELTA_ROWS, SEGMENT, SUM_ROWS, config_of, hash_config
from .forward import _hyper_leaf_fwd_kernel, _hyper_node_fwd_kernel
from .index import (
    SCAN_SEGMENTS,
    _hyper_hash_kernel,
    _hyper_sample_kernel,
    _hyper_scan_kernel,
    _hyper_scatter_kernel,
)
from .tiles import block_dim

__all__ = ["cases"]

_TILED = {
    "node": _hyper_node_fwd_kernel,
    "leaf": _hyper_leaf_fwd_kernel,
    "node_query": _hyper_node_query_bwd_kernel,
    "leaf_query": _hyper_leaf_query_bwd_kernel,
    "node_key": _hyper_node_key_bwd_kernel,
    "leaf_key": _hyper_leaf_key_bwd_kernel,
    "sample_key": _hyper_sample_key_bwd_kernel,
}
# Bytes a thread: the whole backward at n = 131072 takes 86.2 ms on an H100, and 93.6 with the best
# tiles that do not spill.
KNOWN_SPILLS = {"leaf_key/bfloat16/d128": 192}
_TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
# Pointers that are not of the input dtype.
_SINGLE = ("lse_ptr", "part_lse_ptr", "delta_ptr", "dlse_ptr", "bias_ptr", "planes_ptr")
_INTEGERS = (
    *("q_order_ptr", "k_order_ptr", "order_ptr", "samples_ptr", "owner_ptr", "tiles_ptr"),
    *("runs_ptr", "node_runs_ptr", "packed_ptr", "counts_ptr", "bounds_ptr", "members_ptr"),
    *("starts_ptr", "nodes_ptr", "sizes_ptr"),
)
_SUMS = {"sample_key": ("part_k_ptr", "part_v_ptr"), "sample_sum": ("part_ptr",)}  # float32


def cases(capability: int) -> list[AotCase]:
    """Configurations that run on devices of sm_<capability>: bf16, and on sm_80 float32, whose
    configurations are the same everywhere."""
    made: list[AotCase] = []
    shared = "large" if capability == 90 else "small"
    for dim in (64, 128, 256):
        for kind in _TILED:
            made.append(_tiled(kind, dim, torch.bfloat16, shared))
            if capability == 80 and dim <= 128:
                made.append(_tiled(kind, dim, torch.float32, shared))
        for kind in ("node", "node_query"):
            made.append(_tiled(kind, dim, torch.bfloat16, shared, is_full=False))
    made.extend(_others())
    made.extend(chunk_cases(capability))
    return made


def _tiled(kind: str, dim: int, dtype: torch.dtype, shared: str, is_full: bool = True) -> AotCase:
    sizes = config_of(kind, dim, dim, dtype, shared)
    label = f"{str(dtype).removeprefix('torch.')}/d{dim}{'' if is_full else ' ragged'}"
    blocks = {"FULL": is_full, "BLOCK_M": sizes.block_m, "BLOCK_N": sizes.block_n}
    return _case(kind, label, _TILED[kind], sizes, dtype, dim, **blocks)


def _others() -> Iterator[AotCase]:
    """The same on every device; head dim 128 and the paper's 7 projections."""
    four = KernelConfig(0, 0, 4, 1)
    dim, half = 128, torch.bfloat16
    yield _case("delta", f"d{dim}", _hyper_delta_bwd_kernel, four, half, dim, BLOCK_M=DELTA_ROWS,
                BLOCK_DV=dim, HAS_DLSE=False)  # fmt: skip
    yield _case("sample_sum", f"d{dim}", _hyper_sample_sum_bwd_kernel, four, half, dim,
                BLOCK_S=256, BLOCK_N=SUM_ROWS)  # fmt: skip
    for width, planes, dtype in ((64, 7, half), (128, 7, half), (256, 8, half),
                                 (128, 8, torch.float32)):  # fmt: skip
        yield _case("hash", f"{str(dtype).removeprefix('torch.')}/d{width}/{planes}",
                    _hyper_hash_kernel, hash_config(width, dtype), dtype, width, PLANES=planes,
                    BUCKETS=1 << planes, ROWS=hash_config(width, dtype).block_m, SEGMENT=SEGMENT,
                    HAS_SHIFT=False)  # fmt: skip
    yield _case("scan", "8", _hyper_scan_kernel, four, half, dim, BUCKETS=256,
                BLOCK_S=SCAN_SEGMENTS)  # fmt: skip
    yield _case("scatter", "8", _hyper_scatter_kernel, four, half, dim, BUCKETS=256,
                SEGMENT=SEGMENT)  # fmt: skip
    yield _case("sample", "256", _hyper_sample_kernel, four, half, dim, STREAM=0x9E3779B9,
                BLOCK_N=256, STRATIFIED=False)  # fmt: skip


def _case(
    kind: str, label: str, kernel: Any, sizes: KernelConfig, dtype: torch.dtype, dim: int,
    **blocks: Any,
) -> AotCase:  # fmt: skip
    known: dict[str, Any] = {
        "GROUP": 1, "DIM": dim, "VALUE_DIM": dim, "BLOCK_D": block_dim(dim),
        "BLOCK_DV": block_dim(dim), "SAMPLES": 256, "UPCAST": False, "dlse_ptr": None,
        "shift_ptr": None, **blocks,
    }  # fmt: skip
    constexprs = {n: known[n] for n in kernel.arg_names if n in known}
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constexprs:
            continue
        if name in _INTEGERS:
            signature[name] = "*i32"
        elif name.endswith("_ptr"):
            single = name in _SINGLE or name in _SUMS.get(kind, ())
            signature[name] = "*fp32" if single else _TYPES[dtype]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    tiles = "x".join(str(blocks[n]) for n in ("BLOCK_M", "BLOCK_N") if n in blocks)
    return AotCase(
        name="/".join(("hyper", kind, label, *([tiles] if tiles else []),
                       f"w{sizes.num_warps}s{sizes.num_stages}")),
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        spill_allowance=KNOWN_SPILLS.get(f"{kind}/{label}", 0),
        aligned=tuple(n for n in signature if n.endswith("_ptr") or n.startswith("stride_")),
    )  # fmt: skip
