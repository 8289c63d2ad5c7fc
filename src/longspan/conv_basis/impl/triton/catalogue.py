"""The kernel in its production configurations, for the ahead-of-time compile check."""

from __future__ import annotations

from ...._triton.aot import AotCase
from .search import SIZES, _conv_basis_search_kernel

__all__ = ["cases"]

_TYPES = {"bfloat16": "*bf16", "float32": "*fp32"}


def cases(capability: int) -> list[AotCase]:
    """16 segments, 16 probes; the same on every device."""
    del capability
    return [_case(dtype, dim) for dtype in _TYPES for dim in (64, 128, 256)]


def _case(dtype: str, dim: int) -> AotCase:
    constexprs = {"GROUP": 1, "NUM_BASES": 16, "PROBES": 16, "DIM": dim, "BLOCK_T": 16,
                  "BLOCK_D": dim}  # fmt: skip
    signature: dict[str, str] = {}
    for argument in _conv_basis_search_kernel.arg_names:
        if argument in constexprs:
            continue
        known = {"lengths_ptr": "*i64", "starts_ptr": "*i64", "scale": "fp32", "each": "fp32"}
        default = _TYPES[dtype] if argument.endswith("_ptr") else "i32"
        signature[argument] = known.get(argument, default)
    return AotCase(
        name=f"conv_basis/search/{dtype}/d{dim}/w{SIZES.num_warps}s{SIZES.num_stages}",
        kernel=_conv_basis_search_kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=SIZES.num_warps,
        num_stages=SIZES.num_stages,
        aligned=tuple(n for n in signature if n.endswith("_ptr") or n.startswith("stride_")),
    )
