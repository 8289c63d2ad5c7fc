"""patch(): what it selects, counts, refuses, and leaves behind (nothing)."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny_models import distance, padded, positions, tiny, tokens
from torch import nn

import longspan
from longspan import ConfigError, ExactConfig, PatchError, WindowConfig
from longspan.hf import LayerPlan, patch

SMALL = WindowConfig(window=3, num_sinks=1)


def snapshot(model):
    """Everything a patch could leave behind."""
    return {
        "config": copy.deepcopy(model.config.to_dict()),
        "implementation": model.config._attn_implementation,
        "modules": {
            name: (module.training, sorted(module.__dict__), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        },
        "parameters": [name for name, _ in model.named_parameters()],
    }


@pytest.fixture
def model():
    return tiny()


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("training", [False, True])
def test_leaves_no_trace(kind, attention, training):
    model = tiny(kind, attention=attention).train(training)
    before, state = snapshot(model), torch.get_rng_state()
    expected = model(tokens()).logits
    with patch(model, SMALL) as report:
        assert distance(model(tokens()).logits, expected) > 1e-2
    assert snapshot(model) == before
    assert torch.equal(model(tokens()).logits, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert not report.active


def test_undone_after_an_exception(model):
    before = snapshot(model)
    with pytest.raises(IndexError), patch(model, SMALL):
        model(tokens() + 1000)
    assert snapshot(model) == before


def test_permanent_until_undone(model):
    before, expected = snapshot(model), model(tokens()).logits
    report = patch(model, SMALL)
    assert distance(model(tokens()).logits, expected) > 1e-2
    report.undo()
    report.undo()
    assert snapshot(model) == before
    with pytest.raises(PatchError, match="undone already"), report:
        pass


def test_patches_do_not_stack(model):
    with patch(model, SMALL) as report:
        with pytest.raises(PatchError, match=r"patched already.*give one patch a mapping"):
            patch(model, ExactConfig())
        model(tokens())
    assert report.approximate_calls == 2


def test_an_implementation_set_inside_is_kept(model):
    with patch(model, SMALL):
        model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("layers", "patched"),
    [
        ("all", [1, 3]), ("global", [1, 3]), ("every", [0, 1, 2, 3]), ("last:1", [3]),
        ("first:1", [1]), (0, [0]), (-1, [3]), ([0, 3], [0, 3]), ("0,1", [0, 1]),
    ],
)  # fmt: skip
def test_selection_on_a_model_with_sliding_layers(layers, patched):
    model = tiny("gemma3")
    with patch(model, WindowConfig(window=3, num_sinks=0), layers) as report:
        model(tokens())
    assert [row.layer for row in report.layers if row.reason is None] == patched
    for row in report.layers:
        assert (row.approximate_calls, row.exact_calls) == (
            (1, 0) if row.layer in patched else (0, 1)
        )
        if row.layer not in patched:
            assert row.reason == ("sliding window" if row.layer in (0, 2) else "not selected")


def test_counts_and_visited_fraction(model):
    with patch(model, SMALL, layers="last:1") as report:
        assert report.visited_fraction is None
        assert (report.approximate_calls, report.exact_calls) == (0, 0)
        model(tokens(2, 10))
        model(tokens(2, 10))
        expected = sum(min(3, i + 1) + (i >= 3) for i in range(10)) / 55
        assert report.visited_fraction == pytest.approx(expected)
        assert (report.approximate_calls, report.exact_calls) == (2, 2)
        assert report.layers[0].visited_fraction == 1.0
        report.reset_counts()
        assert report.visited_fraction is None
        model(tokens(2, 4))  # four keys, all of them visited
        assert (report.approximate_calls, report.exact_calls) == (0, 2)


def test_counts_of_padded_batches_are_those_of_the_real_tokens(model):
    mask = padded("both")
    with patch(model, SMALL, layers=0) as whole:
        model(tokens(3), attention_mask=mask, position_ids=positions(mask))
    with patch(model, SMALL, layers=0) as apart:
        for length in mask.sum(1).tolist():
            model(tokens(1, length))
    assert whole.visited_fraction == pytest.approx(apart.visited_fraction)
    assert whole.layers[0].approximate_calls == 1


def test_report_is_readable_and_plain_data(model):
    with patch(model, SMALL, layers=[1], impl="eager") as report:
        model(tokens())
    text = str(report)
    assert "model.layers.1.self_attn" in text
    assert "not selected" in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["layers"][1]["config"] == {"window": 3, "num_sinks": 1}
    assert data["layers"][0]["reason"] == "not selected"


def test_mixed_plans(model):
    """Each layer runs its own settings: equal to patching the layers one by one."""
    model = tiny(num_hidden_layers=3)
    wide = WindowConfig(window=6, num_sinks=0)
    plan = {"all": ExactConfig(), "last:1": SMALL, 0: wide}
    with patch(model, layers=plan) as report:
        mixed = model(tokens()).logits
    assert [row.config for row in report.layers] == [wide, ExactConfig(), SMALL]
    saved = LayerPlan.from_json(report.plan.to_json())
    with patch(model, saved):
        assert torch.equal(model(tokens()).logits, mixed)
    with patch(model, layers={0: "window:window=6,num_sinks=0", 2: SMALL}):
        assert distance(model(tokens()).logits, mixed) < 1e-6
    with patch(model, SMALL, layers=[2]):
        assert distance(model(tokens()).logits, mixed) > 1e-3


def test_settings_reach_the_mechanism(model):
    with patch(model, SMALL, impl="reference", verify=False):
        expected = model(tokens()).logits
    with patch(model, SMALL, impl="eager", verify=False):
        assert distance(model(tokens()).logits, expected) < 1e-5
    with pytest.raises(ConfigError, match="impl is 'fast'"):
        patch(model, SMALL, impl="fast")
    with pytest.raises(PatchError, match=r"failed on two tokens.*'speed'.*verify=False"):
        patch(model, SMALL, speed=3)
    assert model.config._attn_implementation == "eager"


def test_strings_are_parsed(model):
    with patch(model, "window:window=3,num_sinks=1") as report:
        pass
    assert report.plan.configs == {0: SMALL, 1: SMALL}


def test_refuses_models_without_attention_layers():
    with pytest.raises(PatchError, match=r"no attention layers.*patched_sdpa"):
        patch(nn.Linear(2, 2), SMALL)


def test_refuses_when_nothing_is_selected():
    with pytest.raises(PatchError, match=r"selects none of the 2.*2 have a sliding window"):
        patch(tiny("mistral_sliding"), SMALL)


def test_refuses_encoder_decoders():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(PatchError, match="is an encoder-decoder"):
        patch(T5ForConditionalGeneration(config), SMALL)


def test_refuses_models_that_ignore_the_interface(model):
    """As remote code may: the attention module computes by itself."""
    kind = type(model.model.layers[1].self_attn)

    class OwnAttention(kind):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    model.model.layers[1].self_attn.__class__ = OwnAttention
    before = snapshot(model)
    with pytest.raises(PatchError, match=r"1 of 2 attention layers never called.*layers\.1"):
        patch(model, SMALL)
    assert snapshot(model) == before


def test_refuses_models_whose_source_never_asks(model, monkeypatch):
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(PatchError, match="never asks transformers' attention interface"):
        patch(model, SMALL)


def test_refuses_unknown_settings_before_touching_the_model(model):
    before = snapshot(model)
    with pytest.raises(ConfigError, match="Did you mean 'window'"):
        patch(model, "windw:window=3")
    with pytest.raises(ConfigError, match="belongs to no mechanism"):
        patch(model, object())
    with pytest.raises(ConfigError, match="out of range"):
        patch(model, SMALL, layers=7)
    assert snapshot(model) == before


def test_longspan_as_a_plain_implementation_is_exact():
    longspan.hf.register()
    expected = tiny()(tokens()).logits
    model = tiny(attention="longspan")
    assert distance(model(tokens()).logits, expected) < 1e-5
    before = snapshot(model)
    with patch(model, SMALL):
        assert distance(model(tokens()).logits, expected) > 1e-2
    assert snapshot(model) == before


def test_a_copy_of_a_patched_model_has_its_own_counts(model):
    with patch(model, SMALL) as report:
        copied = copy.deepcopy(model)
        copied(tokens())
    assert report.approximate_calls == 0


def test_two_patched_models_do_not_mix(model):
    other = tiny("qwen3")
    with patch(model, SMALL) as first, patch(other, ExactConfig()) as second:
        model(tokens())
        other(tokens())
        other(tokens())
    assert first.approximate_calls == 2
    assert (second.approximate_calls, second.exact_calls) == (0, 4)


def test_scores_are_counted_over_rows_that_see_keys():
    """More queries than keys in a packed call: the first rows see nothing."""
    from longspan.hf.report import Route
    from longspan.mechanisms import get_mechanism

    route = Route.to(get_mechanism("window"), WindowConfig(window=1, num_sinks=0), layer=0, name="")
    route.count(((4, 2), (2, 4)))
    # (4, 2): the last two rows see 1 and 2 keys. (2, 4): the rows see 3 and 4 keys.
    assert route.counts.visible == 1 + 2 + 3 + 4
    assert route.counts.visited == pytest.approx(4)
