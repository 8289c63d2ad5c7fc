"""Streaming: chunks of any size equal the whole; states are values that save and load."""

from __future__ import annotations

import pytest
import torch
from hyper_cases import CHUNKS, SMALL

import longspan
from longspan import ConfigError, HyperConfig, HyperState, ShapeError
from longspan import hyper_attention_chunk as chunk
from longspan.testing import make_qkv

LENGTH = 150


def whole(q, k, v, config):
    return longspan.hyper_attention(q, k, v, is_causal=True, enable_gqa=True, config=config)


def stream(q, k, v, config, sizes, state=None):
    outputs, start = [], 0
    for size in sizes:
        at = slice(start, start + size)
        part = chunk(q[:, :, at], k[:, :, at], v[:, :, at], state, enable_gqa=True,
                     config=config)  # fmt: skip
        outputs.append(part.output)
        state, start = part.final_state, start + size
    return torch.cat(outputs, 2), state


@pytest.mark.parametrize("name", CHUNKS)
@pytest.mark.parametrize("sizes", [[150], [64, 86], [5, 27, 1, 60, 57], [100] + [1] * 50])
def test_chunks_of_any_size_equal_the_whole(name, sizes):
    config = CHUNKS[name]
    q, k, v = make_qkv(2, 4, LENGTH, 8, kv_heads=2, value_dim=6, dtype=torch.float64, kind="peaked")
    got, state = stream(q, k, v, config, sizes)
    torch.testing.assert_close(got, whole(q, k, v, config))
    assert state.seen == LENGTH
    assert torch.equal(state.key, k)
    assert state.finished.num_chunks == LENGTH // config.chunk_size


@pytest.mark.parametrize("name", ["pca", "stratified"])
def test_gradients_reach_earlier_chunks(name):
    config = CHUNKS[name]
    inputs = make_qkv(1, 2, 100, 8, dtype=torch.float64, requires_grad=True)
    up = torch.randn(1, 2, 100, 8).double()
    got = stream(*inputs, config, [60, 1, 39])[0]
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, up),
        torch.autograd.grad(whole(*inputs, config), inputs, up),
    )
    part = chunk(*(t[:, :, :60] for t in inputs), config=config)
    cut = part.final_state.detach()
    later = chunk(*(t[:, :, 60:] for t in inputs), cut)
    grad = torch.autograd.grad(later.output.sum(), inputs[1])[0]
    assert (grad[:, :, :60] == 0).all()
    assert (grad[:, :, 60:] != 0).any()


def test_states_are_values():
    """Two continuations of one state do not see each other's tokens; crop and reorder follow."""
    config = CHUNKS["pca"]
    q, k, v = make_qkv(2, 2, LENGTH, 8)
    with torch.no_grad():
        _, base = stream(q, k, v, config, [120, 3])
        rest = [t[:, :, 123:] for t in (q, k, v)]
        first = chunk(*rest, base)
        other = chunk(*(t.flip(2) for t in rest), base)
        again = chunk(*rest, base)
    assert torch.equal(first.output, again.output)
    assert not torch.equal(first.output, other.output)
    torch.testing.assert_close(first.output, whole(q, k, v, config)[:, :, 123:])
    back = first.final_state.crop(123)
    torch.testing.assert_close(chunk(*rest, back).output, first.output)
    assert back.finished.num_chunks == 123 // config.chunk_size
    turned = base.reorder(torch.tensor([1, 0, 1]))
    out = chunk(*(t[[1, 0, 1]] for t in rest), turned).output
    torch.testing.assert_close(out, first.output[[1, 0, 1]])
    with pytest.raises(ConfigError, match="seen is 151; allowed is 0 to 150"):
        first.final_state.crop(151)


@pytest.mark.parametrize("name", ["pca", "uniform", "variance"])
def test_saves_and_loads(tmp_path, name):
    config = CHUNKS[name]
    q, k, v = make_qkv(1, 2, LENGTH, 8)
    _, state = stream(q, k, v, config, [140])
    rest = [t[:, :, 140:] for t in (q, k, v)]
    state.save(tmp_path / "state.safetensors")
    loaded = HyperState.load(tmp_path / "state.safetensors", config)
    assert loaded.seen == 140
    assert torch.equal(chunk(*rest, loaded).output, chunk(*rest, state).output)
    with pytest.raises(ConfigError, match="num_probes is 3, not 16"):
        HyperState.load(
            tmp_path / "state.safetensors",
            HyperConfig(**{**{f: getattr(config, f) for f in config.__slots__}, "num_probes": 16}),
        )
    HyperState(config).save(tmp_path / "empty.safetensors")
    assert HyperState.load(tmp_path / "empty.safetensors", config).key is None


def test_refusals():
    q, k, v = make_qkv(1, 2, 8, 8)
    with pytest.raises(ConfigError, match="a stream needs structure='chunks'"):
        chunk(q, k, v, config=HyperConfig.paper())
    with pytest.raises(ConfigError, match="max_error=None"):
        HyperState(HyperConfig(max_error=0.1))
    state = chunk(q, k, v, config=HyperConfig(**SMALL)).final_state
    with pytest.raises(ConfigError, match="Leave config out"):
        chunk(q, k, v, state, config=HyperConfig())
    with pytest.raises(ShapeError, match="the state holds"):
        chunk(q[:, :1], k[:, :1], v[:, :1], state)
    with pytest.raises(ShapeError, match="holds the same tokens in both"):
        chunk(q[:, :, :3], k, v, state)


def test_decoding_reads_little():
    """One token against a long cache gathers a small share of its keys."""
    config = HyperConfig(window=32, chunk_size=64, cluster_size=8, num_probes=2, num_sinks=2)
    q, k, v = make_qkv(1, 2, 4096, 8)
    with torch.no_grad():
        state = chunk(q[:, :, :-1], k[:, :, :-1], v[:, :, :-1], config=config).final_state
        read = 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                nonlocal read
                result = function(*args, **(kwargs or {}))
                if isinstance(result, torch.Tensor) and not function.is_view:
                    read = max(read, result.numel())
                return result

        last = [t[:, :, -1:] for t in (q, k, v)]
        chunk(*last, state)  # makes room
        state = chunk(*last, state).final_state
        with Watch():
            chunk(*last, state)
    assert read < 0.2 * k.numel()
