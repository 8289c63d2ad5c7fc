"""Running sums of the segments' states: forward for reads, backward for gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import full_grid

__all__ = ["scan_states"]

_BLOCK = 1024


@triton.jit(do_not_specialize=["slots"])
def _infini_scan_kernel(
    x_ptr, y_ptr, slots, SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr
):
    """y[g, r] is the sum of x[g, .. r] (or x[g, r ..]) for BLOCK elements of one g; y may be x."""
    chunks = tl.cdiv(SIZE, BLOCK)
    cols = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    first = (tl.program_id(0) // chunks).to(tl.int64) * slots * SIZE
    inside = cols < SIZE
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, slots):
        r = i
        if REVERSE:
            r = slots - 1 - i
        at = first + r.to(tl.int64) * SIZE + cols
        total += tl.load(x_ptr + at, mask=inside, other=0.0)
        tl.store(y_ptr + at, total, mask=inside)


def scan_states(states: Tensor, reverse: bool = False, in_place: bool = True) -> Tensor:
    """Inclusive sums along axis 2 of (B, H, R, ...), contiguous float32; returns them."""
    target = states if in_place else torch.empty_like(states)
    batch, heads, slots = states.shape[:3]
    size = states[0, 0, 0].numel() if states.numel() else 0
    if size:
        _infini_scan_kernel[full_grid(batch * heads * triton.cdiv(size, _BLOCK))](
            states, target, slots, SIZE=size, BLOCK=_BLOCK, REVERSE=reverse, num_warps=4,
            num_stages=1,
        )  # fmt: skip
    return target
