"""Streaming: chunks of any size equal the whole, and a state is what later tokens need."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan import (
    ConfigError,
    InfiniConfig,
    InfiniState,
    ShapeError,
    UnsupportedError,
    infini_attention,
    infini_attention_chunk,
)
from longspan.infini.config import LOCALS, UPDATES

F64 = torch.float64


def make(n=23, dtype=F64, heads=4, kv_heads=2, update="linear", own=True):
    torch.manual_seed(n)
    q, k, v = (torch.randn(2, h, n, 6, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    tensors = {"query": q, "key": k, "value": v}
    if own:
        tensors |= {"memory_query": torch.randn_like(q), "memory_key": torch.randn_like(k)}
    if update == "gated_delta":
        tensors |= {"write_gate": torch.rand(2, kv_heads, n, dtype=dtype),
                    "log_decay": -torch.rand(2, kv_heads, n, dtype=dtype)}  # fmt: skip
    return tensors


def stream(tensors, sizes, state=None, **common):
    pieces, start = [], 0
    for size in sizes:
        part = {name: t[:, :, start : start + size] for name, t in tensors.items()}
        piece, state = infini_attention_chunk(**part, state=state, enable_gqa=True, **common)
        pieces.append(piece)
        start += size
    return torch.cat(pieces, 2), state


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    update=st.sampled_from(UPDATES),
    local=st.sampled_from(LOCALS),
    first=st.sampled_from(["local", "gated"]),
    own=st.booleans(),
)
def test_chunks_of_any_size_equal_the_whole(sizes, update, local, first, own):
    config = InfiniConfig(segment_length=4, update=update, local=local, first_segment=first)
    tensors = make(sum(sizes), update=update, own=own)
    gate = torch.linspace(-1, 1, 4, dtype=F64)
    whole, final = infini_attention(**tensors, gate=gate, enable_gqa=True, config=config)
    pieces, state = stream(tensors, sizes, gate=gate, config=config)
    torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.memory, final.memory, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.normaliser, final.normaliser, rtol=1e-10, atol=1e-10)
    assert torch.equal(state.key, final.key)
    assert state.seen == final.seen == sum(sizes)


def test_token_by_token():
    tensors, config = make(19), InfiniConfig(segment_length=4)
    whole = infini_attention(**tensors, enable_gqa=True, config=config).output
    pieces, state = stream(tensors, [1] * 19, config=config)
    torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-10)
    assert (state.seen, state.folded, state.at_boundary) == (19, 16, False)


def test_size_does_not_depend_on_the_length():
    sizes = set()
    for n in (43, 403, 1603):
        _, state = stream(make(n, dtype=torch.float32), [n - 9, 9],
                          config=InfiniConfig(segment_length=8))  # fmt: skip
        sizes.add(state.num_bytes)
        assert state.memory._base is None  # no view of all states
        assert state.key.untyped_storage().nbytes() == state.key.numel() * 4
    assert len(sizes) == 1


@pytest.mark.parametrize("update", UPDATES)
def test_gradients_flow_through_states_until_detached(update):
    tensors = {n: t.requires_grad_() for n, t in make(16, update=update).items()}
    config = InfiniConfig(segment_length=4, update=update)
    whole = infini_attention(**tensors, enable_gqa=True, config=config).output
    pieces, _ = stream(tensors, [5, 6, 5], config=config)
    for name in ("key", "value", "memory_key"):
        a, b = (torch.autograd.grad(o.square().sum(), tensors[name], retain_graph=True)[0]
                for o in (whole, pieces))  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    _, state = stream({n: t[:, :, :8] for n, t in tensors.items()}, [8], config=config)
    later = {n: t[:, :, 8:] for n, t in tensors.items()}
    out, _ = stream(later, [8], state.detach(), config=config)
    grad = torch.autograd.grad(out.sum(), tensors["memory_key"])[0]
    assert (grad[:, :, :8] == 0).all()
    assert (grad[:, :, 8:12] != 0).any()


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_save_and_load(tmp_path, update, dtype):
    config = InfiniConfig(segment_length=4, update=update)
    tensors = make(14, dtype=dtype, update=update)
    first = {n: t[:, :, :10] for n, t in tensors.items()}
    last = {n: t[:, :, 10:] for n, t in tensors.items()}
    _, state = stream(first, [10], config=config)
    state.save(tmp_path / "state.safetensors")
    loaded = InfiniState.load(tmp_path / "state.safetensors", config)
    assert loaded.seen == 10
    assert loaded.config == config
    for name, tensor in state._tensors().items():
        assert torch.equal(getattr(loaded, name), tensor)
        assert getattr(loaded, name).dtype is tensor.dtype
    a, b = (stream(last, [4], s, config=config)[0] for s in (state, loaded))
    assert torch.equal(a, b)


def test_load_refuses_other_settings_and_files(tmp_path):
    config = InfiniConfig(segment_length=4)
    path = tmp_path / "state.safetensors"
    stream(make(6), [6], config=config)[1].save(path)
    with pytest.raises(ConfigError, match="segment_length is 4, not 8"):
        InfiniState.load(path, InfiniConfig(segment_length=8))
    with pytest.raises(ConfigError, match="update is 'linear', not 'delta'"):
        InfiniState.load(path, InfiniConfig(segment_length=4, update="delta"))
    with pytest.raises(FileNotFoundError):
        InfiniState.load(tmp_path / "none", config)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        InfiniState.load(path, config)


def test_calls_refuse_a_state_that_does_not_fit():
    config, tensors = InfiniConfig(segment_length=4), make(6, dtype=torch.float32)
    _, state = stream(tensors, [6], config=config)

    def go(changed=None, given=state, **common):
        named = {**tensors, **(changed or {})}
        return infini_attention_chunk(
            **named, state=given, enable_gqa=True, **{"config": config, **common}
        )

    with pytest.raises(ConfigError, match="initial_state was made with .* but config is"):
        go(config=InfiniConfig(segment_length=5))
    one = {name: t[:1] for name, t in tensors.items()}
    with pytest.raises(ShapeError, match=r"initial_state.memory is \(2, 2, 6, 6\).*\(1, 2, 6, 6\)"):
        go(one)
    with pytest.raises(ShapeError, match="initial_state.key is torch.float32 .*bfloat16"):
        go({name: t.bfloat16() for name, t in tensors.items()})
    with pytest.raises(ShapeError, match="initial_state.memory is .* torch.float32"):
        go({name: t.double() for name, t in tensors.items()})
    with pytest.raises(ShapeError, match="initial_state is a tuple"):
        go(given=(1, 2))
    with pytest.raises(ConfigError, match="had memory_key, this one has none"):
        go({"memory_key": None, "memory_query": None})
    lengths = torch.tensor([6, 2], dtype=torch.int32)
    padded = infini_attention(**tensors, key_lengths=lengths, enable_gqa=True, config=config)
    with pytest.raises(UnsupportedError, match="comes from a call with key_lengths"):
        go(given=padded.final_state)
    with pytest.raises(ShapeError, match="query has 6 tokens but key has 5"):
        infini_attention_chunk(*[tensors[n][:, :, :s]
                                 for n, s in (("query", 6), ("key", 5), ("value", 5))])  # fmt: skip


def test_moved_to_another_dtype_it_fits_there():
    config, tensors = InfiniConfig(segment_length=4), make(10)
    _, state = stream({n: t[:, :, :6] for n, t in tensors.items()}, [6], config=config)
    low = {n: t[:, :, 6:].to(torch.bfloat16) for n, t in tensors.items()}
    moved = state.to(dtype=torch.bfloat16)
    assert moved.memory.dtype is torch.float32
    assert moved.written.dtype is torch.int64
    out, _ = stream(low, [4], moved, config=config)
    want, _ = stream({n: t[:, :, 6:] for n, t in tensors.items()}, [4], state, config=config)
    torch.testing.assert_close(out.double(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("local", LOCALS)
def test_crop_rolls_back_inside_a_segment_and_refuses_past_a_fold(local):
    config, tensors = InfiniConfig(segment_length=4, local=local), make(14)
    part = {n: t[:, :, :11] for n, t in tensors.items()}
    _, state = stream(part, [11], config=config)
    assert state.folded == (8 if local == "segment" else 4)
    back = state.crop(9)
    _, direct = stream({n: t[:, :, :9] for n, t in tensors.items()}, [9], config=config)
    assert torch.equal(back.key, direct.key)
    torch.testing.assert_close(back.memory, direct.memory)
    rest = {n: t[:, :, 9:] for n, t in tensors.items()}
    a, b = (stream(rest, [5], s, config=config)[0] for s in (back, direct))
    torch.testing.assert_close(a, b)
    with pytest.raises(UnsupportedError, match="folded into the memory, which cannot be undone"):
        state.crop(state.folded - 1)
    with pytest.raises(ConfigError, match="seen is 12"):
        state.crop(12)


def test_a_state_is_a_value():
    """A snapshot at a boundary serves several continuations, and calls leave it as it was."""
    config, tensors = InfiniConfig(segment_length=4), make(16)
    _, prefix = stream({n: t[:, :, :8] for n, t in tensors.items()}, [8], config=config)
    assert prefix.at_boundary
    assert prefix.key.shape[2] == 0
    kept = prefix.clone()
    rest = {n: t[:, :, 8:] for n, t in tensors.items()}
    first, _ = stream(rest, [3, 5], prefix, config=config)
    other = {n: t.flip(2) for n, t in rest.items()}
    stream(other, [8], prefix, config=config)
    again, _ = stream(rest, [8], prefix, config=config)
    torch.testing.assert_close(first, again)
    for name, tensor in kept._tensors().items():
        assert torch.equal(getattr(prefix, name), tensor)


def test_reorder_follows_beams():
    config, tensors = InfiniConfig(segment_length=4), make(9)
    _, state = stream({n: t[:, :, :6] for n, t in tensors.items()}, [6], config=config)
    index = torch.tensor([1, 1, 0])
    rest = {n: t[:, :, 6:].index_select(0, index) for n, t in tensors.items()}
    out, _ = stream(rest, [3], state.reorder(index), config=config)
    want, _ = stream({n: t[:, :, 6:] for n, t in tensors.items()}, [3], state, config=config)
    torch.testing.assert_close(out, want.index_select(0, index))
