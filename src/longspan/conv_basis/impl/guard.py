"""The engine with its safety net: blocks of rows that float32 cannot hold move to float64, and
what float64 cannot hold is evaluated weight by weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .engine import Problem, block_size, run_backward, run_forward

__all__ = [
    "DOUBLE",
    "HALF",
    "SINGLE",
    "WEIGHT_BY_WEIGHT",
    "guarded_backward",
    "guarded_forward",
    "log_weights",
]

SINGLE, DOUBLE, WEIGHT_BY_WEIGHT, HALF = 0, 1, 2, 3  # how a problem was evaluated
# Estimated relative error of a denominator beyond which precision is raised, by the dtype of the
# result: an output that is rounded to bfloat16 (8e-3) does not need more.
_TOLERANCE = {torch.bfloat16: 5e-4, torch.float16: 1e-4}
_FINEST = 3e-5
_WORK_BYTES = {"cpu": 2**22, "cuda": 3 * 2**30}  # on the CPU: one at a time, in the cache
_FEW = 16  # at most one block in so many: evaluated weight by weight, backward in float64
_DENSE_WEIGHTS = 2**23  # weights held at a time


def guarded_forward(
    problem: Problem, block: int | None = None, result: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (R, N_q, D_v), lse (R, N_q) in the problem's dtype; path (R,) uint8.

    One device synchronisation: which problems need more than float32. `result`: the dtype that
    the output will be rounded to.
    """
    tolerance = _TOLERANCE.get(result, _FINEST)
    size = block or block_size(max(problem.n_q, problem.value.shape[1]), problem.value.device)
    pieces = [run_forward(part, size) for part in _chunks(problem, size)]
    output, lse, ratio = _join(pieces)
    is_bad = ~(ratio <= tolerance)  # NaN is bad
    path = torch.zeros(output.shape[0], dtype=torch.uint8, device=output.device)
    rows = is_bad.any(1).nonzero().flatten()
    if rows.numel() == 0:
        return output, lse, path
    path[rows] = DOUBLE
    for index in rows.tolist():
        row = rows.new_tensor([index])
        wide = problem.take(row).to(torch.float64)
        bad = is_bad[index].nonzero().flatten()
        is_few = bad.numel() <= is_bad.shape[1] // _FEW  # cheaper than the whole problem again
        if output.dtype is not torch.float64 and not is_few:
            new_output, new_lse, ratio = run_forward(wide, size)
            output[row], lse[row] = new_output.to(output.dtype), new_lse.to(lse.dtype)
            bad = (~(ratio[0] <= tolerance)).nonzero().flatten()
        if bad.numel() and not is_few:
            path[row] = WEIGHT_BY_WEIGHT
        for a in bad.tolist():
            part = slice(a * size, min((a + 1) * size, problem.n_q))
            for some in _row_slices(wide, part):
                logs = log_weights(wide, some)
                row_lse = torch.logsumexp(logs, -1)
                weights = torch.exp(logs - _finite(row_lse).unsqueeze(-1))
                output[index, some] = (weights @ wide.value)[0].to(output.dtype)
                lse[index, some] = row_lse[0].to(lse.dtype)
    return output, lse, path


def guarded_backward(
    problem: Problem,
    path: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    block: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of log_kernel, key_offset (R, N_k) and value, each problem as in the forward."""
    size = block or block_size(max(problem.n_q, problem.value.shape[1]), problem.value.device)
    count = problem.value.shape[0]
    if count == 0:
        return (torch.zeros_like(problem.log_kernel), problem.value[..., 0].clone(),
                torch.zeros_like(problem.value))  # fmt: skip
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    step = _problems_at_once(problem, size, 3)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        part_lse = None if grad_lse is None else grad_lse[rows]
        found.append(
            run_backward(
                problem.take(rows), size, output[rows], lse[rows], grad_output[rows], part_lse
            )
        )
    kernel, key, value = _join(found)
    for index in ((path == DOUBLE) | (path == WEIGHT_BY_WEIGHT)).nonzero().flatten().tolist():
        row = torch.tensor([index], device=path.device)
        wide = problem.take(row).to(torch.float64)
        out, top, grad = output[row].double(), lse[row].double(), grad_output[row].double()
        part_lse = None if grad_lse is None else grad_lse[row].double()
        if int(path[row]) == DOUBLE:
            new = run_backward(wide, size, out, top, grad, part_lse)
        else:
            new = _dense_backward(wide, out, top, grad, part_lse)
        kernel[row], key[row], value[row] = (t.to(kernel.dtype) for t in new)
    return kernel, key, value


def log_weights(problem: Problem, rows: slice) -> Tensor:
    """(R, rows, N_k): c_g(p - j) + beta_j, -inf where the kernel has no such lag."""
    index, group, counts = _lag_index(problem, rows)
    length = problem.log_kernel.shape[-1]
    flat = problem.log_kernel.flatten(1)
    place = group.unsqueeze(1) * length + index  # (R, rows, N_k)
    logs = torch.gather(flat, 1, place.flatten(1)).view(place.shape)
    logs = torch.where(counts, logs, float("-inf"))
    return logs if problem.key_offset is None else logs + problem.key_offset.unsqueeze(1)


def _lag_index(problem: Problem, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Entry of the kernel (rows, N_k), group of each key (R, N_k), whether the entry exists."""
    device, n_k = problem.value.device, problem.value.shape[1]
    length = problem.log_kernel.shape[-1]
    keys = torch.arange(n_k, device=device)
    lag = torch.arange(rows.start, rows.stop, device=device)[:, None] + problem.query_offset - keys
    index = lag if problem.is_causal else lag + (length - 1) // 2
    counts = (index >= 0) & (index < length)
    starts = problem.starts.contiguous()
    where = keys.expand(starts.shape[0], -1).contiguous()
    group = (torch.searchsorted(starts, where, right=True) - 1).clamp(min=0)
    return index.clamp(0, length - 1), group, counts


def _dense_backward(
    problem: Problem, output: Tensor, lse: Tensor, grad_output: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grad_kernel = torch.zeros_like(problem.log_kernel)
    grad_value = torch.zeros_like(problem.value)
    grad_key = torch.zeros_like(problem.value[..., 0])
    delta = (grad_output * output).sum(-1)
    last = -delta if grad_lse is None else grad_lse - delta
    for some in _row_slices(problem, slice(0, problem.n_q)):
        index, group, counts = _lag_index(problem, some)
        row_lse = lse[:, some].unsqueeze(-1)
        weights = torch.exp(log_weights(problem, some) - _finite(row_lse))
        grad_value += weights.mT @ grad_output[:, some]
        change = weights * (grad_output[:, some] @ problem.value.mT + last[:, some].unsqueeze(-1))
        grad_key += change.sum(1)
        length = problem.log_kernel.shape[-1]
        place = (group.unsqueeze(1) * length + index).flatten(1)
        change = torch.where(counts, change, 0.0).flatten(1)
        grad_kernel.view(grad_kernel.shape[0], -1).scatter_add_(1, place, change)
    return grad_kernel, grad_key, grad_value


def _join(parts: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    if len(parts) == 1:
        return list(parts[0])
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def _finite(lse: Tensor) -> Tensor:
    return torch.where(lse == float("-inf"), 0.0, lse)


def _row_slices(problem: Problem, rows: slice) -> Iterator[slice]:
    step = max(1, _DENSE_WEIGHTS // max(problem.value.shape[0] * problem.value.shape[1], 1))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def _chunks(problem: Problem, size: int) -> Iterator[Problem]:
    count = problem.value.shape[0]
    step = _problems_at_once(problem, size, 1)
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield problem.take(slice(start, stop))


def _problems_at_once(problem: Problem, size: int, passes: int) -> int:
    """How many problems fit into the work memory together."""
    n = max(problem.n_q, problem.value.shape[1])
    blocks = -(-n // size)
    groups = problem.log_kernel.shape[1]
    runs = blocks + groups - 1
    floats = 2 * size * (3 * runs * (problem.value.shape[2] + 1) + 4 * groups * blocks)
    floats += 2 * size * 3 * blocks * runs
    bytes_each = floats * problem.value.element_size() * passes
    return max(1, _WORK_BYTES.get(problem.value.device.type, 2**22) // max(bytes_each, 1))
