"""Packed sequences: read the bounds once, run a dense function on each sequence."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._validation import VarlenCall
from .errors import ShapeError

__all__ = ["Bounds", "run_each_sequence", "sequence_bounds"]


class Bounds(NamedTuple):
    """Rows of one sequence in the packed query and the packed key."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int


def sequence_bounds(name: str, call: VarlenCall) -> list[Bounds]:
    """The bounds of every sequence, checked; costs one device synchronisation."""
    sides = []
    for label, cu, total, longest in (
        ("q", call.cu_seqlens_q, call.query.shape[0], call.max_seqlen_q),
        ("k", call.cu_seqlens_k, call.key.shape[0], call.max_seqlen_k),
    ):
        marks = cu.tolist()
        lengths = [b - a for a, b in itertools.pairwise(marks)]
        if marks[0] != 0 or marks[-1] != total or min(lengths) < 0:
            raise ShapeError(
                f"{name}: cu_seqlens_{label} is {marks}; it must start at 0, never fall and end "
                f"at {total}, the packed length."
            )
        if max(lengths) > longest:
            raise ShapeError(
                f"{name}: max_seqlen_{label} is {longest} but a sequence has {max(lengths)} "
                "tokens. Pass the longest length or any upper bound."
            )
        sides.append(marks)
    q_marks, k_marks = sides
    return [
        Bounds(q_marks[i], q_marks[i + 1], k_marks[i], k_marks[i + 1])
        for i in range(len(q_marks) - 1)
    ]


def run_each_sequence(
    name: str, call: VarlenCall, function: Callable[[Tensor, Tensor, Tensor, int], Tensor]
) -> Tensor:
    """`function(query, key, value, query_offset)` on each sequence as a batch of one, packed again.

    query_offset is N_k - N_q of the sequence: causality is aligned at its end.
    """
    outputs = []
    for q_start, q_end, k_start, k_end in sequence_bounds(name, call):
        query = call.query[q_start:q_end].transpose(0, 1).unsqueeze(0)
        key = call.key[k_start:k_end].transpose(0, 1).unsqueeze(0)
        value = call.value[k_start:k_end].transpose(0, 1).unsqueeze(0)
        offset = (k_end - k_start) - (q_end - q_start)
        outputs.append(function(query, key, value, offset).squeeze(0).transpose(0, 1))
    return torch.cat(outputs)
