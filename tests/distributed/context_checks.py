"""What each rank of a group checks: its part of a spread-out call equals one process's."""

from __future__ import annotations

import itertools

import pytest
import torch

from longspan import (
    ExactConfig,
    InfiniConfig,
    StickBreakingConfig,
    UnsupportedError,
    WindowConfig,
    infini_attention,
)
from longspan.distributed import (
    SequenceLayout,
    attend_across_ranks,
    ring_attention_varlen,
    ring_attention_with_lse,
    ring_attention_with_remainder,
    ulysses_attention,
    ulysses_attention_varlen,
)
from longspan.mechanisms import get_mechanism, mechanism_of_config
from longspan.testing import assert_within_budget

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def inputs(length, *, batch=2, heads=4, kv_heads=2, dim=8, value_dim=6, seed=3, packed=False):
    """Whole query, key, value and an upstream gradient, float64, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads, dim):
        shape = (length, heads, dim) if packed else (batch, heads, length, dim)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return draw(heads, dim), draw(kv_heads, dim), draw(kv_heads, value_dim), draw(heads, value_dim)


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def sum_over_ranks(tensor):
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total


def compare(group, layout, whole, parts, upstreams, dim=2, shared=()):
    """Results and gradients of this rank against slices of the whole ones.

    whole, parts: (results, inputs) in corresponding order. shared: (whole leaf, leaf of this rank)
    whose gradients add up over ranks.
    """
    results, leaves_whole = whole
    mine, leaves_mine = parts
    for got, want in zip(mine, results, strict=True):
        torch.testing.assert_close(got, layout.split(want, group.rank, dim), **TOLERANCE)
    extra_whole, extra_mine = ([pair[i] for pair in shared] for i in (0, 1))
    settings = {"allow_unused": True, "materialize_grads": True}
    wanted = torch.autograd.grad(results, leaves_whole + extra_whole, upstreams, **settings)
    shares = [layout.split(up, group.rank, dim) for up in upstreams]
    got = torch.autograd.grad(mine, leaves_mine + extra_mine, shares, **settings)
    count = len(leaves_whole)
    for g, w in zip(got[:count], wanted[:count], strict=True):
        torch.testing.assert_close(g, layout.split(w, group.rank, dim), **TOLERANCE)
    for g, w in zip(got[count:], wanted[count:], strict=True):
        torch.testing.assert_close(sum_over_ranks(g), w, **TOLERANCE)


def check_ring(
    group,
    config,
    kind,
    length,
    is_causal=True,
    lengths=None,
    bias=False,
    kv_heads=2,
    recompute=True,
):
    """Dense ring attention: output, log, all gradients."""
    layout = SequenceLayout(length=length, ranks=group.size, kind=kind)
    q, k, v, up = inputs(length, kv_heads=kv_heads)
    up_log = torch.randn(up.shape[:3], generator=torch.Generator().manual_seed(9)).double()
    key_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    mechanism = mechanism_of_config(config)
    sticks = mechanism.merge == "stick_breaking"
    bias_whole, bias_mine = leaves(*[torch.tensor([0.5, -1.0, 0.0, 2.0]).double()] * 2)
    extra = {"logit_bias": bias_whole} if bias else {}
    if sticks:
        from longspan import stick_breaking_attention_with_remainder as one
    else:
        one = mechanism.function_with_lse
    common = {"is_causal": is_causal, "enable_gqa": True, "key_lengths": key_lengths}
    whole_in = leaves(q, k, v)
    whole = one(*whole_in, config=config, **common, **extra)
    mine_in = leaves(*(layout.split(t, group.rank, 2) for t in (q, k, v)))
    function = ring_attention_with_remainder if sticks else ring_attention_with_lse
    extra = {"logit_bias": bias_mine} if bias else {}
    extra |= {} if recompute else {"recompute": False}
    mine = function(*mine_in, config, group=group, layout=layout, **common, **extra)
    # rows without keys have an lse of -inf, whose gradient means nothing
    seen = torch.isfinite(whole[1])
    up_log = torch.where(seen, up_log, 0.0)
    shared = [(bias_whole, bias_mine)] if bias else []
    compare(group, layout, (list(whole), whole_in), (list(mine), mine_in), [up, up_log],
            shared=shared)  # fmt: skip


def check_ring_packed(group, config, kind, marks):
    layout = SequenceLayout(length=marks[-1], ranks=group.size, kind=kind, cu_seqlens=tuple(marks))
    q, k, v, up = inputs(marks[-1], packed=True)
    cu = torch.tensor(marks, dtype=torch.int32)
    longest = max(b - a for a, b in itertools.pairwise(marks))
    whole_in = leaves(q, k, v)
    mechanism = mechanism_of_config(config)
    whole = mechanism.function_varlen(*whole_in, cu, cu, longest, longest, is_causal=True,
                                      enable_gqa=True, config=config)  # fmt: skip
    mine_in = leaves(*(layout.split(t, group.rank, 0) for t in (q, k, v)))
    mine = ring_attention_varlen(*mine_in, config, group=group, layout=layout, is_causal=True,
                                 enable_gqa=True)  # fmt: skip
    compare(group, layout, ([whole], whole_in), ([mine], mine_in), [up], dim=0)


def settings_of(name, heads, kv_heads, dim):
    """The mechanism's own learnable tensors, off their starting values."""
    mechanism = get_mechanism(name)
    if not mechanism.has_parameters:
        return {}
    made = mechanism.initial_parameters(
        mechanism.config_class(), heads=heads, kv_heads=kv_heads, head_dim=dim
    )
    return {label: tensor.double() + 0.1 for label, tensor in made.items()}


def result_of(result):
    return result if isinstance(result, torch.Tensor) else result.output


def check_ulysses(group, name, kind, length, kv_heads, heads=4, lengths=None, settings=None,
                  config=None):  # fmt: skip
    layout = SequenceLayout(length=length, ranks=group.size, kind=kind)
    mechanism = get_mechanism(name)
    config = config or mechanism.config_class()
    q, k, v, up = inputs(length, heads=heads, kv_heads=kv_heads)
    own = settings_of(name, heads, kv_heads, 8) | (settings or {})
    learned = [label for label, value in own.items() if isinstance(value, torch.Tensor)]
    whole_own, mine_own = (dict(own, **dict(zip(learned, leaves(*(own[n] for n in learned)),
                                strict=True))) for _ in range(2))  # fmt: skip
    key_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    common = {"is_causal": True, "enable_gqa": True, "key_lengths": key_lengths}
    whole_in = leaves(q, k, v)
    whole = mechanism.function(*whole_in, config=config, **common, **whole_own)
    mine_in = leaves(*(layout.split(t, group.rank, 2) for t in (q, k, v)))
    mine = ulysses_attention(*mine_in, config, group=group, layout=layout, **common, **mine_own)
    shared = [(whole_own[n], mine_own[n]) for n in learned]
    compare(group, layout, ([result_of(whole)], whole_in), ([result_of(mine)], mine_in), [up],
            shared=shared)  # fmt: skip
    if not isinstance(whole, torch.Tensor):
        states = whole.final_state.memory.tensor_split(min(group.size, kv_heads), 1)
        share = states[group.rank * len(states) // group.size]
        torch.testing.assert_close(mine.final_state.memory, share, **TOLERANCE)


def check_ulysses_packed(group, name, kind, marks):
    layout = SequenceLayout(length=marks[-1], ranks=group.size, kind=kind, cu_seqlens=tuple(marks))
    mechanism = get_mechanism(name)
    config = mechanism.config_class()
    q, k, v, up = inputs(marks[-1], packed=True)
    own = settings_of(name, 4, 2, 8)
    cu = torch.tensor(marks, dtype=torch.int32)
    longest = max(b - a for a, b in itertools.pairwise(marks))
    whole_in = leaves(q, k, v)
    whole = mechanism.function_varlen(*whole_in, cu, cu, longest, longest, is_causal=True,
                                      enable_gqa=True, config=config, **own)  # fmt: skip
    mine_in = leaves(*(layout.split(t, group.rank, 0) for t in (q, k, v)))
    mine = ulysses_attention_varlen(*mine_in, config, group=group, layout=layout, is_causal=True,
                                    enable_gqa=True, **own)  # fmt: skip
    compare(group, layout, ([whole], whole_in), ([mine], mine_in), [up], dim=0)


def check_ulysses_infini(group, kv_heads):
    """A second call with the state of the first: each rank holds the state of its heads."""
    config = InfiniConfig(segment_length=5, update="delta")
    gate = torch.tensor([-1.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    whole_state = mine_state = None
    for length, seed in ((17, 3), (22, 4)):
        layout = SequenceLayout(length=length, ranks=group.size)
        tensors = inputs(length, kv_heads=kv_heads, seed=seed)[:3]
        tokens = inputs(length, kv_heads=kv_heads, seed=seed + 7)[:2]
        call = {"config": config, "gate": gate, "enable_gqa": True, "is_causal": True}
        whole_in = leaves(*tensors, *tokens)
        whole = infini_attention(*whole_in[:3], memory_query=whole_in[3], memory_key=whole_in[4],
                                 initial_state=whole_state, **call)  # fmt: skip
        mine_in = leaves(*(layout.split(t, group.rank, 2) for t in (*tensors, *tokens)))
        mine = ulysses_attention(
            *mine_in[:3], call["config"], group=group, layout=layout, is_causal=True,
            enable_gqa=True, gate=gate, memory_query=mine_in[3], memory_key=mine_in[4],
            initial_state=mine_state,
        )  # fmt: skip
        up = inputs(length, seed=9)[3]
        compare(group, layout, ([whole.output], whole_in), ([mine.output], mine_in), [up])
        whole_state, mine_state = whole.final_state.detach(), mine.final_state.detach()
        parts = whole_state.memory.tensor_split(min(group.size, kv_heads), 1)
        share = parts[group.rank * len(parts) // group.size]
        torch.testing.assert_close(mine_state.memory, share, **TOLERANCE)


def check_head_offset(group):
    """A function that draws per head is told which heads it has, or refused."""
    from longspan.distributed.ulysses import _extra

    def drawing(query, key, value, *, seed=0, head_offset=0):
        raise NotImplementedError

    def careless(query, key, value, *, seed=0):
        raise NotImplementedError

    assert _extra("f", drawing, group, 8) == {"head_offset": 8 // group.size * group.rank}
    with pytest.raises(UnsupportedError, match="careless draws random numbers"):
        _extra("f", careless, group, 8)


def check_low_precision(group, dtype):
    """Ranks err about as little as one process does in bfloat16; the same bits come again."""
    layout = SequenceLayout(length=70, ranks=group.size)
    contiguous = SequenceLayout(length=70, ranks=group.size, kind="contiguous", multiple=16)
    infini = InfiniConfig(segment_length=16)
    cases = (
        ("exact", ExactConfig(), layout, "ring"),
        ("window", WindowConfig(window=9, num_sinks=2), layout, "ring"),
        ("stick_breaking", StickBreakingConfig(), layout, "ring"),
        ("window", WindowConfig(window=9, num_sinks=2), layout, "ulysses"),
        ("infini", infini, contiguous, "state_passing"),
    )
    q, k, v, up = inputs(70)
    low = [t.to(dtype) for t in (q, k, v)]
    for name, config, where, scheme in cases:
        function = get_mechanism(name).function
        call = {"is_causal": True, "enable_gqa": True, "config": config}
        oracle = result_of(function(*(t.double() for t in low), **call))
        one = result_of(function(*low, **call))
        bits = []
        for _ in range(2):
            mine = leaves(*(where.split(t, group.rank, 2) for t in low))
            out = attend_across_ranks(scheme, *mine, config, group=group, layout=where)
            share = where.split(up.to(dtype), group.rank, 2)
            bits.append((out, *torch.autograd.grad(out, mine, share)))
        assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True)), name
        want, plain = (where.split(t, group.rank, 2) for t in (oracle, one))
        assert out.dtype is dtype
        assert_within_budget(out, want, plain, label=name)
