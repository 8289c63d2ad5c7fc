"""Infini-attention: the forms agree, and what the paper's equations promise holds."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longspan import (
    ConfigError,
    InfiniConfig,
    ShapeError,
    UnsupportedError,
    exact_attention,
    infini_attention,
    infini_attention_varlen,
)
from longspan.infini.api import initial_gate, visited_fraction
from longspan.infini.config import LOCALS, UPDATES
from longspan.infini.features import elu_plus_one, features

F64 = torch.float64


def draw(*shape, grad=False):
    return torch.randn(*shape, dtype=F64, requires_grad=grad)


def rates(update, batch, heads, n):
    if update != "gated_delta":
        return {}
    shape = (batch, heads, n)
    return {"write_gate": torch.rand(shape, dtype=F64), "log_decay": -torch.rand(shape, dtype=F64)}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("local", LOCALS)
@pytest.mark.parametrize(("first", "feature_map"), [("local", "elu"), ("gated", "dpfp")])
def test_parallel_equals_the_loop(update, local, first, feature_map):
    config = InfiniConfig(
        segment_length=5, update=update, local=local, first_segment=first, feature_map=feature_map
    )
    k, v, gate = draw(2, 2, 23, 6), draw(2, 2, 23, 3), draw(4)
    settings = rates(update, 2, 2, 23)
    lengths = torch.tensor([23, 9], dtype=torch.int32)
    for (offset, n_q), key_lengths in itertools.product(
        ((0, 23), (3, 11), (20, 8), (-4, 20), (22, 1), (31, 2)), (None, lengths)
    ):
        q = draw(2, 4, n_q, 6)
        both = [
            infini_attention(
                q, k, v, gate=gate, enable_gqa=True, config=config, query_offset=offset,
                key_lengths=key_lengths, impl=impl, **settings,
            )
            for impl in ("eager", "reference")
        ]  # fmt: skip
        for name in ("memory", "normaliser", "written"):
            a, b = (getattr(result.final_state, name) for result in both)
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(both[0].output, both[1].output, rtol=1e-10, atol=1e-10)


def by_hand(q, k, v, gate, length):
    """Token by token, straight from the paper's text; one head."""
    outputs = torch.zeros_like(v)
    memory, z = torch.zeros(q.shape[1], v.shape[1], dtype=F64), torch.zeros(q.shape[1], dtype=F64)
    for start in range(0, q.shape[0], length):
        rows = range(start, min(start + length, q.shape[0]))
        for t in rows:
            scores = torch.stack([q[t] @ k[u] for u in range(start, t + 1)]) * q.shape[1] ** -0.5
            local = scores.softmax(0) @ v[start : t + 1]
            s = torch.where(q[t] > 0, q[t] + 1, q[t].exp())
            g = torch.sigmoid(gate)
            outputs[t] = g * (s @ memory) / (s @ z) + (1 - g) * local if start else local
        for t in rows:
            s = torch.where(k[t] > 0, k[t] + 1, k[t].exp())
            memory, z = memory + torch.outer(s, v[t]), z + s
    return outputs


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_equals_the_equations_written_by_hand(impl):
    q, k, v, gate = draw(1, 1, 17, 4), draw(1, 1, 17, 4), draw(1, 1, 17, 3), draw(1)
    got = infini_attention(q, k, v, gate=gate, config=InfiniConfig(segment_length=4), impl=impl)
    want = by_hand(q[0, 0], k[0, 0], v[0, 0], gate[0], 4)
    torch.testing.assert_close(got.output[0, 0], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("local", LOCALS)
def test_a_token_changes_the_future_only(update, local):
    config = InfiniConfig(segment_length=4, update=update, local=local)
    q, k, v = draw(1, 2, 22, 4), draw(1, 2, 22, 4), draw(1, 2, 22, 4)
    before = infini_attention(q, k, v, config=config).output
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 6] += 1.0
    v2[:, :, 6] -= 2.0
    after = infini_attention(q, k2, v2, config=config).output
    changed = (after != before).flatten(0, 1).any(-1).any(0)
    assert not changed[:6].any()
    assert changed[6:].all()
    # later segments are reached through the memory only: a shut gate keeps them as they were
    shut = {"gate": torch.full((2,), -1e9), "config": config}
    changed = (
        (infini_attention(q, k2, v2, **shut).output != infini_attention(q, k, v, **shut).output)
        .flatten(0, 1).any(-1).any(0)
    )  # fmt: skip
    reach = 8 if local == "segment" else 12
    assert changed[6:8].all()
    assert not changed[reach:].any()


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_gradcheck(update, impl):
    config = InfiniConfig(segment_length=3, update=update)
    q, k, v = draw(1, 2, 8, 2, grad=True), draw(1, 1, 8, 2, grad=True), draw(1, 1, 8, 2, grad=True)
    mq, mk = draw(1, 2, 8, 2, grad=True), draw(1, 1, 8, 2, grad=True)
    gate = draw(2, grad=True)
    memory = draw(1, 1, 2, 2, grad=True)
    z = (torch.rand(1, 1, 2, dtype=F64) + 0.5).requires_grad_()
    extra = [t.requires_grad_() for t in rates(update, 1, 1, 8).values()]
    empty = infini_attention(q[:, :, :0], k[:, :, :0], v[:, :, :0], enable_gqa=True, config=config)
    start = empty.final_state.detach()._replace(written=torch.tensor([3]), seen=3)

    def call(q, k, v, mq, mk, gate, memory, z, *extra):
        named = dict(zip(("write_gate", "log_decay"), extra, strict=False))
        out, final = infini_attention(
            q, k, v, gate=gate, memory_query=mq, memory_key=mk, enable_gqa=True, config=config,
            initial_state=start._replace(memory=memory, normaliser=z), impl=impl, **named,
        )  # fmt: skip
        return out, final.memory, final.normaliser

    inputs = (q, k, v, mq, mk, gate, memory, z, *extra)
    if update == "delta_corrected":  # its factor is detached on purpose: not a true derivative
        out = call(*inputs)[0]
        grads = torch.autograd.grad(out.sum(), inputs)
        assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads)
    else:
        assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("update", UPDATES)
def test_gradients_reach_the_first_segment(update):
    q, k, v = (
        draw(1, 1, 20, 4, grad=True),
        draw(1, 1, 20, 4, grad=True),
        draw(1, 1, 20, 4, grad=True),
    )
    out = infini_attention(q, k, v, config=InfiniConfig(segment_length=4, update=update)).output
    dk, dv = torch.autograd.grad(out[:, :, 16:].sum(), (k, v))
    assert (dk[:, :, :4].abs().sum(-1) > 0).all()
    assert (dv[:, :, :4].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("update", ["linear", "delta", "delta_corrected"])
def test_repeated_bindings(update):
    """The same keys and values in every segment: linear and corrected read 1, delta reads 1/2."""
    k = draw(1, 1, 1, 8).expand(1, 1, 32, 8)
    v = draw(1, 1, 1, 5).expand(1, 1, 32, 5)
    config = InfiniConfig(segment_length=4, update=update)
    out = infini_attention(k, k, v, gate=torch.tensor([60.0], dtype=F64), config=config).output
    share = 0.5 if update == "delta" else 1.0
    torch.testing.assert_close(out[:, :, 4:8], v[:, :, 4:8])
    torch.testing.assert_close(out[:, :, 8:], share * v[:, :, 8:])


@pytest.mark.parametrize(
    ("update", "old", "new"),
    [
        ("linear", 0.5, 0.5),
        ("delta", 0.122, 0.378),
        ("delta_corrected", 0.0, 1.0),
        ("gated_delta", 0.0, 1.0),
    ],
)
def test_a_value_that_changed_long_ago(update, old, new):
    """One key, its value changed after 20 segments, read 20 segments later."""
    k = draw(1, 1, 1, 32).expand(1, 1, 164, 32)
    v = torch.zeros(1, 1, 164, 2, dtype=F64)
    v[:, :, :80, 0], v[:, :, 80:, 1] = 1.0, 1.0
    config = InfiniConfig(segment_length=4, update=update)
    out = infini_attention(k, k, v, gate=torch.tensor([60.0], dtype=F64), config=config).output
    assert out[0, 0, -1].tolist() == pytest.approx([old, new], abs=5e-4)


def test_delta_removes_what_it_finds():
    """P_s z_{s-1} is what z grows by: the delta rule applied to the values 1 leaves them at 1."""
    k = draw(1, 1, 12, 6)
    ones = torch.ones(1, 1, 12, 1, dtype=F64)
    state = infini_attention(
        k, k, ones, config=InfiniConfig(segment_length=6, update="delta")
    ).final_state
    # M after the first segment is z_1; the second segment then adds dz (1 - 1) = 0
    z_first = features(k[:, :, :6], InfiniConfig()).sum(2)
    torch.testing.assert_close(state.memory[..., 0], z_first)


def test_linear_reads_are_averages_of_values():
    q, k, v = 4 * draw(1, 2, 40, 8), 4 * draw(1, 2, 40, 8), draw(1, 2, 40, 3)
    out = infini_attention(
        q, k, v, gate=torch.full((2,), 60.0, dtype=F64), config=InfiniConfig(segment_length=8)
    ).output
    for start in range(8, 40, 8):
        past = v[:, :, :start]
        low, high = past.amin(2, keepdim=True) - 1e-12, past.amax(2, keepdim=True) + 1e-12
        rows = out[:, :, start : start + 8]
        assert ((rows >= low) & (rows <= high)).all()


def test_grouped_heads_equal_repeated_heads():
    q, k, v, gate = draw(2, 6, 20, 4), draw(2, 2, 20, 4), draw(2, 2, 20, 4), draw(6)
    config = InfiniConfig(segment_length=6, update="delta")
    grouped = infini_attention(q, k, v, gate=gate, enable_gqa=True, config=config).output
    k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    torch.testing.assert_close(grouped, infini_attention(q, k, v, gate=gate, config=config).output)


@pytest.mark.parametrize("update", ["linear", "delta", "delta_corrected"])
def test_packed_documents_do_not_leak(update):
    lengths = [7, 0, 13, 1, 9]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v, mq, mk = (draw(30, 2, 4) for _ in range(5))
    config = InfiniConfig(segment_length=4, update=update)

    def packed(k, v):
        return infini_attention_varlen(
            q, k, v, cu, cu, 13, 13, memory_query=mq, memory_key=mk, config=config
        )

    whole = packed(k, v)
    for start, end in itertools.pairwise(cu.tolist()):
        one = [t[start:end].transpose(0, 1)[None] for t in (q, k, v, mq, mk)]
        alone = infini_attention(*one[:3], memory_query=one[3], memory_key=one[4], config=config)
        torch.testing.assert_close(whole[start:end], alone.output[0].transpose(0, 1))
    k[:7], v[:7] = float("nan"), 1e9
    assert torch.equal(packed(k, v)[7:], whole[7:])


@pytest.mark.parametrize("update", ["linear", "delta", "delta_corrected"])
def test_gradients_stay_inside_a_packed_document(update):
    cu = torch.tensor([0, 9, 20], dtype=torch.int32)
    q, k, v = (draw(20, 2, 4, grad=True) for _ in range(3))
    config = InfiniConfig(segment_length=4, update=update)
    out = infini_attention_varlen(q, k, v, cu, cu, 11, 11, config=config)
    for grad in torch.autograd.grad(out[9:].square().sum(), (q, k, v)):
        assert (grad[:9] == 0).all()
        assert (grad[10:17].abs().sum((1, 2)) > 0).all()  # row 9 sees itself alone


@pytest.mark.parametrize("update", UPDATES)
def test_work_is_linear_in_the_length(update):
    """Floating-point operations forward and backward: twice the segments, twice the work."""
    config = InfiniConfig(segment_length=16, update=update)
    spent = []
    for n in (256, 512, 1024):
        q, k, v = (draw(1, 2, n, 8, grad=True) for _ in range(3))
        # torch's plain attention: the counter does not see into the fused one of a CPU
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            out = infini_attention(q, k, v, config=config, impl="eager", **rates(update, 1, 2, n))
            out.output.sum().backward()
        spent.append(counter.get_total_flops())
    first, second = spent[1] - spent[0], spent[2] - spent[1]
    assert first > 0.5 * spent[0]
    assert second == pytest.approx(2 * first, rel=0.02)


@pytest.mark.parametrize("update", UPDATES)
def test_padding_equals_no_padding(update):
    q, k, v = draw(2, 2, 20, 4), draw(2, 2, 20, 4), draw(2, 2, 20, 4)
    k[1, :, 11:], v[1, :, 11:] = float("nan"), float("inf")
    config = InfiniConfig(segment_length=4, update=update)
    settings = rates(update, 2, 2, 20)
    lengths = torch.tensor([20, 11], dtype=torch.int32)
    padded = infini_attention(q, k, v, config=config, key_lengths=lengths, **settings)
    short = {name: t[1:, :, :11] for name, t in settings.items()}
    alone = infini_attention(q[1:, :, :11], k[1:, :, :11], v[1:, :, :11], config=config, **short)
    torch.testing.assert_close(padded.output[1:, :, :11], alone.output)
    assert padded.final_state.written.tolist() == [20, 11]
    assert torch.isfinite(padded.final_state.memory).all()


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("first", ["local", "gated"])
def test_all_padding(impl, first):
    q = torch.randn(2, 2, 12, 4, requires_grad=True)
    k, v = torch.full((2, 2, 12, 4), float("nan")), torch.full((2, 2, 12, 4), float("nan"))
    k[0], v[0] = 1.0, 1.0
    config = InfiniConfig(segment_length=4, first_segment=first)
    lengths = torch.tensor([12, 0], dtype=torch.int32)
    result = infini_attention(q, k, v, config=config, key_lengths=lengths, impl=impl)
    assert (result.output[1] == 0).all()
    assert (result.final_state.memory[1] == 0).all()
    result.output.sum().backward()
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("x", [-18.0, -12.0, -8.0, -1.0, 0.0, 2.0])
def test_feature_map_keeps_small_values(dtype, x):
    exact = torch.tensor(x, dtype=F64).exp() if x <= 0 else torch.tensor(x + 1, dtype=F64)
    got = features(torch.tensor(x, dtype=dtype), InfiniConfig())
    assert got.dtype is torch.float32
    assert abs(float(got) / float(exact) - 1) < 1e-6
    if x == -18.0:
        assert torch.nn.functional.elu(torch.tensor(x)) + 1 == 0  # what this avoids


def test_feature_map_has_a_derivative_everywhere():
    x = torch.tensor([-300.0, -20.0, -1e-9, 0.0, 1e-9, 50.0], dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(elu_plus_one(x).sum(), x)
    torch.testing.assert_close(slope, torch.where(x > 0, 1.0, x.exp()).detach())


@pytest.mark.parametrize("local", LOCALS)
@pytest.mark.parametrize("update", UPDATES)
def test_a_segment_longer_than_the_input_is_exact_attention(local, update):
    q, k, v = draw(2, 2, 15, 4), draw(2, 2, 15, 4), draw(2, 2, 15, 4)
    config = InfiniConfig(segment_length=15, local=local, update=update)
    gate = torch.full((2,), 5.0, dtype=F64)
    out = infini_attention(q, k, v, gate=gate, config=config).output
    assert torch.equal(out, exact_attention(q, k, v, is_causal=True))
    other = InfiniConfig(segment_length=15, local=local, update=update, first_segment="gated")
    gated = infini_attention(q, k, v, gate=gate, config=other).output
    torch.testing.assert_close(gated, (1 - torch.sigmoid(gate))[:, None, None] * out)


def test_positions_reach_the_local_part_only():
    """Rotating query and key leaves the memory as it was; rotating per segment changes nothing."""
    from longspan.models.positions import make_rotation, rotate

    q, k, v = draw(1, 2, 24, 8), draw(1, 2, 24, 8), draw(1, 2, 24, 8)
    config = InfiniConfig(segment_length=6)

    def rotated(tensor, positions):
        return rotate(tensor, make_rotation(positions, 8, 10000.0)).double()

    absolute, reset = torch.arange(24), torch.arange(24) % 6
    runs = [
        infini_attention(
            rotated(q, p), rotated(k, p), v, memory_query=q, memory_key=k, config=config
        )
        for p in (absolute, reset)
    ]
    torch.testing.assert_close(runs[0].output, runs[1].output, rtol=1e-5, atol=1e-5)
    plain = infini_attention(q, k, v, config=config)
    assert torch.equal(runs[0].final_state.memory, plain.final_state.memory)
    assert not torch.allclose(runs[0].output, plain.output)


def test_low_precision_inputs_keep_a_wide_memory():
    """2000 equal keys: a bfloat16 sum would stall at 256."""
    k = torch.zeros(1, 1, 2000, 4, dtype=torch.bfloat16)
    state = infini_attention(k, k, k + 1, config=InfiniConfig(segment_length=10)).final_state
    assert state.memory.dtype is torch.float32
    torch.testing.assert_close(state.normaliser, torch.full((1, 1, 4), 2000.0))
    torch.testing.assert_close(state.memory, torch.full((1, 1, 4, 4), 2000.0))


def test_gated_delta_forgets_as_it_is_told():
    """log_decay = -inf-like in the last token leaves only that token's write."""
    k, v = draw(1, 1, 8, 4), draw(1, 1, 8, 3)
    decay = torch.zeros(1, 1, 8, dtype=F64)
    decay[..., -1] = -60.0
    state = infini_attention(
        k, k, v, config=InfiniConfig(segment_length=8, update="gated_delta"), log_decay=decay
    ).final_state
    last = torch.nn.functional.normalize(k[0, 0, -1], dim=0)
    torch.testing.assert_close(state.memory[0, 0], torch.outer(last, v[0, 0, -1]))


@pytest.mark.parametrize("update", UPDATES)
def test_compiles_as_one_graph(update):
    q = torch.randn(1, 2, 20, 4, requires_grad=True)
    gate = torch.randn(2, requires_grad=True)
    config = InfiniConfig(segment_length=6, update=update)

    def call(q, gate):
        return infini_attention(q, q, q, gate=gate, config=config)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(q, gate)
    plain = call(q, gate)
    torch.testing.assert_close(compiled.output, plain.output)
    torch.testing.assert_close(compiled.final_state.memory, plain.final_state.memory)
    for a, b in zip(torch.autograd.grad(compiled.output.sum(), (q, gate)),
                    torch.autograd.grad(plain.output.sum(), (q, gate)), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_autocast():
    q, mq = torch.randn(1, 2, 12, 4), torch.randn(1, 2, 12, 4)
    config = InfiniConfig(segment_length=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = infini_attention(q, q, q, memory_query=mq, memory_key=mq, config=config)
    assert result.output.dtype is torch.bfloat16
    assert result.final_state.memory.dtype is torch.float32
    low = [t.bfloat16() for t in (q, mq)]
    want = infini_attention(
        low[0], low[0], low[0], memory_query=low[1], memory_key=low[1], config=config
    )
    assert torch.equal(result.output, want.output)


def test_visited_fraction_counts_local_scores():
    config = InfiniConfig(segment_length=4)
    assert visited_fraction(config, 8, 8, is_causal=True) == 20 / 36
    assert visited_fraction(InfiniConfig(segment_length=4, local="sliding"), 12, 12,
                            is_causal=True) == (10 + 26 + 26) / 78  # fmt: skip
    assert visited_fraction(config, 1, 9, is_causal=True, query_offset=8) == 1 / 9
    assert visited_fraction(config, 0, 0, is_causal=True) == 1.0


def test_refusals():
    q, k = torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 4)
    with pytest.raises(ConfigError, match="update is 'delt'. Did you mean 'delta'"):
        InfiniConfig(update="delt")
    with pytest.raises(ConfigError, match="segment_length is 0"):
        InfiniConfig(segment_length=0)
    with pytest.raises(ShapeError, match=r"gate is \(3,\); it must be a tensor of shape \(2,\)"):
        infini_attention(q, k, k, gate=torch.zeros(3))
    with pytest.raises(ShapeError, match="memory_key is .* shape of key"):
        infini_attention(q, k, k, memory_key=k[:, :, :5])
    with pytest.raises(ShapeError, match="memory_query is torch.float64"):
        infini_attention(q, k, k, memory_query=q.double())
    with pytest.raises(UnsupportedError, match="write_gate was given but config.update"):
        infini_attention(q, k, k, write_gate=torch.ones(1, 2, 8))
    with pytest.raises(UnsupportedError, match="causal by definition"):
        infini_attention(q, k, k, is_causal=False)
    with pytest.raises(ConfigError, match="initial_gate: start is 'spred'"):
        initial_gate(4, "spred")
    assert initial_gate(5).tolist() == [-3.0, -1.5, 0.0, 1.5, 3.0]
