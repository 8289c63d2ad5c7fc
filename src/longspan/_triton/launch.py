"""When Triton can run, and with which configuration. Imports torch only."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["KernelConfig", "interpreting", "pick", "triton_refusal", "unit_last_stride"]

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # not imported here
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class KernelConfig(NamedTuple):
    """One launch configuration: tile sizes, warps, pipeline stages, a cap on registers a thread.

    is_one_loop: for kernels that can visit masked and unmasked tiles in one loop or in several.
    is_tma: for kernels that can load tiles by the tensor memory accelerator (sm_90 and later).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    is_one_loop: bool = False
    is_tma: bool = False

    def options(self) -> dict[str, int]:
        """Launch options for Triton."""
        chosen = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return chosen if self.max_registers is None else {**chosen, "maxnreg": self.max_registers}


def interpreting() -> bool:
    """True if kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def capability(device_index: int) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device_index)


def triton_refusal(query: Tensor) -> str | None:
    """Why no Triton kernel can take tensors like `query`; None if they can."""
    if not _TRITON_INSTALLED:
        return "the package triton is not installed (pip install triton; Linux only)"
    if query.dtype not in _KERNEL_DTYPES:
        return f"query is {query.dtype}; the Triton kernels take float16, bfloat16 and float32"
    if interpreting():
        return None if query.device.type == "cpu" else "TRITON_INTERPRET=1 runs on CPU tensors only"
    if query.device.type != "cuda":
        return (
            f"query is on {query.device}; the Triton kernels need a CUDA device "
            "(or TRITON_INTERPRET=1, slow, for tests)"
        )
    if torch.version.hip is not None:
        return "the Triton kernels are written and tested for NVIDIA devices only"
    if capability(query.device.index or 0) < (8, 0):
        return "the device is older than compute capability 8.0 (Ampere)"
    return None


def pick(configs: Sequence[KernelConfig]) -> KernelConfig:
    """The configuration to launch: the first; a tiny one where kernels are interpreted."""
    if interpreting():
        from .interpreter import repair_interpreter

        repair_interpreter()
        first = configs[0]
        return KernelConfig(16, 16, 4, 1, is_one_loop=first.is_one_loop, is_tma=first.is_tma)
    return configs[0]


def unit_last_stride(tensor: Tensor) -> Tensor:
    """`tensor` itself if its last stride is 1 (what the kernels need), else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
