"""Compile kernels for a GPU that is not there, and read what they cost.

Triton compiles for a target without the device; the resource usage is read from the machine code
with the `cuobjdump` that the triton package carries. Each mechanism lists its configurations in
`impl/triton/catalogue.py` as `cases() -> list[AotCase]`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["AotCase", "Resources", "compile_case"]


@dataclass(frozen=True, kw_only=True)
class AotCase:
    """One kernel in one configuration.

    name: unique, stable, readable: it is the key in the committed table.
    kernel: the @triton.jit function.
    signature: argument name -> Triton type ("*bf16", "i32", "fp32", ...), constexprs left out.
    constexprs: argument name -> value.
    aligned: arguments (pointers, strides) known to be divisible by 16.
    spill_allowance: bytes a thread may spill; more than 0 only with a measured reason beside it.
    max_registers: cap on the registers of a thread, as launched.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = field(default=())
    spill_allowance: int = 0
    max_registers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one compiled kernel uses: registers a thread, spilled bytes a thread, shared bytes."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def compile_case(case: AotCase, capability: int) -> Resources:
    """Compile `case` for sm_<capability> (80, 90) and return what it uses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constexprs else case.signature[n] for n in names}
    constexprs = {(names.index(n),): value for n, value in case.constexprs.items()}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if case.max_registers is not None:
        options["maxnreg"] = case.max_registers
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    registers, stack = _resource_usage(compiled.asm["cubin"])
    return Resources(
        registers=registers, spill_bytes=stack, shared_bytes=int(compiled.metadata.shared)
    )


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as handle:
        handle.write(cubin)
        handle.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", handle.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{text}")
    return int(found[1]), int(found[2])
