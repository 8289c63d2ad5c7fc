"""Streaming: chunks of any size equal one pass; the state is bounded, saved, checked."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan import ConfigError, ShapeError, WindowConfig, WindowState, window_attention
from longspan.testing import make_qkv
from longspan.window import window_attention_chunk


def stream(q, k, v, cuts, config, state=None):
    outputs = []
    edges = [0, *cuts, q.shape[2]]
    for start, stop in itertools.pairwise(edges):
        part = (t[:, :, start:stop] for t in (q, k, v))
        output, state = window_attention_chunk(*part, state, enable_gqa=True, config=config)
        outputs.append(output)
        assert state.seen == stop
        assert state.key.shape[2] == min(stop, config.num_sinks + config.window - 1)
    return torch.cat(outputs, 2), state


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 6), st.lists(st.integers(0, 40), max_size=6))
def test_chunks_equal_one_pass(window, sinks, cuts):
    q, k, v = make_qkv(2, 4, 40, 4, kv_heads=2, dtype=torch.float64, requires_grad=True)
    config = WindowConfig(window=window, num_sinks=sinks)
    whole = window_attention(q, k, v, is_causal=True, enable_gqa=True, config=config)
    pieces, _ = stream(q, k, v, sorted(cuts), config)
    torch.testing.assert_close(pieces, whole, rtol=1e-11, atol=1e-11)
    up = torch.randn_like(whole)
    for a, b in zip(torch.autograd.grad(pieces, (q, k, v), up),
                    torch.autograd.grad(whole, (q, k, v), up), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_single_tokens_equal_one_pass():
    q, k, v = make_qkv(1, 2, 30, 8)
    config = WindowConfig(window=5, num_sinks=2)
    whole = window_attention(q, k, v, is_causal=True, config=config)
    pieces, state = stream(q, k, v, range(1, 30), config)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-6)
    want = torch.cat((k[:, :, :2], k[:, :, -4:]), 2)
    assert torch.equal(state.key, want)


def test_state_owns_its_memory():
    """A view would keep every key ever seen alive."""
    q, k, v = make_qkv(1, 1, 100, 8)
    _, state = window_attention_chunk(q, k, v, None, config=WindowConfig(window=5))
    assert state.key.untyped_storage().nbytes() == 8 * 8 * 4
    first = state.key.clone()
    k.zero_()
    assert torch.equal(state.key, first)


def test_save_and_load_continue_the_stream(tmp_path):
    q, k, v = make_qkv(1, 2, 50, 8, dtype=torch.bfloat16)
    config = WindowConfig(window=6, num_sinks=2)
    whole, last = stream(q, k, v, [31], config)
    _, state = stream(*(t[:, :, :31] for t in (q, k, v)), [10], config)
    state.save(tmp_path / "state.safetensors")
    loaded = WindowState.load(tmp_path / "state.safetensors", config)
    assert loaded.seen == 31
    assert loaded.key.dtype is torch.bfloat16
    rest, end = window_attention_chunk(*(t[:, :, 31:] for t in (q, k, v)), loaded, config=config)
    assert torch.equal(rest, whole[:, :, 31:])
    assert torch.equal(end.key, last.key)
    assert torch.equal(end.value, last.value)
    with pytest.raises(ConfigError, match="window is 6, not 7"):
        WindowState.load(tmp_path / "state.safetensors", WindowConfig(window=7, num_sinks=2))


def test_reorder_follows_beams():
    q, k, v = make_qkv(3, 2, 20, 8, dtype=torch.float64)
    config = WindowConfig(window=6)
    _, state = window_attention_chunk(*(t[:, :, :15] for t in (q, k, v)), None, config=config)
    beams = torch.tensor([2, 0, 0])
    rest = [t[:, :, 15:] for t in (q, k, v)]
    got, _ = window_attention_chunk(*rest, state.reorder(beams), config=config)
    for row, beam in enumerate(beams):
        one = slice(int(beam), int(beam) + 1)
        _, alone = window_attention_chunk(*(t[one, :, :15] for t in (q, k, v)), None, config=config)
        want, _ = window_attention_chunk(*(t[row : row + 1] for t in rest), alone, config=config)
        torch.testing.assert_close(got[row : row + 1], want)


def test_detach_cuts_the_graph():
    q, k, v = make_qkv(1, 1, 8, 4, requires_grad=True)
    _, state = window_attention_chunk(q, k, v, None, config=WindowConfig(window=4))
    assert state.key.requires_grad
    assert not state.detach().key.requires_grad
    assert state.detach().seen == 8


def test_refusals():
    q, k, v = make_qkv(2, 2, 8, 4)
    config = WindowConfig(window=4)
    _, state = window_attention_chunk(q, k, v, None, config=config)
    with pytest.raises(ConfigError, match=r"state was made with .*window=4.* but config"):
        window_attention_chunk(q, k, v, state, config=WindowConfig(window=5))
    with pytest.raises(ShapeError, match=r"state.key is \(2, 2, 7, 4\)"):
        window_attention_chunk(q[:1], k[:1], v[:1], state, config=config)
    with pytest.raises(ShapeError, match=r"dtype and device must agree"):
        window_attention_chunk(q.double(), k.double(), v.double(), state, config=config)
    with pytest.raises(ShapeError, match="state is a tuple"):
        window_attention_chunk(q, k, v, (k, v), config=config)
    with pytest.raises(ShapeError, match="query has 3 tokens but key has 8"):
        window_attention_chunk(q[:, :, :3], k, v, None, config=config)
