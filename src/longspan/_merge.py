"""Join partial results. Every mechanism composes through these two operators.

Softmax family: a partial over a set of keys is (output, lse). With w_i = exp(lse_i - lse),
lse = log sum_i exp(lse_i), the union of disjoint sets has output sum_i w_i output_i. Associative,
commutative, identity (0, -inf).

Stick-breaking: a partial over a contiguous run of keys is (output, log_rest). If N is nearer to
the query than F, the run N then F has (o_N + exp(l_N) o_F, l_N + l_F). Associative, not
commutative, identity (0, 0).

Both are written in differentiable torch operations: the backward is exact, through every output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import ShapeError
from .types import AttentionOutput

__all__ = ["merge", "merge_stick_breaking"]


def merge(parts: Sequence[AttentionOutput]) -> AttentionOutput:
    """Attention over the union of disjoint key sets, from its parts.

    Args:
        parts: one or more (output (..., N_q, D_v), lse (..., N_q)); any order. A part without
            visible keys is (0, -inf).

    Returns:
        AttentionOutput with the dtype of the first output; computed in float32 (float64 for
        float64 parts). Rows in which every part is empty give zeros and -inf.

    Raises:
        ShapeError: no parts, or parts of different shapes.
    """
    _check("merge", parts)
    if len(parts) == 1:
        return AttentionOutput(*parts[0])
    wide = _wide(parts[0][0])
    lses = torch.stack([lse.to(wide) for _, lse in parts])  # (P, ..., N_q)
    top = lses.detach().amax(0)
    top = torch.where(top == float("-inf"), 0.0, top)  # -inf - -inf is NaN in rows without keys
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    output = torch.zeros((), dtype=wide, device=safe.device)
    for weight, (part, _) in zip(weights, parts, strict=True):
        output = output + (weight / safe).unsqueeze(-1) * part.to(wide)
    lse = torch.where(empty, float("-inf"), top + torch.log(safe))
    return AttentionOutput(output.to(parts[0][0].dtype), lse)


def merge_stick_breaking(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stick-breaking over consecutive runs of keys, from its parts, nearest run first.

    Args:
        parts: one or more (output (..., N_q, D_v), log_rest (..., N_q)); the first is the run
            nearest to the query. A run without keys is (0, 0).

    Returns:
        (output, log_rest): output in the dtype of the first, log_rest in float32 (float64 for
        float64 parts).

    Raises:
        ShapeError: no parts, or parts of different shapes.
    """
    _check("merge_stick_breaking", parts)
    wide = _wide(parts[0][0])
    output, log_rest = parts[0][0].to(wide), parts[0][1].to(wide)
    for far_output, far_rest in parts[1:]:
        output = output + torch.exp(log_rest).unsqueeze(-1) * far_output.to(wide)
        log_rest = log_rest + far_rest.to(wide)
    return output.to(parts[0][0].dtype), log_rest


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def _check(name: str, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
    if len(parts) == 0:
        raise ShapeError(f"{name}: parts is empty; pass at least one (output, log) pair.")
    first, first_log = parts[0]
    for index, (output, log) in enumerate(parts):
        if output.shape != first.shape or log.shape != first_log.shape:
            raise ShapeError(
                f"{name}: part {index} has shapes {tuple(output.shape)} and {tuple(log.shape)}, "
                f"part 0 has {tuple(first.shape)} and {tuple(first_log.shape)}. All parts must "
                "have the same shapes; slice or expand them first."
            )
        if log.shape != output.shape[:-1]:
            raise ShapeError(
                f"{name}: part {index} has an output of shape {tuple(output.shape)} and a log of "
                f"shape {tuple(log.shape)}; the log must be {tuple(output.shape[:-1])}."
            )
