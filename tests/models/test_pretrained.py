"""The real models: downloaded on first use (marker `models`)."""

import math

import pytest
import torch

from longspan.eval.data import load_text, take_tokens
from longspan.models import load

pytestmark = pytest.mark.models
pytest.importorskip("transformers")


def perplexity(loaded, num_tokens):
    ids = torch.tensor([take_tokens(load_text(), loaded.tokenizer, num_tokens)])
    with torch.no_grad():
        return math.exp(loaded.model(input_ids=ids, labels=ids).loss)


def test_smollm2():
    loaded = load("smollm2-135m")
    settings = loaded.model.config
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
    assert loaded.max_length == 8192
    assert settings.rope_parameters["rope_theta"] == 100_000.0
    assert perplexity(loaded, 1024) == pytest.approx(34.305, rel=0.01)


def test_gemma3():
    loaded = load("gemma3-270m")
    settings = loaded.model.config
    assert sum(p.numel() for p in loaded.model.parameters()) == 268_098_176
    assert loaded.max_length == 32_768
    full = [i for i, kind in enumerate(settings.layer_types) if kind == "full_attention"]
    assert full == [5, 11, 17]
    assert settings.sliding_window == 512
    assert settings.rope_parameters["full_attention"]["rope_theta"] == 1_000_000.0
    assert settings.rope_parameters["sliding_attention"]["rope_theta"] == 10_000.0
    assert take_tokens(load_text(), loaded.tokenizer, 3, start=100)[0] == 2
    assert "ai.google.dev/gemma/terms" in loaded.notice
    assert perplexity(loaded, 1024) == pytest.approx(28.530, rel=0.01)
