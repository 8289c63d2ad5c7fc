"""Chunked equals whole, segments merge, states are values that save and load."""

from __future__ import annotations

import itertools

import pytest
import torch

from longspan import (
    ConfigError,
    ShapeError,
    StickBreakingConfig,
    StickBreakingState,
    merge_stick_breaking,
    stick_breaking_attention,
    stick_breaking_attention_chunk,
    stick_breaking_attention_with_remainder,
)
from longspan.testing import make_qkv

CONFIGS = [
    StickBreakingConfig(),
    StickBreakingConfig(attend_current=True),
    StickBreakingConfig(window=1),
    StickBreakingConfig(window=5, remainder="value"),
    StickBreakingConfig(window=1, attend_current=True),
]


def feed(sizes, q, k, v, *, state=None, **kwargs):
    outputs = []
    for q_i, k_i, v_i in zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True):
        part = stick_breaking_attention_chunk(q_i, k_i, v_i, state, **kwargs)
        outputs.append(part.output)
        state, kwargs = part.final_state, {n: x for n, x in kwargs.items() if n != "config"}
    return torch.cat(outputs, 2), state


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "sizes", [[8], [1] * 8, [3, 5], [5, 1, 2], [0, 8, 0]], ids=lambda s: "+".join(map(str, s))
)
def test_chunks_of_any_size_equal_the_whole(impl, config, sizes):
    q, k, v = make_qkv(2, 4, 8, 16, kv_heads=2)
    common = {"enable_gqa": True, "logit_bias": torch.tensor([-1.0, 0.0, 1.0, -4.0]), "impl": impl}
    whole = stick_breaking_attention(q, k, v, config=config, **common)
    chunked, state = feed(sizes, q, k, v, config=config, **common)
    torch.testing.assert_close(chunked, whole, atol=3e-6, rtol=1e-5)
    assert state.seen == 8
    if config.window is not None:
        assert state.num_cached == min(config.window - int(config.attend_current), 8)


def test_decode_row_equals_prefill_row(impl):
    q, k, v = make_qkv(2, 4, 50, 16, kv_heads=2)
    whole = stick_breaking_attention_with_remainder(q, k, v, enable_gqa=True, impl=impl)
    with torch.no_grad():
        for row in (0, 1, 31, 49):
            n = row + 1
            one = stick_breaking_attention_with_remainder(
                q[:, :, row:n],
                k[:, :, :n],
                v[:, :, :n],
                enable_gqa=True,
                query_offset=row,
                impl=impl,
            )
            torch.testing.assert_close(one.output[:, :, 0], whole.output[:, :, row])
            torch.testing.assert_close(
                one.log_rest[:, :, 0], whole.log_rest[:, :, row], atol=1e-5, rtol=1e-5
            )


def test_every_segmentation_equals_the_whole():
    n = 6
    q, k, v = make_qkv(1, 2, 1, 4, n_k=n, dtype=torch.float64)
    whole = stick_breaking_attention_with_remainder(q, k, v, query_offset=n)
    for count in range(n):
        for cuts in itertools.combinations(range(1, n), count):
            bounds = [0, *cuts, n]
            parts = [
                stick_breaking_attention_with_remainder(
                    q, k[:, :, a:b], v[:, :, a:b], query_offset=b - a
                )
                for a, b in itertools.pairwise(bounds)
            ]
            output, log_rest = merge_stick_breaking(parts[::-1])  # nearest first
            torch.testing.assert_close(output, whole.output, atol=1e-14, rtol=1e-12)
            torch.testing.assert_close(log_rest, whole.log_rest, atol=1e-14, rtol=1e-12)


def test_segments_merge_with_exact_gradients(gradients):
    q, k, v = inputs = make_qkv(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)

    def merged():
        near = stick_breaking_attention_with_remainder(q, k[:, :, 3:], v[:, :, 3:], query_offset=-3)
        far = stick_breaking_attention_with_remainder(q, k[:, :, :3], v[:, :, :3])
        return merge_stick_breaking([near, far])

    whole = gradients(lambda: stick_breaking_attention_with_remainder(q, k, v), inputs)
    for got, wanted in zip(gradients(merged, inputs), whole, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


def test_merge_is_associative_with_an_identity():
    generator = torch.Generator().manual_seed(0)
    a, b, c = (
        (
            torch.randn(1, 2, 3, 4, generator=generator, dtype=torch.float64),
            -torch.rand(1, 2, 3, generator=generator, dtype=torch.float64),
        )
        for _ in range(3)
    )
    left = merge_stick_breaking([merge_stick_breaking([a, b]), c])
    right = merge_stick_breaking([a, merge_stick_breaking([b, c])])
    torch.testing.assert_close(left, right, atol=1e-15, rtol=1e-14)
    nothing = (torch.zeros_like(a[0]), torch.zeros_like(a[1]))
    for parts in ([a, nothing], [nothing, a]):
        torch.testing.assert_close(merge_stick_breaking(parts), a)
    assert not torch.allclose(merge_stick_breaking([a, b])[0], merge_stick_breaking([b, a])[0])


def test_gradients_reach_earlier_chunks(gradients):
    q, k, v = inputs = make_qkv(1, 2, 9, 4, dtype=torch.float64, requires_grad=True)
    whole = gradients(lambda: [stick_breaking_attention(q, k, v)], inputs)
    chunked = gradients(lambda: [feed([4, 1, 4], q, k, v)[0]], inputs)
    for got, wanted in zip(chunked, whole, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


def test_detach_cuts_the_gradient():
    q, k, v = make_qkv(1, 2, 9, 4, dtype=torch.float64, requires_grad=True)
    _, state = feed([5], q[:, :, :5], k[:, :, :5], v[:, :, :5])
    outputs, _ = feed([4], q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], state=state.detach())
    (dk,) = torch.autograd.grad(outputs.sum(), k)
    assert bool((dk[:, :, :5] == 0).all())
    assert bool((dk[:, :, 5:8] != 0).any())


@pytest.mark.parametrize("window", [None, 6])
def test_a_state_is_a_value_with_branches(window):
    config = StickBreakingConfig(window=window)
    q, k, v = make_qkv(1, 1, 700, 4)
    _, state = feed([5] * 60, q[:, :, :300], k[:, :, :300], v[:, :, :300], config=config)
    kept = state.key.clone()

    def tokens(start, stop):
        return tuple(t[:, :, start:stop] for t in (q, k, v))

    one, half = feed([1] * 25, *tokens(300, 325), state=state)
    other, _ = feed([1] * 50, *tokens(350, 400), state=state)
    rest, _ = feed([1] * 25, *tokens(325, 350), state=half)
    again, _ = feed([50], *tokens(300, 350), state=state)
    one = torch.cat((one, rest), 2)
    torch.testing.assert_close(one, again, atol=3e-6, rtol=1e-5)
    assert torch.equal(state.key, kept)
    assert not torch.allclose(one, other)


def test_growth_is_amortised_and_windows_bound_memory():
    q, k, v = make_qkv(1, 1, 1, 4)
    state, memories = StickBreakingState(), set()
    held = []
    for _ in range(2000):
        state = stick_breaking_attention_chunk(q, k, v, state).final_state
        held.append(state._buffer.memory)  # kept alive, so that ids stay distinct
        memories.add(id(state._buffer.memory))
    assert len(memories) < 12
    state = StickBreakingState(StickBreakingConfig(window=8))
    for _ in range(2000):
        state = stick_breaking_attention_chunk(q, k, v, state).final_state
        assert state._buffer.memory.keys.shape[2] <= 512
    assert (state.num_cached, state.seen) == (8, 2000)


def test_save_load_reorder_crop(tmp_path):
    q, k, v = make_qkv(2, 2, 20, 4, kv_heads=1)
    whole = stick_breaking_attention(q, k, v, enable_gqa=True)
    _, state = feed([9, 6], q[:, :, :15], k[:, :, :15], v[:, :, :15], enable_gqa=True)
    state.save(tmp_path / "state.safetensors")
    loaded = StickBreakingState.load(tmp_path / "state.safetensors")
    assert loaded.seen == 15
    rest, _ = feed([5], q[:, :, 15:], k[:, :, 15:], v[:, :, 15:], state=loaded, enable_gqa=True)
    torch.testing.assert_close(rest, whole[:, :, 15:], atol=1e-6, rtol=1e-5)

    index = torch.tensor([1, 1, 0])
    swapped, _ = feed(
        [5],
        *(t[index, :, 15:] for t in (q, k, v)),
        state=loaded.reorder(index),
        enable_gqa=True,
    )
    torch.testing.assert_close(swapped, whole[index, :, 15:], atol=1e-6, rtol=1e-5)

    cropped = state.crop(12)
    again, after = feed(
        [8], q[:, :, 12:], k[:, :, 12:], v[:, :, 12:], state=cropped, enable_gqa=True
    )
    torch.testing.assert_close(again, whole[:, :, 12:], atol=1e-6, rtol=1e-5)
    assert (cropped.seen, after.seen, state.seen) == (12, 20, 15)

    empty = StickBreakingState(StickBreakingConfig(window=3))
    empty.save(tmp_path / "empty.safetensors")
    with pytest.raises(ConfigError, match="window is 3, not None"):
        StickBreakingState.load(tmp_path / "empty.safetensors")
    again = StickBreakingState.load(tmp_path / "empty.safetensors", empty.config)
    assert again.seen == again.num_cached == 0


def test_refusals():
    q, k, v = make_qkv(1, 2, 12, 4)
    config = StickBreakingConfig(window=4)
    state = stick_breaking_attention_chunk(q, k, v, config=config).final_state
    with pytest.raises(ConfigError, match="Leave config out"):
        stick_breaking_attention_chunk(q, k, v, state, config=StickBreakingConfig())
    with pytest.raises(ShapeError, match="query_offset"):
        stick_breaking_attention_chunk(q[:, :, :1], k, v, state)
    with pytest.raises(ShapeError, match="start from an empty state"):
        stick_breaking_attention_chunk(q.double(), k.double(), v.double(), state)
    with pytest.raises(ConfigError, match="dropped keys"):
        state.crop(11)
    with pytest.raises(ConfigError, match="allowed is"):
        state.crop(13)
    assert state.crop(12) is state
