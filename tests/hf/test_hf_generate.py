"""generate(): greedy, beams, chunked prefill, assisted, prefix tuning, all kinds of caches."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import distance, padded, tiny, tokens
from transformers import Cache, DynamicCache, StaticCache

from longspan import ExactConfig, PatchError, UnsupportedError, WindowConfig
from longspan.hf import make_cache, patch
from longspan.hf.cache_layer import BoundedLayer

EVERYTHING = [ExactConfig(), WindowConfig(window=64)]
SMALL = WindowConfig(window=4, num_sinks=2)


def generate(model, side="none", **settings):
    ids, mask = tokens(3, 10), padded(side, 3, 10)
    ids = torch.where(mask.bool(), ids, 0)
    settings = {"max_new_tokens": 8, "do_sample": False, **settings}
    return model.generate(ids, attention_mask=mask, **settings)


@pytest.fixture
def model():
    return tiny()


@pytest.mark.parametrize("config", EVERYTHING, ids=repr)
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}],
    ids=str,
)
def test_generate_equals_eager(model, config, side, settings):
    expected = generate(model, side, **settings)
    with patch(model, config):
        assert torch.equal(generate(model, side, **settings), expected)
    if side == "left":
        assert not torch.equal(expected, generate(model, **settings))


@pytest.mark.parametrize("kind", ["gemma3", "mistral_sliding", "qwen3"])
def test_generate_with_sliding_layers(kind):
    model = tiny(kind)
    expected = generate(model, "left")
    with patch(model, ExactConfig(), layers="every"):
        assert torch.equal(generate(model, "left"), expected)


def test_assisted_decoding(model):
    assistant = tiny(num_hidden_layers=1)
    inputs = {"input_ids": tokens(1, 10), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**inputs)
    for config in EVERYTHING:
        with patch(model, config) as report:
            assert torch.equal(model.generate(**inputs, assistant_model=assistant), expected)
        assert report.exact_calls > 0


def test_prefix_tuning(model):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        mask = padded("left")
        whole, left = wrapped(input_ids=tokens(3)), wrapped(tokens(3), attention_mask=mask)
        for config in EVERYTHING:
            with patch(wrapped, config):
                actual = wrapped(input_ids=tokens(3)).logits
                assert distance(actual, whole.logits) < 2e-5
                actual = wrapped(tokens(3), attention_mask=mask).logits
                assert distance(actual, left.logits, mask) < 2e-5


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}], ids=str)
@pytest.mark.parametrize("layers", ["all", "last:1"])
def test_bounded_cache_equals_full_cache(model, side, settings, layers):
    with patch(model, SMALL, layers):
        full = generate(model, side, **settings)
        cache = make_cache(model)
        bounded = generate(model, side, past_key_values=cache, **settings)
    assert torch.equal(bounded, full)
    kept = [layer for layer in cache.layers if isinstance(layer, BoundedLayer)]
    assert len(kept) == (2 if layers == "all" else 1)
    assert {layer.keys.shape[2] for layer in kept} == {5}  # 2 sinks, and 3 that a next token sees
    assert cache.get_seq_length() == 17
    exact = generate(model, side, **settings)
    assert not torch.equal(exact, full)


@pytest.mark.parametrize("sizes", [(14,), (1,) * 14, (6, 1, 5, 2)], ids=str)
@pytest.mark.parametrize("side", ["none", "left", "both"])
def test_bounded_cache_in_chunks(model, side, sizes):
    """Logits, not only tokens: chunks of any size through a bounded cache equal one pass."""
    from test_hf_equality import in_chunks, run
    from tiny_models import positions

    mask = padded(side)
    with patch(model, SMALL):
        inputs = {"input_ids": tokens(3), "position_ids": positions(mask)}
        expected = run(model, **inputs, attention_mask=mask)
        actual = in_chunks(model, make_cache(model), mask, sizes)
    assert distance(actual, expected, mask) < 2e-5


def test_bounded_cache_of_gemma_leaves_sliding_layers_to_transformers():
    model = tiny("gemma3")
    with patch(model, SMALL):
        cache = make_cache(model)
        names = [type(layer).__name__ for layer in cache.layers]
        full = generate(model, "left")
        assert torch.equal(generate(model, "left", past_key_values=cache), full)
    assert names == ["DynamicSlidingWindowLayer", "BoundedLayer"] * 2


def test_bounded_cache_can_be_copied_and_reset(model):
    ids = tokens(2, 12)
    with patch(model, SMALL), torch.no_grad():
        cache = make_cache(model)
        first = model(ids[:, :8], past_key_values=cache).logits
        branch = copy.deepcopy(cache)
        expected = model(ids[:, 8:], past_key_values=cache).logits
        assert torch.equal(model(ids[:, 8:], past_key_values=branch).logits, expected)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model(ids[:, :8], past_key_values=cache).logits, first)


def test_rows_of_a_bounded_cache(model):
    ids, mask = tokens(3), padded("left")
    with patch(model, SMALL), torch.no_grad():
        cache = make_cache(model)
        model(ids[:, :10], attention_mask=mask[:, :10], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([4, 0, 2]))
        order = torch.tensor([2, 0, 1])
        next_mask = mask[order][:, :11]
        actual = model(ids[order, 10:11], attention_mask=next_mask, past_key_values=cache).logits
        full = DynamicCache(config=model.config)
        model(ids[order, :10], attention_mask=mask[order, :10], past_key_values=full)
        expected = model(ids[order, 10:11], attention_mask=next_mask, past_key_values=full).logits
    assert distance(actual, expected) < 2e-5


def test_bounded_cache_refuses_to_roll_back(model):
    layer = BoundedLayer(1, 3)
    keys = torch.randn(1, 2, 4, 8)
    layer.update(keys, keys)
    layer.trim(None)
    layer.crop(-1)
    assert layer.get_seq_length() == 3
    layer.update(keys, keys)
    layer.trim(None)
    with pytest.raises(UnsupportedError, match=r"holds 4 of the 7 tokens.*Use a DynamicCache"):
        layer.crop(-1)
    assert not layer.is_croppable
    with patch(model, SMALL):
        cache = make_cache(model)
        with pytest.raises(UnsupportedError, match="assisted decoding needs that"):
            model.generate(
                tokens(1, 10), assistant_model=tiny(num_hidden_layers=1), max_new_tokens=12,
                do_sample=False, past_key_values=cache,
            )  # fmt: skip


def test_make_cache_needs_a_patch(model):
    with pytest.raises(PatchError, match=r"it is not patched.*Call longspan.hf.patch first"):
        make_cache(model)


def test_caches_that_drop_keys_behind_our_back_are_noticed(model):
    class Forgetful(BoundedLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            keys, values = super().update(key_states, value_states)
            return keys[:, :, -4:].clone(), values[:, :, -4:].clone()

    cache = Cache(layers=[Forgetful(1, 3), Forgetful(1, 3)])
    with patch(model, SMALL), pytest.raises(UnsupportedError, match="4 keys but the mask covers"):
        generate(model, "left", past_key_values=cache)


def test_static_cache_object(model):
    expected = generate(model, "left")
    with patch(model, WindowConfig(window=64)):
        cache = StaticCache(config=model.config, max_cache_len=32)
        assert torch.equal(generate(model, "left", past_key_values=cache), expected)


def test_continuous_batching_is_refused(model):
    settings = pytest.importorskip("transformers").GenerationConfig(
        max_new_tokens=2, eos_token_id=-1
    )
    with patch(model, SMALL), pytest.raises(ValueError, match=r"longspan.* is not supported"):
        model.generate_batch([[3, 4, 5]], generation_config=settings)
