"""The Toeplitz layer: causal, any length, learns a shift that a bag of words cannot."""

from __future__ import annotations

import pytest
import torch

from longspan import ConfigError
from longspan.nn import ToeplitzAttention


@pytest.mark.parametrize("use_content", [True, False])
def test_is_causal_and_takes_any_length(use_content):
    layer = ToeplitzAttention(16, 2, use_content=use_content, max_lag=64).double()
    x = torch.randn(2, 150, 16, dtype=torch.float64)
    whole = layer(x)
    torch.testing.assert_close(layer(x[:, :40]), whole[:, :40], rtol=1e-3, atol=1e-5)
    assert layer(x[:, :0]).shape == (2, 0, 16)
    x[:, 100:] = 5.0
    torch.testing.assert_close(layer(x)[:, :100], whole[:, :100], rtol=1e-3, atol=1e-5)


def test_both_sides_have_kernels_of_their_own():
    layer = ToeplitzAttention(8, 2, is_causal=False)
    with torch.no_grad():
        layer.knots.normal_()
    kernel = layer.log_kernel(5)
    assert kernel.shape == (2, 9)
    x = torch.randn(1, 30, 8)
    before = layer(x)
    x[:, 20:] = 3.0
    assert not torch.allclose(layer(x)[:, :10], before[:, :10])


def test_learns_to_look_two_tokens_back():
    """Target: the token two before. Only a kernel with its mass at lag 2 does that."""
    torch.manual_seed(0)
    layer = ToeplitzAttention(8, 1, num_knots=24, max_lag=32)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(150):
        x = torch.randn(4, 40, 8)
        loss = (layer(x)[:, 2:] - x[:, :-2]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < 0.8 < losses[0]
    assert int(layer.log_kernel(20)[0].argmax()) == 2


def test_sizes_must_fit():
    with pytest.raises(ConfigError, match="width is 10, which 3 heads do not divide"):
        ToeplitzAttention(10, 3)
    with pytest.raises(ConfigError, match="num_knots is 1"):
        ToeplitzAttention(8, 2, num_knots=1)
