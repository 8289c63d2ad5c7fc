"""Torch's own attention kernels for one part: forward with lse, backward from a given lse.

The gradient through lse costs no kernel of ours: with ds = p (dp - delta + dlse), dp = dO v^T and
delta = rowsum(dO * O), give the value a column of ones, the output a column of zeros and dO a
column that holds dlse. Then dp grows by dlse and delta does not. In half precision dlse is split
into a high and a low part (two columns), so that it keeps its accuracy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Vendor(NamedTuple):
    """One kernel family: `aligns_at_end` if it runs N_q != N_k causal parts itself."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    aligns_at_end: bool
    multiple: int  # head dims are padded with zeros to a multiple of this


def positive_scale(scale: float) -> tuple[int, float]:
    """1, -1 or 0 for the query, and the scale that is left: torch's kernels need one above 0.

    Their causal mask is -inf before the scale multiplies it: 0 makes NaN of it, and less inf.
    """
    if scale > 0:
        return 1, scale
    return (-1, -scale) if scale < 0 else (0, 1.0)


def run_forward(
    vendor: Vendor, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(B, H, N_q, D_v) and natural-log lse (B, H, N_q)."""
    sign, scale = positive_scale(scale)
    q = q if sign == 1 else sign * q
    dim = _common_dim(vendor, max(q.shape[-1], v.shape[-1]))
    output, lse = vendor.forward(_pad(q, dim), _pad(k, dim), _pad(v, dim), is_causal, scale)
    return output[..., : v.shape[-1]], lse


def run_backward(
    vendor: Vendor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. `output` and `lse` may be those of a larger set of keys than k and v."""
    sign, scale = positive_scale(scale)
    q = q if sign == 1 else sign * q
    if grad_lse is not None:
        columns = _split(grad_lse, q.dtype)
        grad_output = torch.cat([grad_output, columns], -1)
        output = F.pad(output, (0, columns.shape[-1]))
        ones = v.new_ones((*v.shape[:-1], columns.shape[-1]))
        v_wide = torch.cat([v, ones], -1)
    else:
        v_wide = v
    dim = _common_dim(vendor, max(q.shape[-1], v_wide.shape[-1]))
    dq, dk, dv = vendor.backward(
        _pad(grad_output, dim),
        _pad(q, dim),
        _pad(k, dim),
        _pad(v_wide, dim),
        _pad(output, dim),
        lse,
        is_causal,
        scale,
    )
    dq = dq if sign == 1 else sign * dq
    return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


def _split(grad_lse: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, N_q, 1 or 2) in `dtype`, adding up to grad_lse."""
    high = grad_lse.to(dtype)
    if dtype not in (torch.float16, torch.bfloat16):
        return high.unsqueeze(-1)
    return torch.stack([high, (grad_lse - high.to(grad_lse.dtype)).to(dtype)], -1)


def _common_dim(vendor: Vendor, dim: int) -> int:
    return -(-dim // vendor.multiple) * vendor.multiple


def _pad(tensor: Tensor, dim: int) -> Tensor:
    return tensor if tensor.shape[-1] == dim else F.pad(tensor, (0, dim - tensor.shape[-1]))


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, scale=scale
    )
    return output, lse


def _cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, output, lse, 0.0, is_causal, scale=scale
    )
    return dq, dk, dv


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, N, H, D)
    output, lse, *_ = aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, is_causal, False, scale=scale
    )
    return output.transpose(1, 2), lse


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, output = (t.transpose(1, 2) for t in (grad, q, k, v, output))
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # dropout state, unused
    unused = torch.empty(0, device=q.device)
    dq, dk, dv = aten._flash_attention_backward(
        grad.contiguous(),
        q,
        k,
        v,
        output.contiguous(),
        lse.contiguous(),
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        is_causal,
        state,
        unused,
        scale=scale,
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    output, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, is_causal, False, scale=scale
    )
    return output, lse.reshape(q.shape[:3])


def _cudnn_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    state = torch.zeros((), dtype=torch.int64, device=q.device)  # dropout state, unused
    if _cudnn_lse_dims(q.device) == 4:
        lse = lse.unsqueeze(-1)
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        grad.contiguous(),  # a slice of a longer gradient gives wrong results (torch 2.11)
        q,
        k,
        v,
        output.contiguous(),
        lse.contiguous(),
        state,
        state,
        None,
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        is_causal,
        scale=scale,
    )
    return dq, dk, dv


@functools.cache
def _cudnn_lse_dims(device: torch.device) -> int:
    """Dimensions of cuDNN's lse: torch adds a last axis of one in some versions."""
    probe = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    lse: Tensor = aten._scaled_dot_product_cudnn_attention(probe, probe, probe, None, True)[1]
    return lse.ndim


CPU = Vendor(_cpu_forward, _cpu_backward, aligns_at_end=False, multiple=1)
CUDNN = Vendor(_cudnn_forward, _cudnn_backward, aligns_at_end=False, multiple=8)
FLASH = Vendor(_flash_forward, _flash_backward, aligns_at_end=True, multiple=8)
