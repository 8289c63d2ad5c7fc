"""Every kernel in its production configurations, for the ahead-of-time compile check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...._triton.aot import AotCase
from ...._triton.launch import KernelConfig
from .configs import (
    affine_config,
    delta_bwd_config,
    maps_config,
    memory_bwd_config,
    mix_bwd_config,
    mix_config,
    sums_bwd_config,
    sums_config,
    turns_config,
)
from .decode import _BLOCK_N, _SPLIT, _infini_decode_kernel, _infini_join_kernel
from .delta import _infini_affine_kernel, _infini_maps_kernel, _infini_turns_kernel
from .mix import _infini_mix_kernel
from .mix_bwd import _infini_memory_bwd_kernel, _infini_mix_bwd_kernel
from .scan import _BLOCK, _infini_scan_kernel
from .sums import _infini_sums_bwd_kernel, _infini_sums_kernel
from .tiles import block_dim, rows_apart

__all__ = ["KNOWN_SPILLS", "cases"]

KNOWN_SPILLS = {"mix_bwd": 400, "sums_bwd": 40}  # bytes a thread; the reason is in configs.py

_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_SINGLE = ("m_ptr", "z_ptr", "p_ptr", "weights_ptr", "dm_ptr", "dz_ptr", "gate_ptr", "dgate_ptr", "x_ptr", "share_ptr", "part_ptr", "top_ptr", "sum_ptr",
           "w_ptr")  # fmt: skip


def cases(capability: int) -> list[AotCase]:
    """Configurations that run on devices of sm_<capability>, in bfloat16."""
    made: list[AotCase] = []
    for dim in (64, 128):
        made.extend(_cases(dim, torch.bfloat16, capability // 10))
        made.extend(_decoding(dim))
    made.append(
        AotCase(
            name="infini/scan/reverse", kernel=_infini_scan_kernel,
            signature={"x_ptr": "*fp32", "y_ptr": "*fp32", "slots": "i32"},
            constexprs={"SIZE": 128 * 128, "BLOCK": _BLOCK, "REVERSE": True}, num_warps=4,
            num_stages=1, aligned=("x_ptr", "y_ptr"),
        )
    )  # fmt: skip
    return made


def _decoding(dim: int) -> Iterator[AotCase]:
    sizes = KernelConfig(16, _BLOCK_N, 4, 2)
    yield _case(f"infini/decode/d{dim}", _infini_decode_kernel, sizes, torch.bfloat16, dim)
    sizes = KernelConfig(16, 0, 4, 1)
    yield _case(f"infini/join/d{dim}", _infini_join_kernel, sizes, torch.bfloat16, dim)


def _cases(dim: int, dtype: torch.dtype, major: int) -> Iterator[AotCase]:
    label = f"{str(dtype).removeprefix('torch.')}/d{dim}"
    for name, kernel, config in (
        ("sums", _infini_sums_kernel, sums_config),
        ("sums_bwd", _infini_sums_bwd_kernel, sums_bwd_config),
        ("mix", _infini_mix_kernel, mix_config),
        ("mix_bwd", _infini_mix_bwd_kernel, mix_bwd_config),
        ("memory_bwd", _infini_memory_bwd_kernel, memory_bwd_config),
    ):
        sizes = config(dim, dim, dtype, major)
        yield _case(f"infini/{name}/{label}", kernel, sizes, dtype, dim, major)
    sizes = delta_bwd_config(dim, dim, dtype, major)
    yield _case(f"infini/sums_bwd_delta/{label}", _infini_sums_bwd_kernel, sizes, dtype, dim, major)
    for name, kernel, sizes in (
        ("maps", _infini_maps_kernel, maps_config(dim, major)),
        ("turns", _infini_turns_kernel, turns_config(dim, major)),
        ("affine", _infini_affine_kernel, affine_config(dim, major)),
        ("affine_reverse", _infini_affine_kernel, affine_config(dim, major)),
    ):
        yield _case(f"infini/{name}/{label}", kernel, sizes, dtype, dim, major)


def _case(
    name: str, kernel: Any, sizes: KernelConfig, dtype: torch.dtype, dim: int, major: int = 9
) -> AotCase:
    tile = sizes.block_n if "mix" not in name and sizes.block_n else sizes.block_m
    known: dict[str, Any] = {
        "lengths_ptr": None, "GROUP": 4, "ROWS": 16, "SPLIT": _SPLIT, "DIM": dim, "VALUE_DIM": dim, "BLOCK_D": block_dim(dim),
        "BLOCK_DV": block_dim(dim), "BLOCK_M": sizes.block_m, "BLOCK_N": sizes.block_n,
        "TILES": sizes.block_n if "mix" in name else sizes.block_m,
        "APART": rows_apart(tile, block_dim(dim), sizes.num_warps),
        "MORE_K": True, "MORE_V": True, "DELTA": "delta" in name, "LOW_W": major >= 9, "REVERSE": "reverse" in name,
        "BLOCK_V": sizes.block_n, "HAS_LENGTHS": False, "LOCAL_FIRST": True,
        "HALF": True, "LOW_V": False, "UPCAST": False,
    }  # fmt: skip
    constexprs = {n: known[n] for n in kernel.arg_names if n in known}
    signature: dict[str, str] = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            continue
        if argument.endswith("_ptr"):
            signature[argument] = "*fp32" if argument in _SINGLE else _TYPES[dtype]
        else:
            signature[argument] = "fp32" if argument == "scale" else "i32"
    if "written_ptr" in signature:
        signature["written_ptr"] = "*i64"
    options = sizes.options()
    return AotCase(
        name=f"{name}/{tile}/w{sizes.num_warps}s{sizes.num_stages}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        aligned=tuple(n for n in signature if n.endswith("_ptr") or n.startswith("stride_")),
        spill_allowance=KNOWN_SPILLS.get(name.split("/")[1], 0),
    )
