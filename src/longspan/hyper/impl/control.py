"""The convolution as a control variate for sampled keys.

Visited keys and samples estimate a row's sum S of exp(s_j). Let m_j = exp(score of the mean model
of Conv-Basis), whose sum over all keys is known from a Toeplitz product. With the same visited
keys and the same samples, the estimate of that sum misses it by an error that is known exactly;
`weight` times it is taken off the estimate of S. The mean over seeds does not change, whatever
the model; the variance falls if the model's error goes with that of S, and rises otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._validation import Call
from ...conv_basis.impl.means import MeanModel, mean_factors, mean_model
from ...conv_basis.ops import toeplitz_fwd
from ...types import AttentionOutput
from ..config import HyperConfig

__all__ = ["ControlCall", "apply_control", "control_call"]

_LEAST = 0.1  # share of the uncontrolled row sum below which a row keeps its plain estimate


class ControlCall(tuple[Call, MeanModel]):
    """The call whose scores are the model's (scale 1), and the model's kernel and offsets."""


def control_call(call: Call, config: HyperConfig) -> ControlCall | None:
    """The model of a call; None where there is no whole causal sequence to model."""
    n = call.key.shape[2]
    if not call.is_causal or call.query_offset != 0 or call.query.shape[2] != n or n == 0:
        return None
    if 0 in (call.query.numel(), call.value.numel()):
        return None
    lengths = torch.full((call.key.shape[0],), n, device=call.key.device)
    if call.key_lengths is not None:
        lengths = call.key_lengths.long().clamp(0, n)
    typical = max(1, round(math.sqrt(config.window * n)))
    arguments = (call.query, call.key, lengths, call.scale, config.control_rope_base, typical)
    left, right = mean_factors(*arguments)
    value = call.value.to(left.dtype)
    if call.key_lengths is not None:
        valid = torch.arange(n, device=value.device) < lengths[:, None]
        value = torch.where(valid[:, None, :, None], value, 0.0)
    modelled = call._replace(query=left, key=right, value=value, scale=1.0)
    return ControlCall((modelled, mean_model(*arguments)))


def apply_control(
    plain: AttentionOutput, control: ControlCall, sampled: AttentionOutput, weight: float
) -> AttentionOutput:
    """`plain` + weight (all keys of the model - the model's sampled estimate), normalised.

    sampled: the estimator of `plain`, run on the model's call with the same plan.
    """
    call, model = control
    n = call.key.shape[2]
    key_offset = model.key_offset
    if call.key_lengths is not None:
        valid = torch.arange(n, device=key_offset.device) < call.key_lengths[:, None]
        key_offset = torch.where(valid[:, None], key_offset, float("-inf"))
    starts = torch.zeros((*call.query.shape[:2], 1), dtype=torch.int64, device=key_offset.device)
    whole, whole_lse, _ = toeplitz_fwd(model.log_kernel, starts, key_offset, call.value, None, n,
                                       True, 0, 0, "eager")  # fmt: skip
    whole_lse = whole_lse + model.row_offset
    lses = torch.stack((plain.lse, whole_lse.to(plain.lse.dtype), sampled.lse))
    top = lses.detach().amax(0)
    top = torch.where(top == float("-inf"), 0.0, top)
    own, known, guessed = torch.exp(lses - top)
    total = own + weight * (known - guessed)
    usable = (total > _LEAST * own) & (own > 0)
    safe = torch.where(usable, total, 1.0)

    def share(part: Tensor) -> Tensor:
        return torch.where(usable, part / safe, 0.0).unsqueeze(-1)

    wide = plain.lse.dtype
    output = share(own) * plain.output.to(wide)
    output = output + weight * (share(known) * whole.to(wide))
    output = output - weight * (share(guessed) * sampled.output.to(wide))
    output = torch.where(usable.unsqueeze(-1), output, plain.output.to(wide))
    lse = torch.where(usable, top + torch.log(safe), plain.lse)
    return AttentionOutput(output.to(plain.output.dtype), lse)
