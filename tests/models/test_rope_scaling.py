"""RoPE beyond its length: NTK and YaRN keep what they say they keep."""

import dataclasses
import math

import pytest
import torch

from longspan.errors import ConfigError
from longspan.models import Transformer, TransformerConfig
from longspan.models.rope_scaling import RopeScaling, rope_frequencies


def test_ntk_divides_the_lowest_frequency_and_keeps_the_highest():
    plain, _ = rope_frequencies(64, 10_000.0)
    scaled, length = rope_frequencies(
        64, 10_000.0, RopeScaling(method="ntk", factor=8.0, trained_length=2048)
    )
    assert length == 1.0
    assert scaled[0] == plain[0]
    torch.testing.assert_close(scaled[-1], plain[-1] / 8)
    assert (scaled[1:] < plain[1:]).all()


def test_yarn_keeps_fast_divides_slow():
    plain, _ = rope_frequencies(64, 10_000.0)
    scaled, length = rope_frequencies(
        64, 10_000.0, RopeScaling(method="yarn", factor=4.0, trained_length=2048)
    )
    turns = 2048 * plain / (2 * math.pi)
    assert (turns > 32).sum() > 3
    assert (turns < 1).sum() > 3
    torch.testing.assert_close(scaled[turns > 32], plain[turns > 32], rtol=0, atol=0)
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / 4, rtol=1e-12, atol=0)
    assert length == pytest.approx(1 + 0.1 * math.log(4))


@pytest.mark.parametrize("method", ["ntk", "yarn"])
def test_factor_one_changes_nothing(method):
    config = TransformerConfig(vocab_size=20, width=32, layers=1)
    model = Transformer(config)
    with torch.no_grad():  # large enough for attention to matter
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    scaling = RopeScaling(method=method, factor=1.0, trained_length=16)
    scaled = Transformer(dataclasses.replace(config, rope_scaling=scaling))
    scaled.load_state_dict(model.state_dict())
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids), scaled(ids))
    far = dataclasses.replace(scaling, factor=4.0)
    other = Transformer(dataclasses.replace(config, rope_scaling=far))
    other.load_state_dict(model.state_dict())
    assert (other(ids) - model(ids)).abs().max() > 1e-2


def test_is_kept_as_json():
    scaling = RopeScaling(method="yarn", factor=4.0, trained_length=16)
    config = TransformerConfig(vocab_size=20, rope_scaling=scaling)
    assert TransformerConfig.from_json(config.to_json()) == config
    plain = TransformerConfig(vocab_size=20)
    assert "rope_scaling" not in plain.to_json()
    assert TransformerConfig.from_json(plain.to_json()) == plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "yarm", "factor": 2.0, "trained_length": 9}, "yarn"),
        ({"method": "yarn", "factor": 0.5, "trained_length": 9}, "at least 1"),
        ({"method": "ntk", "factor": 2.0, "trained_length": 0}, "at least 1"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ConfigError, match=message):
        RopeScaling(**settings)


def test_needs_rope():
    scaling = RopeScaling(method="ntk", factor=2.0, trained_length=16)
    with pytest.raises(ConfigError, match="only 'rope'"):
        TransformerConfig(vocab_size=20, positions="none", rope_scaling=scaling)
