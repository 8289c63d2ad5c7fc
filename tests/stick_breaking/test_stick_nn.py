"""The layer: options, chunks equal the whole, gradients reach every parameter."""

from __future__ import annotations

import pytest
import torch

from longspan import ConfigError, StickBreakingConfig, stick_breaking_attention_with_remainder
from longspan.nn import StickBreakingAttention

OPTIONS = [
    {},
    {"remainder": "value", "output_norm": "rms", "qk_norm": True, "bias": True},
    {"remainder": "embedding", "output_norm": "group", "logit_bias": -1.0},
    {"config": StickBreakingConfig(window=4, attend_current=True), "head_dim": 6},
]


def layer(options, seed=0):
    torch.manual_seed(seed)
    module = StickBreakingAttention(16, 4, 2, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("options", OPTIONS)
def test_chunks_equal_the_whole(options):
    module = layer(options)
    hidden = torch.randn(2, 11, 16, dtype=torch.float64)
    whole = module(hidden)
    for sizes in ([11], [1] * 11, [4, 6, 1]):
        outputs, state = [], None
        for part in hidden.split(sizes, 1):
            output, state = module.chunk(part, state)
            outputs.append(output)
        torch.testing.assert_close(torch.cat(outputs, 1), whole, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_reach_every_parameter(options):
    module = layer(options)
    hidden = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    (module(hidden) * torch.randn(2, 9, 16)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


def test_embedding_and_group_norm_are_what_the_authors_compute():
    module = layer({"remainder": "embedding", "output_norm": "group"})
    hidden = torch.randn(2, 7, 16, dtype=torch.float64)
    output, log_rest = stick_breaking_attention_with_remainder(
        *module.project(hidden), enable_gqa=True
    )
    output = output + log_rest.exp().unsqueeze(-1) * module.rest_vector[:, None]
    centred = output - output.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    flat = scaled.transpose(1, 2).flatten(2) * module.norm.weight + module.norm.bias
    torch.testing.assert_close(module(hidden), module.output(flat))


def test_padding_does_not_matter():
    module = layer(OPTIONS[2])
    hidden = torch.randn(2, 9, 16, dtype=torch.float64)
    padded = hidden.clone()
    padded[1, 5:] = float("nan")
    output = module(padded, key_lengths=torch.tensor([9, 5]))
    torch.testing.assert_close(output[0], module(hidden)[0])
    torch.testing.assert_close(output[1, :5], module(hidden[1:, :5])[0])


def test_a_new_layer_drops_the_rest():
    torch.manual_seed(0)
    with_vector = StickBreakingAttention(16, 4, remainder="embedding")
    without = StickBreakingAttention(16, 4)
    missing = without.load_state_dict(with_vector.state_dict(), strict=False)
    assert missing.unexpected_keys == ["rest_vector"]
    hidden = torch.randn(1, 5, 16)
    torch.testing.assert_close(with_vector(hidden), without(hidden))


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((16, 3), {}, "does not divide width"),
        ((16, 4, 3), {}, "does not divide heads"),
        ((16, 0), {}, "heads is 0"),
        ((16, 4), {"remainder": "embeding"}, "Did you mean 'embedding'"),
        ((16, 4), {"output_norm": "layer"}, "Use None for no norm"),
        (
            (16, 4),
            {"remainder": "drop", "config": StickBreakingConfig(remainder="value")},
            "Say it in one place",
        ),
    ],
)
def test_refusals(arguments, options, words):
    with pytest.raises(ConfigError, match=words):
        StickBreakingAttention(*arguments, **options)
