"""The Infini-attention layer: streams, truncated gradients, checkpointing, gates."""

from __future__ import annotations

import pytest
import torch

from longspan import ConfigError, InfiniConfig, UnsupportedError
from longspan.infini.config import LOCALS, UPDATES
from longspan.nn import InfiniAttention, gate_parameter_groups, gate_statistics


def layer(config=None, **options):
    torch.manual_seed(3)
    config = config or InfiniConfig(segment_length=4)
    return InfiniAttention(16, 4, 2, config=config, dtype=torch.float64, **options)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("local", LOCALS)
def test_chunks_equal_the_whole(update, local):
    made = layer(InfiniConfig(segment_length=4, update=update, local=local))
    hidden = torch.randn(2, 19, 16, dtype=torch.float64)
    whole, state, pieces = made(hidden), None, []
    for part in hidden.split([1, 6, 3, 9], 1):
        piece, state = made.chunk(part, state)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-6, atol=1e-7)
    assert state.seen == 19


def test_far_positions_are_as_good_as_near_ones():
    """A million tokens on, local attention is what it was at the start."""
    hidden = torch.randn(1, 8, 16, dtype=torch.float64)
    for local in LOCALS:
        made = layer(InfiniConfig(segment_length=4, local=local), gate_start=-1e9)
        start = made.chunk(hidden[:, :0]).final_state
        far = start._replace(seen=4_000_000)
        a, b = made.chunk(hidden, start).output, made.chunk(hidden, far).output
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("update", UPDATES)
def test_checkpointing_changes_nothing(update):
    config = InfiniConfig(segment_length=4, update=update)
    hidden = torch.randn(1, 18, 16, dtype=torch.float64)
    grads = []
    for options in ({}, {"checkpoint_segments": 1}, {"checkpoint_segments": 2}):
        made = layer(config, **options)
        out = made(hidden)
        grads.append((out, *torch.autograd.grad(out.square().sum(), list(made.parameters()))))
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # the gate is float32


@pytest.mark.parametrize("checkpoint_segments", [None, 1])
def test_truncation_stops_gradients_at_blocks(checkpoint_segments):
    hidden = torch.randn(1, 24, 16, dtype=torch.float64, requires_grad=True)
    made = layer(bptt_segments=2, checkpoint_segments=checkpoint_segments)
    out = made(hidden)
    torch.testing.assert_close(out, layer()(hidden), rtol=1e-8, atol=1e-8)
    (grad,) = torch.autograd.grad(out[:, 20:].sum(), hidden)  # segment 5, block of 4 and 5
    reached = grad[0].abs().sum(-1) > 0
    assert not reached[:16].any()
    assert reached[16:].all()
    (full,) = torch.autograd.grad(layer()(hidden)[:, 20:].sum(), hidden)
    assert (full[0].abs().sum(-1) > 0).all()


def test_gates_have_a_group_of_their_own():
    model = torch.nn.Sequential(layer(), torch.nn.Linear(16, 16), layer(gate_start="zero"))
    weights, gates = gate_parameter_groups(model, lr=1e-3, gate_lr=1e-2, weight_decay=0.1)
    assert gates["lr"] == 1e-2
    assert gates["weight_decay"] == 0.0
    assert [g.shape for g in gates["params"]] == [(4,), (4,)]
    assert len(weights["params"]) + 2 == len(list(model.parameters()))
    statistics = gate_statistics(model)
    assert list(statistics) == ["0.gate", "2.gate"]
    assert statistics["2.gate"] == {"mean": 0.5, "min": 0.5, "max": 0.5, "local": 0, "memory": 0}
    assert statistics["0.gate"]["local"] == statistics["0.gate"]["memory"] == 0.25
    optimizer = torch.optim.AdamW([weights, gates])
    before = [g.clone() for g in gates["params"]]
    hidden = torch.randn(1, 20, 16, dtype=torch.float64)
    out = model[2](model[0](hidden))
    out.square().sum().backward()
    optimizer.step()
    for old, new in zip(before, gates["params"], strict=True):
        moved = (new - old).abs()
        assert (moved > 5e-3).all()
        assert (moved < 2e-2).all()
    with pytest.raises(ConfigError, match="Linear holds no gate"):
        gate_parameter_groups(torch.nn.Linear(2, 2), lr=1.0, gate_lr=1.0)


def test_gates_stay_float32_in_a_low_precision_layer():
    made = InfiniAttention(16, 2, config=InfiniConfig(segment_length=4), dtype=torch.bfloat16)
    assert made.gate.dtype is torch.float32
    assert made(torch.randn(1, 9, 16, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_layer_refusals():
    with pytest.raises(ConfigError, match="kv_heads is 3"):
        InfiniAttention(16, 4, 3)
    with pytest.raises(ConfigError, match="head_dim is 3; rotary"):
        InfiniAttention(12, 4)
    with pytest.raises(ConfigError, match="bptt_segments is 0"):
        layer(bptt_segments=0)
    with pytest.raises(ConfigError, match="no multiple of checkpoint_segments = 2"):
        layer(bptt_segments=3, checkpoint_segments=2)
    with pytest.raises(UnsupportedError, match="key_lengths was given with bptt_segments"):
        layer(bptt_segments=1)(
            torch.randn(1, 8, 16, dtype=torch.float64),
            key_lengths=torch.tensor([5], dtype=torch.int32),
        )
