"""The convolution as a control variate of sampled keys: unbiased, exact where the model is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hyper_cases import CHUNKS

from conv_cases import rotated
from longspan import ConfigError, HyperConfig, hyper_attention, hyper_attention_with_lse
from longspan.conv_basis.impl.means import mean_factors, mean_model
from longspan.testing import make_qkv, relative_error, softmax_oracle

SAMPLED = ("uniform", "stratified", "value_norm")


def controlled(name, weight=1.0, **settings):
    return replace(CHUNKS[name], control_weight=weight, **settings)


@pytest.mark.parametrize("rope_base", [None, 100.0])
def test_factors_are_the_mean_model(rope_base):
    q, k, _ = make_qkv(2, 4, 30, 8, kv_heads=2, dtype=torch.float64)
    lengths = torch.tensor([30, 21])
    model = mean_model(q, k, lengths, 0.3, rope_base, 5)
    left, right = mean_factors(q, k, lengths, 0.3, rope_base, 5)
    scores = left @ right.repeat_interleave(2, 1).mT
    lag = torch.arange(30)[:, None] - torch.arange(30)
    kernel = model.log_kernel[:, :, 0][..., lag.clamp(min=0)]
    want = kernel + model.row_offset.unsqueeze(-1) + model.key_offset.unsqueeze(-2)
    seen = (lag >= 0) & (torch.arange(30) < lengths[:, None])[:, None, None]
    torch.testing.assert_close(torch.where(seen, scores, 0.0), torch.where(seen, want, 0.0))


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("lengths", [None, [90, 71]])
def test_eager_is_the_reference_with_gradients(name, lengths):
    leaves = [t.requires_grad_() for t in make_qkv(2, 4, 90, 8, kv_heads=2, dtype=torch.float64)]
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    config = controlled(name, 0.7, control_rope_base=100.0)
    results = []
    for impl in ("eager", "reference"):
        part = hyper_attention_with_lse(*leaves, is_causal=True, enable_gqa=True, impl=impl,
                                        key_lengths=lengths, config=config)  # fmt: skip
        seen = torch.where(part.lse == float("-inf"), 0.0, part.lse)
        loss = part.output.square().sum() + seen.sum()
        results.append((*part, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLED)
def test_controlled_row_sums_are_unbiased(name):
    """The mean of exp(lse) and of exp(lse) * output over seeds is that of exact attention."""
    q, k, v = make_qkv(1, 2, 100, 8, dtype=torch.float64)
    exact = softmax_oracle(q, k, v, is_causal=True)
    sums, products, seeds = 0.0, 0.0, 300
    for seed in range(seeds):
        part = hyper_attention_with_lse(q, k, v, is_causal=True, config=controlled(name, 0.5),
                                        seed=seed)  # fmt: skip
        share = torch.exp(part.lse - exact.lse)
        sums, products = sums + share, products + share.unsqueeze(-1) * part.output
    mean = (sums / seeds)[..., 48:]
    assert (mean.mean() - 1).abs() < 0.01
    assert (mean - 1).abs().max() < 0.15
    assert relative_error(products / seeds, exact.output) < 0.08


def test_exact_where_the_model_is():
    """Constant content under rotation is the mean model: no sampling error is left."""

    def constant(*shape):
        return rotated(torch.randn(*shape, dtype=torch.float64).expand(-1, -1, 300, -1))

    q, k = constant(1, 2, 1, 16), constant(1, 2, 1, 16)
    v = torch.randn(1, 2, 300, 8, dtype=torch.float64)
    exact = softmax_oracle(q, k, v, is_causal=True).output
    plain = hyper_attention(q, k, v, is_causal=True, config=CHUNKS["uniform"])
    got = hyper_attention(q, k, v, is_causal=True,
                          config=controlled("uniform", control_rope_base=100.0))  # fmt: skip
    assert relative_error(plain, exact) > 0.05
    assert relative_error(got, exact) < 1e-6  # weights of samples are kept in float32


def test_variance_falls_near_the_model():
    """Content that moves little around its mean: the controlled estimate is much closer."""
    noise = make_qkv(1, 2, 400, 16, dtype=torch.float64)
    common = torch.randn(2, 1, 2, 1, 16, dtype=torch.float64)
    q, k = (rotated(1.5 * c + 0.05 * t) for c, t in zip(common, noise[:2], strict=True))
    exact = softmax_oracle(q, k, noise[2], is_causal=True).output
    errors = {}
    for weight in (0.0, 1.0):
        config = controlled("uniform", weight, control_rope_base=100.0)
        errors[weight] = sum(
            relative_error(hyper_attention(q, k, noise[2], is_causal=True, config=config, seed=s),
                           exact) for s in range(5))  # fmt: skip
    assert errors[1.0] < 0.4 * errors[0.0]


def test_decoding_and_bidirectional_calls_go_without():
    q, k, v = make_qkv(1, 2, 90, 8, dtype=torch.float64)
    for settings in ({"is_causal": False}, {"is_causal": True, "query_offset": 5}):
        plain, got = (hyper_attention(q, k, v, config=c, **settings)
                      for c in (CHUNKS["uniform"], controlled("uniform")))  # fmt: skip
        assert torch.equal(plain, got)


def test_refusals():
    for settings in ({"control_weight": 0.5}, {"control_weight": 2.0, "residual": "uniform"},
                     {"control_weight": True, "residual": "uniform"},
                     {"control_rope_base": 0.5}):  # fmt: skip
        with pytest.raises(ConfigError, match="control_"):
            HyperConfig(**settings)
