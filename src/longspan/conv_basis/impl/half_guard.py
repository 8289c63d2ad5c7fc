"""The half-precision engine with its safety net: heads it cannot hold go to float32 and beyond."""

from __future__ import annotations

import torch
from torch import Tensor

from .engine import make_problem
from .guard import HALF, SINGLE, guarded_backward, guarded_forward

__all__ = ["HALF_TOLERANCE", "guarded_half_backward", "guarded_half_forward"]

# Estimated relative error of a denominator beyond which a head is computed in float32, by the
# dtype of the values. Rounding an output alone costs up to 4e-3 (bfloat16), 5e-4 (float16).
HALF_TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3}
_MAX_SPREAD = 64.0  # rounding errors of the kernel's gradient grow with it


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
    flat = log_kernel.float().flatten(0, 1)
    output, lse, ratio = half_forward(flat, begin, offset, value, hidden)
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


def guarded_half_backward(
    grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor, path: Tensor,
    log_kernel: Tensor, starts: Tensor, key_offset: Tensor | None, value: Tensor,
    hidden: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of log_kernel (B, H, G, L), key_offset (B, H, N) and value, in their dtypes.

    Heads that the forward computed otherwise, or whose pairs of blocks spread too far, go on in
    float32. One device synchronisation.
    """
    from .triton.half_back import half_backward

    batch, heads, groups, length = log_kernel.shape
    n, dim = value.shape[2:]
    begin = starts.flatten(0, 1).clone()
    begin[:, 0] = 0
    offset = None if key_offset is None else key_offset.float().flatten(0, 1)
    kernel, key, own, spread = half_backward(
        log_kernel.float().flatten(0, 1), begin, offset, value, output.flatten(0, 1),
        lse.flatten(0, 1), grad_output.to(value.dtype).flatten(0, 1),
        None if grad_lse is None else grad_lse.float().flatten(0, 1),
    )  # fmt: skip
    others = (path.flatten() != HALF) | ~(spread <= _MAX_SPREAD)
    group = heads // value.shape[1]
    for index in others.nonzero().flatten().tolist():
        b, h = divmod(index, heads)
        one, entry = slice(h, h + 1), slice(b, b + 1)
        problem = make_problem(
            log_kernel[entry, one], starts[entry, one],
            None if key_offset is None else key_offset[entry, one],
            value[entry, h // group : h // group + 1],
            None if hidden is None else hidden[entry], n, True, 0,
        )  # fmt: skip
        own_path = torch.where(path[entry, one] == HALF, SINGLE, path[entry, one]).flatten()
        parts = guarded_backward(
            problem, own_path, output[b, one].float(), lse[b, one], grad_output[b, one].float(),
            None if grad_lse is None else grad_lse[b, one].float(),
        )  # fmt: skip
        kernel[index], key[index], own[index] = (part[0] for part in parts)
    own = own.view(batch, value.shape[1], group, n, dim)
    own = own[:, :, 0] if group == 1 else own.sum(2)
    return (
        kernel.view(batch, heads, groups, length).to(log_kernel.dtype),
        key.view(batch, heads, n).to(log_kernel.dtype),
        own.to(value.dtype),
    )
