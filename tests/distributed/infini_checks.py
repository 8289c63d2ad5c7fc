"""What each rank checks of Infini-attention by passing memories: output, states, gradients."""

from __future__ import annotations

import pytest
import torch
from context_checks import TOLERANCE, inputs, leaves, sum_over_ranks

from longspan import ConfigError, InfiniConfig, UnsupportedError, WindowConfig, infini_attention
from longspan.distributed import SequenceLayout, infini_attention_across_ranks

FIELDS = ("memory", "normaliser", "written", "key", "value", "memory_key", "write_gate",
          "log_decay")  # fmt: skip


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_state_passing(group, update, length=53, local="segment", first_segment="local",
                        lengths=None, positions=False, state=0, segment=6,
                        feature_map="elu"):  # fmt: skip
    """state: tokens of an earlier call whose state this one continues."""
    config = InfiniConfig(segment_length=segment, update=update, local=local,
                          first_segment=first_segment, feature_map=feature_map)  # fmt: skip
    layout = SequenceLayout(length=length, ranks=group.size, kind="contiguous", multiple=segment)
    q, k, v, up = inputs(length)
    gate = torch.tensor([-1.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    per_token = {}
    if positions:
        per_token |= {"memory_query": draw(2, 4, length, 8, seed=11),
                      "memory_key": draw(2, 2, length, 8, seed=12)}  # fmt: skip
    if update == "gated_delta":
        per_token |= {"write_gate": draw(2, 2, length, seed=13).sigmoid(),
                      "log_decay": -draw(2, 2, length, seed=14).abs()}  # fmt: skip
    names = list(per_token)
    start = start_mine = None
    if state:
        front = inputs(state, seed=21)
        extra = {}
        if positions:
            extra = {"memory_query": draw(2, 4, state, 8, seed=22),
                     "memory_key": draw(2, 2, state, 8, seed=23)}  # fmt: skip
        start = infini_attention(*front[:3], enable_gqa=True, config=config, **extra).final_state
        start = start._replace(memory=start.memory.detach().requires_grad_())
        start_mine = start._replace(memory=start.memory.detach().clone().requires_grad_())
    key_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    common = {"enable_gqa": True, "config": config, "key_lengths": key_lengths}
    whole_in = leaves(q, k, v, *per_token.values())
    gate_whole, gate_mine = leaves(gate, gate)
    whole = infini_attention(
        *whole_in[:3], gate=gate_whole, initial_state=start,
        **dict(zip(names, whole_in[3:], strict=True)), **common,
    )  # fmt: skip
    mine_in = leaves(*(layout.split(t, group.rank, 2) for t in (q, k, v, *per_token.values())))
    mine = infini_attention_across_ranks(
        *mine_in[:3], gate=gate_mine, initial_state=start_mine, group=group, layout=layout,
        **dict(zip(names, mine_in[3:], strict=True)), **common,
    )  # fmt: skip
    torch.testing.assert_close(mine.output, layout.split(whole.output, group.rank, 2), **TOLERANCE)
    for name in FIELDS:
        want, got = getattr(whole.final_state, name), getattr(mine.final_state, name)
        assert (want is None) == (got is None), name
        if want is not None:
            torch.testing.assert_close(got, want, **TOLERANCE, msg=name)
    assert mine.final_state.seen == whole.final_state.seen
    assert mine.final_state.can_continue == whole.final_state.can_continue
    # gradients through the output on all ranks, and through the state on one
    ends = [n for n in FIELDS[:2] + FIELDS[3:5] if getattr(whole.final_state, n).requires_grad]
    ends_whole, ends_mine = ([getattr(s.final_state, n) for n in ends] for s in (whole, mine))
    weights = [draw(*end.shape, seed=31 + i) for i, end in enumerate(ends_whole)]
    loss_whole = (whole.output * up).sum()
    loss_whole = loss_whole + sum((w * e).sum() for w, e in zip(weights, ends_whole, strict=True))
    loss = (mine.output * layout.split(up, group.rank, 2)).sum()
    if group.rank == group.size - 1:
        loss = loss + sum((w * e).sum() for w, e in zip(weights, ends_mine, strict=True))
    shared = [(gate_whole, gate_mine)] + ([(start.memory, start_mine.memory)] if state else [])
    settings = {"allow_unused": True, "materialize_grads": True}
    wanted = torch.autograd.grad(loss_whole, [*whole_in, *(a for a, _ in shared)], **settings)
    got = torch.autograd.grad(loss, [*mine_in, *(b for _, b in shared)], **settings)
    for g, w in zip(got[: len(mine_in)], wanted[: len(mine_in)], strict=True):
        torch.testing.assert_close(g, layout.split(w, group.rank, 2), **TOLERANCE)
    for g, w in zip(got[len(mine_in) :], wanted[len(mine_in) :], strict=True):
        torch.testing.assert_close(sum_over_ranks(g), w, **TOLERANCE)


def check_chunks_of_ranks(group):
    """Two calls over ranks, the second with the state of the first, equal one process."""
    config = InfiniConfig(segment_length=4, local="sliding", update="delta")
    q, k, v, _ = inputs(40)
    whole = infini_attention(q, k, v, enable_gqa=True, config=config)
    state, outputs = None, []
    for first, stop in ((0, 24), (24, 40)):
        layout = SequenceLayout(
            length=stop - first, ranks=group.size, kind="contiguous", multiple=4
        )
        part = [layout.split(t[:, :, first:stop], group.rank, 2) for t in (q, k, v)]
        result = infini_attention_across_ranks(
            *part, group=group, layout=layout, enable_gqa=True, config=config, initial_state=state
        )
        state = result.final_state
        want = layout.split(whole.output[:, :, first:stop], group.rank, 2)
        torch.testing.assert_close(result.output, want, **TOLERANCE)
        outputs.append(result.output)
    torch.testing.assert_close(state.memory, whole.final_state.memory, **TOLERANCE)


def check_bytes(group):
    """What moves does not grow with the length."""
    import longspan.distributed.exchange as exchange

    config = InfiniConfig(segment_length=4)
    moved = []
    inner = exchange._all_to_all

    def counting(group, parts, shapes):
        moved.append(sum(part.numel() for part in parts))
        return inner(group, parts, shapes)

    totals = []
    for length in (32, 256):
        layout = SequenceLayout(length=length, ranks=group.size, kind="contiguous", multiple=4)
        part = [layout.split(t, group.rank, 2) for t in inputs(length)[:3]]
        exchange._all_to_all = counting
        try:
            infini_attention_across_ranks(*part, group=group, layout=layout, enable_gqa=True,
                                          config=config)  # fmt: skip
        finally:
            exchange._all_to_all = inner
        totals.append(sum(moved))
        moved.clear()
    assert totals[0] == totals[1] > 0


def check_refusals(group):
    q, k, v, _ = inputs(24)
    config = InfiniConfig(segment_length=4)

    def run(config=config, state=None, **fields):
        layout = SequenceLayout(**({"length": 24, "ranks": group.size, "kind": "contiguous",
                                    "multiple": 4} | fields))  # fmt: skip
        part = [layout.split(t, group.rank, 2) for t in (q, k, v)]
        return infini_attention_across_ranks(
            *part, group=group, layout=layout, enable_gqa=True, config=config, initial_state=state
        )

    with pytest.raises(ConfigError, match="segments have 4 tokens.*multiple=4"):
        run(multiple=6)
    with pytest.raises(UnsupportedError, match="must be 'contiguous'"):
        run(kind="zigzag")
    with pytest.raises(UnsupportedError, match="ulysses_attention_varlen"):
        run(cu_seqlens=(0, 8, 24))
    with pytest.raises(ConfigError, match="must be an InfiniConfig"):
        run(config=WindowConfig())
    amid = infini_attention(*(t[:, :, :5] for t in (q, k, v)), enable_gqa=True, config=config)
    with pytest.raises(ConfigError, match="has seen 5 tokens.*at the end of one"):
        run(state=amid.final_state)
    assert run().output.shape[1] == 4
