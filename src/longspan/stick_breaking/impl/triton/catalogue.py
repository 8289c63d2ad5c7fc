"""Kernel configurations for the ahead-of-time compile check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...._triton.aot import AotCase
from .backward import (
    _stick_breaking_dkv_bwd_kernel,
    _stick_breaking_dq_bwd_kernel,
    _visitors_bwd_kernel,
    backward_configs,
)
from .common import KEY_TILE, Config
from .decode import _stick_breaking_decode_kernel, _stick_breaking_decode_merge_kernel
from .forward import _stick_breaking_fwd_kernel, block_dim, forward_config

__all__ = ["KNOWN_SPILLS", "cases"]

#: Bytes a thread may spill, by the second part of the name; every other kernel must not spill.
#: The dkv kernel holds dk, dv and two tiles of 64 columns in 255 registers; what it spills are
#: scalars around the diagonal loop. A version without spills (that loop not pipelined) was slower.
#: The forward at 64 columns is capped at 128 registers so that four blocks share a multiprocessor.
#: It gains little with 64 rows: 3.11 ms against 3.16 (see benchmarks/notes/stick-breaking.md).
KNOWN_SPILLS = {"dkv": 448, "forward": 8}

_FLAGS = (
    "ATTEND_CURRENT", "WINDOW", "HAS_BIAS", "HAS_LENGTHS", "VARLEN", "EARLY_STOP", "LISTED",
    "HAS_GRAD_REST",
)  # fmt: skip
#: Pointers that are None unless a flag is set.
_OPTIONAL = {
    "bias_ptr": "HAS_BIAS", "dbias_ptr": "HAS_BIAS", "key_lengths_ptr": "HAS_LENGTHS",
    "cu_q_ptr": "VARLEN", "cu_k_ptr": "VARLEN", "list_ptr": "LISTED", "count_ptr": "LISTED",
    "grad_rest_ptr": "HAS_GRAD_REST",
}  # fmt: skip
_IN_DTYPE = {
    "q_ptr", "k_ptr", "v_ptr", "o_ptr", "residual_ptr", "do_ptr", "dq_ptr", "dk_ptr", "dv_ptr",
}  # fmt: skip
_INTEGERS = {
    "visited_ptr", "list_ptr", "count_ptr", "tiles_ptr", "key_lengths_ptr", "cu_q_ptr", "cu_k_ptr",
}  # fmt: skip
_FLOATS = {"scale", "scale_log2", "stop_below", "log2_stop"}
_VARIANTS: dict[str, dict[str, bool]] = {
    "plain": {},
    "early": {"EARLY_STOP": True, "LISTED": True},
    "window": {"WINDOW": True, "ATTEND_CURRENT": True},
    "packed grouped": {"VARLEN": True, "HAS_BIAS": True, "HAS_GRAD_REST": True},
    "padded": {"HAS_LENGTHS": True},
}


def cases(capability: int) -> list[AotCase]:
    """Configurations at head dims 64 and 128: on sm_90 every variant, else plain inference.

    The backward is laid out for Hopper; on sm_80 it runs but spills (dq, D = 128: 5 kB a thread),
    so it is not listed there: the README's table says so.
    """
    return list(_cases(capability // 10))


def _cases(major: int) -> Iterator[AotCase]:
    everything = major >= 9
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        for dim in (64, 128):
            forward = forward_config(dtype, dim, dim, major)
            backward = backward_configs(dtype, dim, dim)
            kernels = {
                "forward": (_stick_breaking_fwd_kernel, forward),
                "dq": (_stick_breaking_dq_bwd_kernel, backward[0]),
                "dkv": (_stick_breaking_dkv_bwd_kernel, backward[1]),
                "decode": (_stick_breaking_decode_kernel, Config(16, 4, 3)),
            }
            for variant, flags in _VARIANTS.items():
                for name, (kernel, config) in kernels.items():
                    if name in ("dq", "dkv") and not everything:
                        continue
                    plain = variant == "plain" and (everything or dtype is torch.bfloat16)
                    if plain or (everything and dtype is torch.bfloat16 and name != "decode"):
                        label = f"stick_breaking/{name}/{short}/d{dim}/{variant}"
                        yield _case(label, kernel, short, dim, config, flags)
    merge = _stick_breaking_decode_merge_kernel
    yield _case("stick_breaking/decode_merge/bf16/d128", merge, "bf16", 128, Config(16, 4, 1), {})
    visitors = _visitors_bwd_kernel
    yield _case("stick_breaking/visitors", visitors, "bf16", 128, Config(128, 4, 1), {})


def _case(
    name: str, kernel: Any, dtype: str, dim: int, config: Config, flags: dict[str, bool]
) -> AotCase:
    values: dict[str, Any] = {
        "D": dim, "DV": dim, "BLOCK_D": block_dim(dim), "BLOCK_DV": block_dim(dim),
        "BLOCK_M": config.block_m, "BLOCK_R": 1024 if "visitors" in name else config.block_m,
        "BLOCK_N": KEY_TILE, "BLOCK_S": 32, "TILES_PER_CHECK": 4, "RESIDUAL": True,
        "UPCAST": False, "PRECISION": "tf32x3", "APPROX": True,
        **dict.fromkeys(_FLAGS, False), **flags,
    }  # fmt: skip
    constexprs = {n: values[n] for n in kernel.arg_names if n in values}
    # an optional pointer without a flag of its own in this kernel is always given
    for pointer, flag in _OPTIONAL.items():
        if pointer in kernel.arg_names and flag in kernel.arg_names and not values[flag]:
            constexprs[pointer] = None
    signature = {n: _type(n, dtype) for n in kernel.arg_names if n not in constexprs}
    return AotCase(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        max_registers=config.max_registers,
        aligned=tuple(n for n in signature if n.endswith("_ptr") or n.startswith("stride")),
        spill_allowance=KNOWN_SPILLS.get(name.split("/")[1], 0),
    )


def _type(name: str, dtype: str) -> str:
    if name in _IN_DTYPE:
        return f"*{dtype}"
    if name in _INTEGERS:
        return "*i32"
    if name.endswith("_ptr"):
        return "*fp32"
    return "fp32" if name in _FLOATS else "i32"
