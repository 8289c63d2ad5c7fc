"""Running sums of the segments' states, in place: forward for reads, backward for gradients."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tiles import full_grid

__all__ = ["scan_states"]

_BLOCK = 1024


@triton.jit(do_not_specialize=["slots"])
def _infini_scan_kernel(
    x_ptr, slots, SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr
):
    """x[g, r] becomes the sum of x[g, .. r] (or x[g, r ..]) for BLOCK elements of one g."""
    chunks = tl.cdiv(SIZE, BLOCK)
    cols = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    x_ptr += (tl.program_id(0) // chunks).to(tl.int64) * slots * SIZE
    inside = cols < SIZE
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, slots):
        r = i
        if REVERSE:
            r = slots - 1 - i
        at = x_ptr + r.to(tl.int64) * SIZE + cols
        total += tl.load(at, mask=inside, other=0.0)
        tl.store(at, total, mask=inside)


def scan_states(states: Tensor, reverse: bool = False) -> Tensor:
    """Inclusive sums along axis 2 of (B, H, R, ...), contiguous float32, in place; returns it."""
    batch, heads, slots = states.shape[:3]
    size = states[0, 0, 0].numel() if states.numel() else 0
    if size:
        _infini_scan_kernel[full_grid(batch * heads * triton.cdiv(size, _BLOCK))](
            states, slots, SIZE=size, BLOCK=_BLOCK, REVERSE=reverse, num_warps=4, num_stages=1
        )
    return states
