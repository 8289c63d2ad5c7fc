"""With settings that cover all keys, every way of calling a model equals eager attention."""

from __future__ import annotations

import pytest
import torch
from tiny_models import distance, padded, positions, tiny, tokens
from transformers import DynamicCache, StaticCache

from longspan import ExactConfig, WindowConfig
from longspan.hf import patch

KINDS = ["llama", "qwen3", "mistral", "mistral_sliding", "gemma3", "gpt_neox", "phi", "glm4"]
CONFIGS = [ExactConfig(), WindowConfig(window=64, num_sinks=0), WindowConfig(window=64)]
TOLERANCE = 2e-5


def selection(kind, config):
    """Sliding layers, too, where the settings can keep to the model's own window."""
    can_slide = isinstance(config, ExactConfig) or config.num_sinks == 0
    return "every" if can_slide else "all"


def cases():
    for kind in KINDS:
        for config in CONFIGS:
            if kind == "mistral_sliding" and selection(kind, config) == "all":
                continue  # it has no full-attention layer
            yield pytest.param((kind, config), id=f"{kind}-{type(config).__name__}")


@pytest.fixture(params=list(cases()))
def case(request):
    kind, config = request.param
    model = tiny(kind)
    return model, lambda: patch(model, config, selection(kind, config), verify=False)


def run(model, **inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=inputs.get("past_key_values") is not None).logits


def test_unpadded(case):
    model, patched = case
    expected = run(model, input_ids=tokens())
    with patched():
        assert distance(run(model, input_ids=tokens()), expected) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding(case, side):
    model, patched = case
    mask = padded(side)
    inputs = {"input_ids": tokens(3), "position_ids": positions(mask)}
    expected = run(model, **inputs, attention_mask=mask)
    with patched():
        actual = run(model, **inputs, attention_mask=mask)
    assert distance(actual, expected, mask) < TOLERANCE
    ignored = run(model, **inputs, attention_mask=torch.ones_like(mask))
    if side != "right":  # causality hides padding on the right
        assert distance(ignored, expected, mask) > 1e-2


def test_packed_documents(case):
    model, patched = case
    ids = tokens(1, 14)
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    expected = run(model, input_ids=ids, position_ids=position_ids)
    apart = [run(model, input_ids=part) for part in ids.split([4, 6, 4], dim=1)]
    assert distance(torch.cat(apart, 1), expected) < TOLERANCE
    cu = torch.tensor([0, 4, 10, 14], dtype=torch.int32)
    bounds = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 6, "max_length_k": 6}
    with patched():
        by_position = run(model, input_ids=ids, position_ids=position_ids)
        by_bounds = run(model, input_ids=ids, position_ids=position_ids, **bounds)
        whole = run(model, input_ids=ids)
    assert distance(by_position, expected) < TOLERANCE
    assert distance(by_bounds, expected) < TOLERANCE
    assert distance(whole, expected) > 1e-2


def test_packed_documents_in_several_rows(case):
    model, patched = case
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]])
    ids = tokens(2, 8)
    expected = run(model, input_ids=ids, position_ids=position_ids)
    with patched():
        actual = run(model, input_ids=ids, position_ids=position_ids)
    assert distance(actual, expected) < TOLERANCE


def in_chunks(model, cache, mask, sizes=(6, 5, 1, 1, 1)):
    """Logits of a prefill in chunks and of single steps, through a cache."""
    ids, done, parts = tokens(3), 0, []
    position_ids = positions(mask)
    for size in sizes:
        end = done + size
        parts.append(run(
            model, input_ids=ids[:, done:end], position_ids=position_ids[:, done:end],
            attention_mask=mask[:, :end], past_key_values=cache,
        ))  # fmt: skip
        done = end
    return torch.cat(parts, 1)


@pytest.mark.parametrize("side", ["none", "left", "both"])
def test_chunked_prefill_and_decoding(case, side):
    model, patched = case
    mask = padded(side)
    inputs = {"input_ids": tokens(3), "position_ids": positions(mask), "attention_mask": mask}
    expected = run(model, **inputs)
    if side == "none":  # a mask that hides nothing arrives as None: the offset has to be inferred
        assert distance(in_chunks(model, DynamicCache(config=model.config), mask), expected) < 1e-4
    with patched():
        actual = in_chunks(model, DynamicCache(config=model.config), mask)
    assert distance(actual, expected, mask) < TOLERANCE


@pytest.mark.parametrize("side", ["none", "left"])
def test_static_cache(case, side):
    model, patched = case
    mask = padded(side)
    inputs = {"input_ids": tokens(3), "position_ids": positions(mask), "attention_mask": mask}
    expected = run(model, **inputs)
    with patched():
        cache = StaticCache(config=model.config, max_cache_len=20)
        assert distance(in_chunks(model, cache, mask), expected, mask) < TOLERANCE


def test_static_cache_without_a_mask(case):
    model, patched = case
    ids = tokens()
    expected = run(model, input_ids=ids)
    with patched():
        cache = StaticCache(config=model.config, max_cache_len=20)
        parts = [run(model, input_ids=part, past_key_values=cache) for part in ids.split(5, 1)]
    assert distance(torch.cat(parts, 1), expected) < TOLERANCE


def test_settings_that_cut_are_noticed():
    """The comparisons above can fail: a window of 3 changes the logits by far more."""
    model = tiny()
    expected = run(model, input_ids=tokens())
    with patch(model, WindowConfig(window=3, num_sinks=0), verify=False):
        assert distance(run(model, input_ids=tokens()), expected) > 0.1


@pytest.mark.parametrize("side", ["none", "left"])
def test_inference_mode(side):
    model = tiny()
    mask = padded(side)
    inputs = {"input_ids": tokens(3), "position_ids": positions(mask), "attention_mask": mask}
    expected = run(model, **inputs)
    packed = {"input_ids": tokens(1, 6), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    apart = run(model, **packed)
    with patch(model, WindowConfig(window=64)), torch.inference_mode():
        inputs = {name: value.clone() for name, value in inputs.items()}
        assert distance(model(**inputs).logits, expected, mask) < TOLERANCE
        packed = {name: value.clone() for name, value in packed.items()}
        assert distance(model(**packed, use_cache=False).logits, apart) < TOLERANCE


def test_float64_to_rounding():
    model = tiny().double()
    mask = padded("both")
    inputs = {"input_ids": tokens(3), "position_ids": positions(mask), "attention_mask": mask}
    with patch(model, ExactConfig(), verify=False):
        expected = run(model, **inputs)
    with patch(model, WindowConfig(window=64), verify=False):
        assert distance(run(model, **inputs), expected, mask) < 1e-12


def test_rows_that_are_all_padding():
    model = tiny()
    mask = padded("left")
    mask[1] = 0
    with patch(model, WindowConfig(window=64), verify=False):
        logits = run(model, input_ids=tokens(3), attention_mask=mask)
    assert torch.isfinite(logits).all()


def test_four_dimensional_masks_reach_exact_layers_only():
    model = tiny()
    mask = torch.ones(2, 1, 14, 14, dtype=torch.bool).tril()
    mask[:, :, :, 3] = False
    mask[:, :, 3, 3] = True
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    expected = run(model, input_ids=tokens(), attention_mask=additive)
    with patch(model, ExactConfig(), verify=False):
        for form in (mask, additive):
            actual = run(model, input_ids=tokens(), attention_mask=form)
            assert distance(actual, expected) < TOLERANCE
