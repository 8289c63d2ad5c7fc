"""Softmax-normalised sums over Toeplitz weights, by blocks: an FFT in a block, a product between.

Row i at p = i + query_offset gives key j the log-weight c_g(p - j) + beta_j, g the group of j.
Keys are cut into runs of one block and one group, each scaled by its largest beta; lags are cut
into pieces of 2 B, each scaled by its own largest value. One block of rows is, frequency by
frequency, a matrix product over the runs, with one log-scale per block of rows. All terms are
positive: nothing cancels, and nothing overflows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Layout, Runs, make_layout, make_runs

__all__ = ["Problem", "block_size", "make_problem", "run_backward", "run_forward"]

_NEG_INF = float("-inf")
_PANELS = 4  # cuts of the rows, so that a causal product skips most of the upper triangle
_NOISE = 0.25  # with it the estimate is 0.2 to 3 times the worst row that was measured


class Problem(NamedTuple):
    """R independent problems in one dtype (float32 or float64)."""

    log_kernel: Tensor  # (R, G, L)
    starts: Tensor  # (R, G) int64
    key_offset: Tensor | None  # (R, N_k)
    value: Tensor  # (R, N_k, D_v), finite
    n_q: int
    is_causal: bool
    query_offset: int
    hidden: Tensor | None = (
        None  # (R or 1, N_q) bool: rows that see no key; None: found by counting
    )

    def take(self, index: Tensor | slice) -> Problem:
        """The problems `index` (int64 or a slice)."""
        hidden = self.hidden
        if hidden is not None and hidden.shape[0] > 1:
            hidden = hidden[index]
        offset = None if self.key_offset is None else self.key_offset[index]
        return self._replace(log_kernel=self.log_kernel[index], starts=self.starts[index],
                             key_offset=offset, value=self.value[index],
                             hidden=hidden)  # fmt: skip

    def to(self, dtype: torch.dtype) -> Problem:
        """The same in another precision."""
        offset = None if self.key_offset is None else self.key_offset.to(dtype)
        return self._replace(
            log_kernel=self.log_kernel.to(dtype), key_offset=offset, value=self.value.to(dtype)
        )


class _Spectra(NamedTuple):
    layout: Layout
    runs: Runs
    kernel: Tensor  # (R, G, D, 2 B): exp(c - scale of the piece)
    kernel_hat: Tensor  # (R, F, G D)
    weight: Tensor  # (R, U, B): exp(beta - scale of the run), 0 outside of the run
    value_hat: Tensor  # (R, F, U, C)
    log_pair: Tensor  # (R, A, U): scale of piece and run for each row block; -inf: no weight
    pair_index: Tensor  # (R, A, U): which (group, piece)
    kernel_norm: Tensor  # (R, G, D)
    weight_norm: Tensor  # (R, U)


def make_problem(
    log_kernel: Tensor,
    starts: Tensor,
    key_offset: Tensor | None,
    value: Tensor,
    hidden: Tensor | None,
    n_q: int,
    is_causal: bool,
    query_offset: int,
) -> Problem:
    """One problem for each head, in float32 (float64 if the kernels are); see `toeplitz_fwd`."""
    heads = log_kernel.shape[1]
    wide = torch.float64 if log_kernel.dtype is torch.float64 else torch.float32
    repeats = heads // value.shape[1]
    if repeats > 1:
        value = value.repeat_interleave(repeats, 1)
    offset = None if key_offset is None else key_offset.to(wide).flatten(0, 1)
    rows = None if hidden is None else hidden.repeat_interleave(heads, 0)
    begin = starts.flatten(0, 1).clone()
    begin[:, 0] = 0
    return Problem(
        log_kernel.to(wide).flatten(0, 1), begin, offset, value.to(wide).flatten(0, 1), n_q,
        is_causal, query_offset, rows,
    )  # fmt: skip


def block_size(n: int, device: torch.device) -> int:
    """Power of two that balances transforms (longer with B) and products (more with n / B).

    Shorter blocks also hold a smaller range of weights, so fewer heads need float64.
    """
    if n <= 64:
        return 32
    if device.type == "cpu":
        return 128 if n <= 12288 else 256 if n <= 50000 else 512 if n <= 200000 else 1024
    return 256 if n <= 50000 else 512 if n <= 200000 else 1024 if n <= 400000 else 2048


def run_forward(problem: Problem, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output (R, N_q, D_v), lse (R, N_q), and (R, A) noise-to-signal of each block of rows.

    The last is an estimate of the relative rounding error of the smallest denominator of a block:
    a convolution by FFT errs by about eps |kernel|_2 |input|_2, whatever its result.
    """
    with _full_precision(problem.value.device):
        spectra = _transform(problem, block)
        layout = spectra.layout
        rows, size, a_count = problem.value.shape[0], layout.block, layout.row_blocks
        top = spectra.log_pair.amax(-1)  # (R, A)
        shift = torch.where(top == _NEG_INF, 0.0, top)
        factor = torch.exp(spectra.log_pair - shift.unsqueeze(-1))
        parts = []
        for start, stop, runs in _panels(spectra):
            mixed = _mix(spectra, factor, start, stop, runs) @ spectra.value_hat[:, :, :runs]
            parts.append(torch.fft.irfft(mixed, n=2 * size, dim=1)[:, size:])  # (R, B, a, C)
        sums = torch.cat(parts, 2).transpose(1, 2)  # (R, A, B, C)
        den = sums[..., -1]
        noise = (factor * _pair_norm(spectra)).sum(-1) * (_NOISE * torch.finfo(den.dtype).eps)
        inside = torch.arange(a_count * size, device=den.device).view(a_count, size) < problem.n_q
        empty = _hidden(problem, spectra)
        smallest = torch.where(inside & ~empty, den, float("inf")).amin(-1)
        ratio = noise / smallest.clamp(min=torch.finfo(den.dtype).tiny)
        safe = torch.where(empty | (den <= 0), 1.0, den)
        output = torch.where(empty.unsqueeze(-1), 0.0, sums[..., :-1] / safe.unsqueeze(-1))
        lse = torch.where(empty, _NEG_INF, torch.log(safe) + shift.unsqueeze(-1))
        return (
            output.reshape(rows, a_count * size, -1)[:, : problem.n_q],
            lse.reshape(rows, -1)[:, : problem.n_q],
            ratio,
        )


def run_backward(
    problem: Problem,
    block: int,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of log_kernel, key_offset (R, N_k) and value, from the weights exp(c + beta - lse).

    With y_i = [dO_i, dlse_i - dO_i . O_i]: dV_j and dbeta_j correlate y with the kernels,
    dc_g(l) correlates y with [V, 1] over the keys of the group; both by the forward's transforms.
    """
    with _full_precision(problem.value.device):
        spectra = _transform(problem, block)
        layout, size = spectra.layout, spectra.layout.block
        rows, a_count = problem.value.shape[0], layout.row_blocks
        delta = (grad_output * output).sum(-1)
        last = -delta if grad_lse is None else grad_lse - delta
        upstream = torch.cat((grad_output, last.unsqueeze(-1)), -1)  # (R, N_q, C)
        tail = a_count * size - problem.n_q
        row_lse = F.pad(lse, (0, tail), value=_NEG_INF).view(rows, a_count, size)
        hidden = row_lse == _NEG_INF
        least = torch.where(hidden, float("inf"), row_lse).amin(-1)
        least = torch.where(least == float("inf"), 0.0, least)  # (R, A)
        damp = torch.where(hidden, 0.0, torch.exp(least.unsqueeze(-1) - row_lse))
        upstream = F.pad(upstream, (0, 0, 0, tail)).view(rows, a_count, size, -1)
        upstream = (upstream * damp.unsqueeze(-1)).transpose(-1, -2)  # (R, A, C, B)
        up_hat = torch.fft.rfft(F.pad(upstream, (size, 0)), n=2 * size)
        up_hat = up_hat.permute(0, 3, 1, 2).contiguous()  # (R, F, A, C)
        factor = torch.exp(spectra.log_pair - least.unsqueeze(-1))

        mixed = _mix(spectra, factor, 0, a_count, spectra.runs.block.shape[1])
        back = mixed.mH @ up_hat  # (R, F, U, C)
        back = torch.fft.irfft(back, n=2 * size, dim=1)[:, :size].transpose(1, 2)  # (R, U, B, C)
        back = back * spectra.weight.unsqueeze(-1)
        back = _join_runs(spectra, back)[:, : problem.value.shape[1]]  # (R, N_k, C)
        grad_value = back[..., :-1]
        grad_key = (grad_value * problem.value).sum(-1) + back[..., -1]
        pair = up_hat @ spectra.value_hat.mH  # (R, F, A, U)
        grad_kernel = _kernel_gradient(problem, spectra, pair * factor.unsqueeze(1))
        return grad_kernel, grad_key, grad_value


def _transform(problem: Problem, block: int) -> _Spectra:
    layout = make_layout(block, problem.n_q, problem.value.shape[1], problem.is_causal,
                         problem.query_offset, problem.log_kernel.shape[-1])  # fmt: skip
    runs = make_runs(layout, problem.starts)
    frames = _frames(problem.log_kernel, layout)  # (R, G, D, 2 B)
    scale = frames.amax(-1)  # (R, G, D)
    shift = torch.where(scale == _NEG_INF, 0.0, scale)
    kernel = torch.exp(frames - shift.unsqueeze(-1))
    kernel_hat = torch.fft.rfft(kernel).flatten(1, 2).transpose(1, 2).contiguous()

    rows, n_k, _ = problem.value.shape
    pad = layout.key_blocks * block - n_k
    place = torch.arange(block, device=runs.block.device)
    index = runs.block.unsqueeze(-1) * block + place  # (R, U, B)
    mine = (index >= runs.start.unsqueeze(-1)) & (index < runs.end.unsqueeze(-1)) & (index < n_k)
    if problem.key_offset is None:
        run_scale = torch.where(mine.any(-1), 0.0, _NEG_INF).to(frames.dtype)
        weight = mine.to(frames.dtype)
    else:
        offset = F.pad(problem.key_offset, (0, pad), value=_NEG_INF)
        offset = torch.gather(offset, 1, index.flatten(1)).view(index.shape)
        offset = torch.where(mine, offset, _NEG_INF)
        run_scale = offset.amax(-1)
        finite = torch.where(run_scale == _NEG_INF, 0.0, run_scale)
        weight = torch.exp(offset - finite.unsqueeze(-1))
    columns = F.pad(problem.value, (0, 0, 0, pad)).view(rows, layout.key_blocks, block, -1)
    columns = columns.transpose(-1, -2)  # (R, blocks, D_v, B)
    if runs.block.shape[1] != layout.key_blocks:
        at = torch.arange(rows, device=runs.block.device).unsqueeze(-1)
        columns = columns[at, runs.block]  # (R, U, D_v, B)
    padded = weight.new_zeros((rows, weight.shape[1], columns.shape[2] + 1, 2 * block))
    torch.mul(columns, weight.unsqueeze(2), out=padded[:, :, :-1, :block])
    padded[:, :, -1, :block] = weight
    value_hat = torch.fft.rfft(padded).permute(0, 3, 1, 2).contiguous()  # (R, F, U, C)

    steps = torch.arange(layout.row_blocks, device=runs.block.device)
    piece = steps.unsqueeze(-1) - runs.block.unsqueeze(1) - layout.first_piece  # (R, A, U)
    counts = (piece >= 0) & (piece < layout.pieces)
    pair = runs.group.unsqueeze(1) * layout.pieces + piece.clamp(0, layout.pieces - 1)
    log_pair = torch.gather(scale.flatten(1), 1, pair.flatten(1)).view(pair.shape)
    log_pair = torch.where(counts, log_pair, _NEG_INF) + run_scale.unsqueeze(1)
    return _Spectra(layout, runs, kernel, kernel_hat, weight, value_hat, log_pair, pair,
                    kernel.square().sum(-1).sqrt(), weight.square().sum(-1).sqrt())  # fmt: skip


def _lag_range(layout: Layout) -> tuple[int, int]:
    """First lag of the first piece, and past the last lag of the last."""
    first = layout.query_offset + (layout.first_piece - 1) * layout.block
    return first, first + (layout.pieces + 1) * layout.block


def _frames(log_kernel: Tensor, layout: Layout) -> Tensor:
    """(R, G, D, 2 B): the lags delta - B .. delta + B - 1 of each piece; the first never counts."""
    start, stop = (lag + layout.zero for lag in _lag_range(layout))
    length = log_kernel.shape[-1]
    inside = log_kernel[..., min(max(start, 0), length) : min(max(stop, 0), length)]
    before = min(max(-start, 0), stop - start)
    wide = F.pad(inside, (before, stop - start - before - inside.shape[-1]), value=_NEG_INF)
    frames = wide.unfold(-1, 2 * layout.block, layout.block).clone()
    frames[..., 0] = _NEG_INF
    return frames


def _mix(spectra: _Spectra, factor: Tensor, start: int, stop: int, runs: int) -> Tensor:
    """(R, F, a, u): the spectra that take the runs to the row blocks start .. stop - 1."""
    index = spectra.pair_index[:, start:stop, :runs].flatten(1)
    rows, frequencies, _ = spectra.kernel_hat.shape
    if rows == 1:
        taken = spectra.kernel_hat.index_select(2, index[0])
    else:
        taken = torch.gather(spectra.kernel_hat, 2, index.unsqueeze(1).expand(-1, frequencies, -1))
    taken = taken.view(rows, frequencies, stop - start, runs)
    return taken.mul_(factor[:, None, start:stop, :runs])


def _panels(spectra: _Spectra) -> Iterator[tuple[int, int, int]]:
    """Row blocks start .. stop - 1 see at most the first `runs` runs."""
    layout, total = spectra.layout, spectra.runs.block.shape[1]
    step = max(-(-layout.row_blocks // _PANELS), 1)
    extra = total - layout.key_blocks
    for start in range(0, layout.row_blocks, step):
        stop = min(start + step, layout.row_blocks)
        seen = layout.key_blocks
        if layout.is_causal:
            past = stop * layout.block + layout.query_offset
            seen = min(max(-(-past // layout.block), 0), layout.key_blocks)
        yield start, stop, seen + extra if seen else 0


def _pair_norm(spectra: _Spectra) -> Tensor:
    norm = torch.gather(spectra.kernel_norm.flatten(1), 1, spectra.pair_index.flatten(1))
    return norm.view(spectra.pair_index.shape) * spectra.weight_norm.unsqueeze(1)


def _hidden(problem: Problem, spectra: _Spectra) -> Tensor:
    """(R or 1, A, B): rows without a finite log-weight; counted where it was not given."""
    layout, size = spectra.layout, spectra.layout.block
    if problem.hidden is not None:
        tail = layout.row_blocks * size - problem.n_q
        return F.pad(problem.hidden, (0, tail)).view(-1, layout.row_blocks, size)
    counts = (spectra.kernel > 0).to(spectra.kernel.dtype)
    live = (spectra.weight > 0).to(spectra.kernel.dtype)
    count_hat = torch.fft.rfft(counts).flatten(1, 2).transpose(1, 2).contiguous()
    live_hat = torch.fft.rfft(live, n=2 * size).transpose(1, 2).unsqueeze(-1).contiguous()
    bare = spectra._replace(kernel_hat=count_hat)
    factor = (spectra.log_pair > _NEG_INF).to(spectra.kernel.dtype)
    parts = []
    for start, stop, runs in _panels(spectra):
        mixed = _mix(bare, factor, start, stop, runs) @ live_hat[:, :, :runs]
        parts.append(torch.fft.irfft(mixed, n=2 * size, dim=1)[:, size:, :, 0])
    return torch.cat(parts, 2).transpose(1, 2) < 0.5


def _join_runs(spectra: _Spectra, parts: Tensor) -> Tensor:
    """(R, U, B, C), zero outside of each run, to (R, key blocks * B, C); no atomics."""
    layout = spectra.layout
    rows, _, size, channels = parts.shape
    if parts.shape[1] == layout.key_blocks:
        return parts.reshape(rows, -1, channels)
    keys = torch.arange(layout.key_blocks * size, device=parts.device).expand(rows, -1)
    run = torch.searchsorted(spectra.runs.start, keys.contiguous(), right=True) - 1
    flat = parts.reshape(rows, -1, channels)
    index = run * size + keys % size
    return torch.gather(flat, 1, index.unsqueeze(-1).expand(-1, -1, channels))


def _kernel_gradient(problem: Problem, spectra: _Spectra, pair: Tensor) -> Tensor:
    """(R, G, L) of (R, F, A, U): shear to pieces, sum over the runs of a group, transform back."""
    layout, size = spectra.layout, spectra.layout.block
    rows, frequencies, a_count, _ = pair.shape
    groups = problem.log_kernel.shape[1]
    pieces = torch.arange(layout.pieces, device=pair.device) + layout.first_piece
    a = pieces[:, None] + spectra.runs.block.unsqueeze(1)  # (R, D, U)
    known = (a >= 0) & (a < a_count)
    index = a.clamp(0, a_count - 1).unsqueeze(1).expand(-1, frequencies, -1, -1)
    sheared = torch.gather(pair, 2, index) * known.unsqueeze(1)
    member = F.one_hot(spectra.runs.group, groups).to(pair.dtype)  # (R, U, G)
    summed = sheared @ member.unsqueeze(1)  # (R, F, D, G)
    frames = torch.fft.irfft(summed, n=2 * size, dim=1).permute(0, 3, 2, 1) * spectra.kernel
    wide = F.pad(frames[..., :size], (0, 0, 0, 1)) + F.pad(frames[..., size:], (0, 0, 1, 0))
    wide = wide.reshape(rows, groups, -1)  # lags from the first of the first piece on
    start, stop = (lag + layout.zero for lag in _lag_range(layout))
    length = problem.log_kernel.shape[-1]
    inside = wide[..., max(-start, 0) : max(min(stop, length) - start, 0)]
    first = min(max(start, 0), length)
    return F.pad(inside, (first, length - first - inside.shape[-1]))


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Complex products in full float32: a denominator does not survive TF32."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
