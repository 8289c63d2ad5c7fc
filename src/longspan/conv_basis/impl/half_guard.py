"""The half-precision engine with its safety net: heads it cannot hold go to float32 and beyond."""

from __future__ import annotations

import torch
from torch import Tensor

from .engine import make_problem
from .guard import HALF, guarded_forward

__all__ = ["HALF_TOLERANCE", "guarded_half_forward"]

# Estimated relative error of a denominator beyond which a head is computed in float32, by the
# dtype of the values. Rounding an output alone costs up to 4e-3 (bfloat16), 5e-4 (float16).
HALF_TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3}


def guarded_half_forward(
    log_kernel: Tensor, starts: Tensor, key_offset: Tensor | None, value: Tensor,
    hidden: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output (R, N, D_v) in the dtype of `value`, lse (R, N) float32, path (R,) uint8.

    log_kernel: (B, H, G, L); starts: (B, H, G); key_offset: (B, H, N); value (B, H_kv, N, D_v);
    R = B H. One device synchronisation: which heads need float32.
    """
    from .triton.half import half_forward

    batch, heads = log_kernel.shape[:2]
    begin = starts.flatten(0, 1).clone()
    begin[:, 0] = 0
    offset = None if key_offset is None else key_offset.float().flatten(0, 1)
    rows = None if hidden is None else hidden.repeat_interleave(heads, 0)
    output, lse, ratio = half_forward(log_kernel.float().flatten(0, 1), begin, offset, value, rows)
    path = torch.full((batch * heads,), HALF, dtype=torch.uint8, device=value.device)
    bad = (~(ratio <= HALF_TOLERANCE[value.dtype])).any(1)  # NaN is bad
    group = heads // value.shape[1]
    for index in bad.nonzero().flatten().tolist():
        b, h = divmod(index, heads)
        one = slice(h, h + 1)
        problem = make_problem(
            log_kernel[b : b + 1, one], starts[b : b + 1, one],
            None if key_offset is None else key_offset[b : b + 1, one],
            value[b : b + 1, h // group : h // group + 1],
            None if hidden is None else hidden[b : b + 1], value.shape[2], True, 0,
        )  # fmt: skip
        own, own_lse, own_path = guarded_forward(problem, None, value.dtype)
        output[index], lse[index], path[index] = own[0].to(output.dtype), own_lse[0], own_path[0]
    return output, lse, path
