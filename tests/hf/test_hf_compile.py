"""torch.compile(fullgraph=True) of a patched model: no graph break, same result, calls counted."""

from __future__ import annotations

import pytest
import torch
from tiny_models import distance, padded, positions, tiny, tokens
from transformers import DynamicCache, StaticCache

from longspan import ExactConfig, WindowConfig
from longspan.hf import make_cache, patch

EXACT = ExactConfig()
SMALL = WindowConfig(window=3, num_sinks=1)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def run(model, **inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=inputs.get("past_key_values") is not None).logits


@pytest.mark.parametrize("config", [EXACT, SMALL], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_forward(kind, config):
    model = tiny(kind)
    with patch(model, config) as report:
        expected = run(model, input_ids=tokens())
        report.reset_counts()
        actual = run(compiled(model), input_ids=tokens())
        assert distance(actual, expected) < 1e-5
        layers = model.config.num_hidden_layers
        assert report.compiled_calls == layers
        assert (report.approximate_calls, report.exact_calls) == (0, 0)


def test_counters_do_not_recompile():
    model = tiny()
    with patch(model, SMALL) as report:
        report.reset_counts()
        fast = compiled(model)
        run(fast, input_ids=tokens())
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                run(fast, input_ids=tokens())
        assert report.compiled_calls == 8


def test_backward():
    model = tiny().train()
    with patch(model, SMALL):
        ids = tokens()
        model(ids, labels=ids).loss.backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        compiled(model)(ids, labels=ids).loss.backward()
        for parameter, grad in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", [EXACT, SMALL], ids=str)
@pytest.mark.parametrize("side", ["left", "both", "none"])
def test_padded_batches(config, side):
    model = tiny(num_hidden_layers=1)
    mask = padded(side)
    inputs = {"input_ids": tokens(3), "position_ids": positions(mask), "attention_mask": mask}
    with patch(model, config):
        expected = run(model, **inputs)
        actual = run(compiled(model), **inputs)
    assert distance(actual, expected, mask) < 1e-5


@pytest.mark.parametrize("config", [EXACT, SMALL], ids=str)
@pytest.mark.parametrize("side", ["none", "left"])
def test_decoding_with_a_full_cache(config, side):
    model = tiny(num_hidden_layers=1)
    mask, ids = padded(side), tokens(3)
    position_ids = positions(mask)

    def steps(step_model):
        cache, parts = DynamicCache(config=model.config), []
        for start, end in ((0, 9), (9, 13), (13, 14)):
            parts.append(run(
                model if start == 0 else step_model, input_ids=ids[:, start:end],
                position_ids=position_ids[:, start:end], attention_mask=mask[:, :end],
                past_key_values=cache,
            ))  # fmt: skip
        return torch.cat(parts, 1)

    with patch(model, config):
        assert distance(steps(compiled(model)), steps(model), mask) < 1e-5


@pytest.mark.parametrize("config", [EXACT, SMALL], ids=str)
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("with_mask", [True, False])
def test_decoding_with_a_static_cache(config, side, with_mask):
    """The position of the query is a tensor then, which tracing cannot read."""
    if side == "left" and not with_mask:
        pytest.skip("left padding is known from the mask only")
    model = tiny(num_hidden_layers=1)
    mask, ids = padded(side), tokens(3)
    position_ids = positions(mask)

    def steps(step_model):
        cache, parts = StaticCache(config=model.config, max_cache_len=20), []
        for start, end in ((0, 9), (9, 13), (13, 14)):
            parts.append(run(
                model if start == 0 else step_model, input_ids=ids[:, start:end],
                position_ids=position_ids[:, start:end], past_key_values=cache,
                attention_mask=mask[:, :end] if with_mask else None,
            ))  # fmt: skip
        return torch.cat(parts, 1)

    with patch(model, config):
        assert distance(steps(compiled(model)), steps(model), mask) < 1e-5


def test_hidden_queries_of_a_compiled_static_step_are_noticed():
    model = tiny()
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[0, 11] = 0
    with patch(model, SMALL):
        cache = StaticCache(config=model.config, max_cache_len=20)
        run(model, input_ids=tokens(3, 9), past_key_values=cache)
        with pytest.raises(RuntimeError, match="hides a query token in a compiled step"):
            run(compiled(model), input_ids=tokens(3, 3), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("config", [EXACT, SMALL], ids=str)
def test_packed_documents(config):
    model = tiny(num_hidden_layers=1)
    ids, cu = tokens(1, 14), torch.tensor([0, 4, 10, 14], dtype=torch.int32)
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    bounds = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 6, "max_length_k": 6}
    with patch(model, config):
        expected = run(model, input_ids=ids, position_ids=position_ids)
        actual = run(compiled(model), input_ids=ids, position_ids=position_ids, **bounds)
        assert distance(actual, expected) < 1e-5
        with pytest.raises(RuntimeError, match="need cu_seq_lens_q"):
            run(compiled(model), input_ids=ids, position_ids=position_ids)


def test_compiled_before_and_after_the_patch():
    """A compiled model follows the patch and its end: nothing is baked in."""
    model = tiny(num_hidden_layers=1)
    fast = compiled(model)
    plain = run(fast, input_ids=tokens())
    with patch(model, SMALL):
        expected = run(model, input_ids=tokens())
        assert distance(run(fast, input_ids=tokens()), expected) < 1e-5
    assert distance(run(fast, input_ids=tokens()), plain) < 1e-6
    with patch(model, WindowConfig(window=2, num_sinks=0)):
        expected = run(model, input_ids=tokens())
        assert distance(run(fast, input_ids=tokens()), expected) < 1e-5


def test_bounded_caches_break_the_graph_but_not_the_result():
    model = tiny(num_hidden_layers=1)
    mask = padded("left")
    inputs = {"input_ids": tokens(3), "position_ids": positions(mask), "attention_mask": mask}
    with patch(model, SMALL):
        expected = run(model, **inputs, past_key_values=make_cache(model))
        loose = torch.compile(model, backend="eager")
        actual = run(loose, **inputs, past_key_values=make_cache(model))
        assert distance(actual, expected, mask) < 1e-5
        with pytest.raises(torch._dynamo.exc.Unsupported, match="make_cache changes its length"):
            run(compiled(model), **inputs, past_key_values=make_cache(model))


@pytest.mark.slow
def test_inductor():
    model = tiny(num_hidden_layers=1)
    with patch(model, SMALL):
        expected = run(model, input_ids=tokens())
        fast = torch.compile(model, fullgraph=True)
        assert distance(run(fast, input_ids=tokens()), expected) < 1e-5
