"""Early stop over ranks: within its bound, with the gradients of what was computed."""

from __future__ import annotations

import math

import torch
from context_checks import inputs, leaves, sum_over_ranks

from longspan import StickBreakingConfig, stick_breaking_attention_with_remainder
from longspan.distributed import SequenceLayout, chain, ring_attention_with_remainder


def stop_inputs(length):
    """Gates near one half, so that sticks last a few dozen keys."""
    q, k, v, up = inputs(length, seed=5)
    return 0.3 * q, 0.3 * k, v, up


def check_early_stop(group, kind, share=1e-3, rows=256, recompute=True):
    """rows: height of the blocks that a tile is cut at where its later rows are spent."""
    before, chain._ROWS = chain._ROWS, rows
    try:
        _check_early_stop(group, kind, share, recompute)
    finally:
        chain._ROWS = before


def _check_early_stop(group, kind, share, recompute):
    length = 24 * group.size
    layout = SequenceLayout(length=length, ranks=group.size, kind=kind)
    q, k, v, up = stop_inputs(length)
    config = StickBreakingConfig(early_stop=share)
    full = stick_breaking_attention_with_remainder(q, k, v, enable_gqa=True)
    mine_in = leaves(*(layout.split(t, group.rank, 2) for t in (q, k, v)))

    def run(*tensors):
        return ring_attention_with_remainder(
            *tensors, config, group=group, layout=layout, enable_gqa=True, recompute=recompute
        )

    part = run(*mine_in)
    error = (part.output - layout.split(full.output, group.rank, 2)).abs().amax()
    assert error <= share * v.abs().amax()
    if kind == "contiguous" and group.size > 2 and group.rank == group.size - 1:
        assert error > 0  # something was left out ...
        assert part.output.grad_fn.num_steps < layout.num_chunks  # ... and not even sent
    rest = layout.split(full.log_rest, group.rank, 2)
    near = rest > math.log(share)
    torch.testing.assert_close(part.log_rest[near], rest[near])
    # gradients along a random direction equal finite differences of the function that ran
    share_up = layout.split(up, group.rank, 2)
    grads = torch.autograd.grad((part.output * share_up).sum() + 0.1 * part.log_rest.sum(), mine_in)
    generator = torch.Generator().manual_seed(7)
    whole_directions = [torch.randn(t.shape, generator=generator).double() for t in (q, k, v)]
    directions = [layout.split(d, group.rank, 2) for d in whole_directions]
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))

    def value(step):
        with torch.no_grad():
            moved = [t + step * d for t, d in zip(mine_in, directions, strict=True)]
            out = run(*moved)
            return (out.output * share_up).sum() + 0.1 * out.log_rest.sum()

    rise = (value(1e-6) - value(-1e-6)) / 2e-6
    torch.testing.assert_close(sum_over_ranks(slope), sum_over_ranks(rise), rtol=1e-6, atol=1e-7)


def check_early_stop_that_never_stops(group, kind):
    """With sticks that last, early stop changes nothing."""
    layout = SequenceLayout(length=20, ranks=group.size, kind=kind)
    q, k, v, _ = stop_inputs(20)
    mine = [layout.split(t, group.rank, 2) for t in (q, k, v)]
    call = {"group": group, "layout": layout, "enable_gqa": True}
    bias = torch.full((4,), -8.0).double()
    stopped = ring_attention_with_remainder(
        *mine, StickBreakingConfig(early_stop=1e-4), logit_bias=bias, **call
    )
    plain = ring_attention_with_remainder(*mine, StickBreakingConfig(), logit_bias=bias, **call)
    torch.testing.assert_close(stopped.output, plain.output, rtol=1e-12, atol=1e-12)


def check_batch_neighbours(group, kind):
    """A sequence's result does not depend on those beside it in the batch."""
    layout = SequenceLayout(length=24 * group.size, ranks=group.size, kind=kind)
    q, k, v, _ = stop_inputs(layout.length)
    config = StickBreakingConfig(early_stop=1e-2)
    call = {"group": group, "layout": layout, "enable_gqa": True}
    both = [layout.split(t, group.rank, 2) for t in (q, k, v)]
    alone = ring_attention_with_remainder(*(t[:1] for t in both), config, **call)
    both[0] = torch.cat([both[0][:1], 0 * both[0][1:]])  # gates of exactly one half
    both[1] = torch.cat([both[1][:1], 0 * both[1][1:]])
    beside = ring_attention_with_remainder(*both, config, **call)
    torch.testing.assert_close(beside.output[:1], alone.output, rtol=1e-12, atol=1e-12)
