"""Several requests in one batch: each is what it is alone, whoever sits beside it."""

from __future__ import annotations

import pytest
import torch
from test_infini_state import make, stream

from longspan import ConfigError, InfiniConfig, InfiniState, UnsupportedError
from longspan.infini.config import UPDATES

LENGTH = 4


def part(tensors, rows, start=0, stop=None):
    return {name: t[rows, :, start:stop] for name, t in tensors.items()}


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("first", ["local", "gated"])
def test_a_request_begins_where_another_ended(update, first):
    """Row 0 reads 20 tokens; row 1 ends after 8, and another request begins in its place."""
    config = InfiniConfig(segment_length=LENGTH, update=update, first_segment=first)
    old, new = make(20, update=update), make(21, update=update)
    beginning, state = stream(part(old, [0, 1], 0, 8), [8], config=config)
    assert state.at_boundary
    state = state.reset(torch.tensor([1]))
    mixed = {n: torch.cat((old[n][:1, :, 8:20], new[n][1:, :, :12])) for n in old}
    output, after = stream(mixed, [5, 1, 6], state, config=config)
    alone, _ = stream(part(old, [0]), [20], config=config)
    close(torch.cat((beginning[:1], output[:1]), 2), alone)
    fresh, end = stream(part(new, [1], 0, 12), [12], config=config)
    close(output[1:], fresh)
    close(after.memory[1:], end.memory)
    assert after.written.tolist() == [20, 12]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("own", [True, False])
def test_states_of_one_fill_go_together_and_apart(update, own):
    config = InfiniConfig(segment_length=LENGTH, update=update)
    tensors = make(30, update=update, own=own)
    _, young = stream(part(tensors, [0], 0, 6), [6], config=config)
    _, old = stream(part(tensors, [1], 0, 14), [14], config=config)
    both = InfiniState.cat([young, old])
    rest = {n: torch.cat((t[:1, :, 6:13], t[1:, :, 14:21])) for n, t in tensors.items()}
    output, after = stream(rest, [1, 6], both, config=config)
    whole, _ = stream(part(tensors, [0], 0, 13), [13], config=config)
    close(output[:1], whole[:, :, 6:])
    whole, end = stream(part(tensors, [1], 0, 21), [21], config=config)
    close(output[1:], whole[:, :, 14:])
    close(after.reorder(torch.tensor([1])).memory, end.memory)


def test_what_cannot_be_reset_or_joined_is_refused():
    config, tensors = InfiniConfig(segment_length=LENGTH), make(12)
    _, amid = stream(part(tensors, [0, 1], 0, 6), [6], config=config)
    with pytest.raises(UnsupportedError, match="2 tokens are not in the memory yet"):
        amid.reset(torch.tensor([0]))
    sliding = InfiniConfig(segment_length=LENGTH, local="sliding")
    _, seen = stream(tensors, [12], config=sliding)
    with pytest.raises(UnsupportedError, match="local='segment'"):
        seen.reset(torch.tensor([0]))
    _, ended = stream(part(tensors, [0, 1], 0, 8), [8], config=config)
    with pytest.raises(ConfigError, match="unfinished segment of state 1 is 0, of state 0 2"):
        InfiniState.cat([amid, ended])
    with pytest.raises(ConfigError, match="config of state 1"):
        InfiniState.cat([ended, seen])
    with pytest.raises(ConfigError, match="states is empty"):
        InfiniState.cat([])


def test_a_reset_row_has_no_past_and_its_neighbour_keeps_its_own():
    """Gradients say who is seen."""
    config = InfiniConfig(segment_length=LENGTH)
    tensors = {n: t.requires_grad_() for n, t in make(16).items()}
    _, state = stream(part(tensors, [0, 1], 0, 8), [8], config=config)
    output, _ = stream(part(tensors, [0, 1], 8), [8], state.reset(torch.tensor([1])), config=config)
    grad = torch.autograd.grad(output.square().sum(), tensors["value"])[0]
    assert (grad[0, :, :8] != 0).any()
    assert (grad[1, :, :8] == 0).all()
