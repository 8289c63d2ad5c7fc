"""Stick-breaking in transformers models: every calling form, caches, training, honesty."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from tiny_models import distance, padded, tiny, tokens

from longspan import LongspanWarning, StickBreakingConfig, patched_sdpa
from longspan.hf import make_cache, patch, without_positions
from longspan.hf.cache_layer import BoundedLayer

CONFIGS = [
    StickBreakingConfig(),
    StickBreakingConfig(window=4, attend_current=True),
    StickBreakingConfig(window=3, remainder="value"),
    StickBreakingConfig(window=1, attend_current=True),
]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LongspanWarning)
        yield


@pytest.fixture(params=[False, True], ids=["rotary", "no-positions"])
def model(request):
    net = tiny()
    if not request.param:
        yield net
        return
    with without_positions(net):
        yield net


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_equals_the_same_model_with_sdpa_replaced(model, config):
    ids = tokens(3)
    with torch.no_grad():
        with patch(model, config) as report:
            actual = model(ids).logits
            assert report.approximate_calls == 2
        model.set_attn_implementation("sdpa")
        with patched_sdpa(config) as replaced:
            wanted = model(ids).logits
        assert replaced.calls == 2
        assert distance(actual, wanted) < 2e-5
        assert distance(model(ids).logits, wanted) > 1e-2


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_padding_does_not_matter(model, side, config):
    ids, mask = tokens(3), padded(side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), patch(model, config):
        together = model(ids, attention_mask=mask, position_ids=positions).logits
        for row in range(3):
            real = mask[row].bool()
            alone = model(ids[row : row + 1, real]).logits[0]
            assert distance(together[row, real], alone) < 2e-5


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_packed_documents_equal_separate_ones(model, config):
    ids = tokens(1, 14)
    positions = torch.tensor([[*range(5), *range(9)]])
    with torch.no_grad(), patch(model, config):
        packed = model(ids, position_ids=positions, use_cache=False).logits
        for part in (slice(0, 5), slice(5, 14)):
            assert distance(packed[:, part], model(ids[:, part]).logits) < 2e-5


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}], ids=str)
def test_generation_with_a_cache_equals_generation_without(model, config, settings):
    inputs = {
        "input_ids": torch.where(padded("left", 3, 10).bool(), tokens(3, 10), 0),
        "attention_mask": padded("left", 3, 10),
        "max_new_tokens": 6,
        "do_sample": False,
    }
    expected = {name: n for name, n in settings.items() if name == "num_beams"}
    with patch(model, config):
        wanted = model.generate(**inputs, use_cache=False, **expected)
        assert torch.equal(model.generate(**inputs, **settings), wanted)
        bounded = make_cache(model)
        assert torch.equal(model.generate(**inputs, past_key_values=bounded, **settings), wanted)
    if config.window is None:
        assert not any(isinstance(layer, BoundedLayer) for layer in bounded.layers)
    else:
        kept = config.window - int(config.attend_current)
        assert all(layer.keys.shape[2] == kept for layer in bounded.layers)


def test_without_positions_the_cache_holds_none():
    # keys of the same tokens at other places of the text are the same keys
    model = tiny(num_hidden_layers=1)
    ids = tokens(1, 6)
    with torch.no_grad(), without_positions(model), patch(model, StickBreakingConfig()):
        first = model(ids, position_ids=torch.arange(6)[None]).past_key_values.layers[0].keys
        later = model(ids, position_ids=torch.arange(6)[None] + 50).past_key_values.layers[0].keys
    assert torch.equal(first, later)


def test_training_reaches_every_weight_and_learns():
    model = tiny().train()
    ids = tokens(4, 12)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    with without_positions(model), patch(model, StickBreakingConfig()):
        for _ in range(8):
            loss = model(ids, labels=ids).loss
            optimiser.zero_grad()
            loss.backward()
            assert all(bool((p.grad != 0).any()) for p in model.parameters())
            optimiser.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # renamed in newer transformers
def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with patch(model, StickBreakingConfig(early_stop=1e-3)):
            model(tokens(2), labels=tokens(2)).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_softmax_model_warns_that_it_needs_training():
    model = tiny()
    with (
        pytest.warns(LongspanWarning, match=r"trained.*again.*without_positions"),
        patch(model, StickBreakingConfig()),
    ):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with patch(model, "window:window=4"):
            pass


def test_profile_of_a_patched_model():
    from longspan.eval.spans import span_profile

    model = tiny(attention="sdpa")
    with patch(model, StickBreakingConfig()):
        rows = span_profile(model, tokens(1, 40), thresholds=(0.5,))
    assert [(row["layer"], row["head"]) for row in rows] == list(
        itertools.product((0, 1), range(4))
    )
    assert {row["mechanism"] for row in rows} == {"stick_breaking"}
    assert {row["mechanism"] for row in span_profile(model, tokens(1, 40))} == {"softmax"}
