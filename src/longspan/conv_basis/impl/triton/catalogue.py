"""The kernels in their production configurations, for the ahead-of-time compile check."""

from __future__ import annotations

from typing import Any

from ...._triton.aot import AotCase
from ...._triton.launch import KernelConfig
from .back import PAIR_TILE, SUM_TILE, group_sum_kernel, pair_kernel
from .columns import BACK_TILE, COLUMN_TILE, column_gradients_kernel, columns_kernel
from .distances import DISTANCE_TILE, distance_kernel
from .half import AMPERE
from .keys import BACK_ROW_TILE, key_kernel
from .mix import MIX_TILE, mix_kernel
from .rows import ROW_TILE, row_kernel
from .search import SIZES, _conv_basis_search_kernel
from .spectra import KERNEL_TILE, VALUE_TILE, kernel_spectra_kernel, value_spectra_kernel
from .tables import TABLE_TILE, table_kernel
from .upstream import UPSTREAM_TILE, upstream_kernel
from .weights import WEIGHT_TILE, weight_kernel

__all__ = ["cases"]

BLOCK = 256
_TYPES = {"bfloat16": "*bf16", "float32": "*fp32"}
_HALF = {
    "high_ptr",
    "low_ptr",
    "back_ptr",
    "turn_ptr",
    "mixed_ptr",
    "upstream_ptr",
}  # float16 in every case
_MIX = {"weight_ptr", "input_ptr", "mixed_ptr"}
_INT32 = {"run_block_ptr", "run_group_ptr", "group_ptr", "first_ptr"}
_INT64 = {"rows_ptr", "starts_ptr", "run_start_ptr", "run_end_ptr", "lengths_ptr"}


def cases(capability: int) -> list[AotCase]:
    """16 segments, 16 probes."""
    search = [
        _case(f"search/{dtype}/d{dim}", _conv_basis_search_kernel, SIZES, _TYPES[dtype],
              {"query", "key"}, GROUP=1, NUM_BASES=16, PROBES=16, DIM=dim, BLOCK_T=16,
              BLOCK_D=dim)
        for dtype in _TYPES for dim in (64, 128, 256)
    ]  # fmt: skip
    return [*search, *_engine(capability)]


def _engine(capability: int = 90) -> list[AotCase]:
    older = AMPERE if capability < 90 else {}
    kernel_tile = older.get("KERNEL_TILE", KERNEL_TILE)
    mix_tile = older.get("MIX_TILE", MIX_TILE)
    found = [
        _case("kernel_spectra", kernel_spectra_kernel, kernel_tile, "*fp32", set(), BLOCK=BLOCK,
              BLOCK_F=kernel_tile.block_m, BLOCK_P=kernel_tile.block_n, BLOCK_K=64),
        *(_case(f"weights/{int(back)}", weight_kernel, WEIGHT_TILE, "*fp16", {"weight_ptr"},
                BLOCK=BLOCK, BLOCK_O=WEIGHT_TILE.block_m, BLOCK_K=mix_tile.block_n,
                BLOCK_T=mix_tile.block_m, IS_BACK=back)
          for back in (False, True)),
        _case("table", table_kernel, TABLE_TILE, "*fp32", set(), BLOCK_U=256, HAS_LOGS=False),
        _case("group_sum", group_sum_kernel, SUM_TILE, "*fp32", set(), BLOCK=BLOCK,
              BLOCK_U=SUM_TILE.block_m, BLOCK_P=SUM_TILE.block_n),
    ]  # fmt: skip
    for dim in (64, 128):
        shape: dict[str, Any] = {"BLOCK": BLOCK, "BLOCK_C": dim}
        rows: dict[str, Any] = {"GROUP": 1, "DIM": dim, **shape}
        found.append(_case(f"mix/d{dim}", mix_kernel, mix_tile, "*fp16", set(), **shape,
                           BLOCK_O=mix_tile.block_m, BLOCK_K=mix_tile.block_n,
                           IS_BACK=False))  # fmt: skip
        found.append(_case(f"pair/d{dim}", pair_kernel, PAIR_TILE, "*fp16", {"value_ptr"}, **shape,
                           BLOCK_U=PAIR_TILE.block_m, BLOCK_A=PAIR_TILE.block_n))  # fmt: skip
        found.append(_case(f"upstream/bfloat16/d{dim}", upstream_kernel, UPSTREAM_TILE, "*bf16",
                           {"grad_ptr", "output_ptr"}, DIM=dim, **shape,
                           BLOCK_F=UPSTREAM_TILE.block_m, HAS_GRAD_LSE=False))  # fmt: skip
        inputs = {"GROUP": 1, "DIM": dim, "BLOCK_D": dim, "BLOCK_G": 16, "UPCAST": False}
        found.append(_case(f"columns/bfloat16/d{dim}", columns_kernel, COLUMN_TILE, "*bf16", set(),
                           **inputs, BLOCK_M=COLUMN_TILE.block_m))  # fmt: skip
        found.append(_case(f"column_gradients/bfloat16/d{dim}", column_gradients_kernel, BACK_TILE,
                           "*bf16", {"grad_q_ptr"}, **inputs, BLOCK_M=BACK_TILE.block_m,
                           SPLIT=2048))  # fmt: skip
        for second in (False, True) if dim == 128 else ():
            found.append(_case(f"distances/{int(second)}/bfloat16/d{dim}", distance_kernel,
                               DISTANCE_TILE, "*bf16", set(), GROUP=1, DIM=dim, BLOCK_D=dim,
                               BLOCK_M=DISTANCE_TILE.block_m, BLOCK_N=DISTANCE_TILE.block_n,
                               SPLIT=2048, IS_SECOND=second, BLOCK_G=16, HAS_KEY_OFFSET=False,
                               HAS_ROW_OFFSET=False, UPCAST=False))  # fmt: skip
        for offset in (False, True) if dim == 128 else (False,):
            name = f"bfloat16/d{dim}" + ("/offset" if offset else "")
            found.append(_case(f"value_spectra/{name}", value_spectra_kernel, VALUE_TILE, "*bf16",
                               {"value_ptr"}, **rows, BLOCK_F=VALUE_TILE.block_m,
                               HAS_OFFSET=offset))  # fmt: skip
            found.append(_case(f"rows/{name}", row_kernel, ROW_TILE, "*bf16",
                               {"value_ptr", "output_ptr"}, **rows, BLOCK_M=ROW_TILE.block_m,
                               BLOCK_N=ROW_TILE.block_n, HAS_OFFSET=offset, HAS_HIDDEN=True,
                               ONE_PASS=True))  # fmt: skip
            found.append(_case(f"keys/{name}", key_kernel, BACK_ROW_TILE, "*bf16",
                               {"value_ptr", "grad_ptr", "grad_value_ptr"}, **rows,
                               BLOCK_M=BACK_ROW_TILE.block_m, BLOCK_N=BACK_ROW_TILE.block_n,
                               HAS_OFFSET=offset))  # fmt: skip
    return found


def _case(name: str, kernel: Any, tile: KernelConfig, pointer: str, own: set[str],
          **constexprs: Any) -> AotCase:  # fmt: skip
    """`own`: arguments in the dtype `pointer`; other tables are float32."""
    signature: dict[str, str] = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            continue
        if argument in own or argument in {"q_ptr", "k_ptr"}:
            signature[argument] = pointer
        elif (
            (kernel is mix_kernel and argument in _MIX)
            or argument in _HALF
            or (argument == "spectra_ptr" and kernel in (value_spectra_kernel, upstream_kernel))
        ):
            signature[argument] = "*fp16"
        elif argument in _INT32 or argument in _INT64 or argument.endswith("_ptr"):
            integer = "*i32" if argument in _INT32 else "*i64"
            signature[argument] = integer if argument in _INT32 | _INT64 else "*fp32"
        else:
            scalars = {"noise_scale", "scale", "each", "store_scale", "load_scale"}
            signature[argument] = "fp32" if argument in scalars else "i32"
    if "hidden_ptr" in signature:
        signature["hidden_ptr"] = "*u8"
    if kernel is distance_kernel:
        signature["first_ptr"] = "*fp32"
    if kernel is _conv_basis_search_kernel:
        signature["starts_ptr"] = "*i64"
    return AotCase(
        name=f"conv_basis/{name}/w{tile.num_warps}s{tile.num_stages}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=tuple(
            n for n in signature if n.endswith("_ptr") or n.startswith("stride_") or n == "width"
        ),
    )
