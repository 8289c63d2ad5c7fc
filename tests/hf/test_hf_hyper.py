"""HyperAttention in transformers: generation, the cache that keeps its index, plans."""

from __future__ import annotations

import pytest
import torch
from tiny_models import distance, padded, tiny, tokens

from longspan import HyperConfig
from longspan.hf import LayerPlan, format_config, make_cache, parse_config, patch
from longspan.hf.indexed_layer import IndexedLayer

SMALL = HyperConfig(window=4, num_sinks=2, chunk_size=8, cluster_size=2, num_probes=2)


@pytest.fixture
def model():
    return tiny()


def generate(model, **settings):
    return model.generate(tokens(2, 30), max_new_tokens=14, do_sample=False, **settings)


def test_everything_in_the_budget_changes_nothing(model):
    plain = generate(model)
    with patch(model, HyperConfig(window=64)):
        assert torch.equal(generate(model), plain)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}], ids=str)
def test_generation_with_the_kept_index_equals_full_recomputation(model, settings):
    with patch(model, SMALL) as report:
        want = generate(model, **settings)
        cache = make_cache(model)
        assert all(isinstance(layer, IndexedLayer) for layer in cache.layers)
        got = generate(model, past_key_values=cache, **settings)
    assert torch.equal(got, want)
    assert not torch.equal(want, generate(model, **settings))
    assert report.visited_fraction < 0.9
    assert all(layer.index.finished.num_chunks == 43 // 8 for layer in cache.layers)


def test_prefill_in_chunks_equals_one_pass(model):
    ids = tokens(1, 60)
    with patch(model, SMALL), torch.no_grad():
        want = model(ids, use_cache=False).logits
        cache, parts = make_cache(model), []
        for piece in ids.split([21, 1, 30, 8], dim=1):
            parts.append(model(piece, past_key_values=cache).logits)
        assert distance(torch.cat(parts, 1), want) < 1e-4
        cache.crop(-17)
        again = model(ids[:, 43:], past_key_values=cache).logits
        assert distance(again, want[:, 43:]) < 1e-4


def test_padding_on_the_left_equals_alone(model):
    ids, mask = tokens(3, 40), padded("left", 3, 40)
    with patch(model, SMALL), torch.no_grad():
        whole = model(torch.where(mask.bool(), ids, 0), attention_mask=mask).logits
        for row in range(3):
            real = mask[row].bool()
            alone = model(ids[row : row + 1, real]).logits
            assert distance(whole[row : row + 1, real], alone) < 1e-4


def test_settings_travel_in_strings_and_plans(model, tmp_path):
    text = format_config(SMALL)
    assert parse_config(text) == SMALL
    assert parse_config(format_config(HyperConfig.paper())) == HyperConfig.paper()
    plan = LayerPlan.build({0: SMALL, 1: HyperConfig.paper()}, None, 2)
    plan.save(tmp_path / "plan.json")
    assert LayerPlan.load(tmp_path / "plan.json") == plan
    with patch(model, plan) as report:
        model(tokens(1, 20))
    assert [layer.mechanism for layer in report.layers] == ["hyper", "hyper"]
