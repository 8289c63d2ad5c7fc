"""A feed-forward layer in chunks equals itself, with less kept for the backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from longspan import ConfigError
from longspan.nn import ChunkedMLP


@pytest.mark.parametrize("length", [0, 1, 7, 16, 23])
def test_chunks_equal_the_whole(length):
    mlp = nn.Sequential(nn.Linear(6, 24), nn.SiLU(), nn.Linear(24, 5)).double()
    chunked = ChunkedMLP(mlp, chunk_size=8)
    x, y = (torch.randn(2, length, 6, dtype=torch.float64) for _ in range(2))
    y = x.clone().requires_grad_()
    x.requires_grad_()
    up = torch.randn(2, length, 5, dtype=torch.float64)
    want = torch.autograd.grad(mlp(x), [x, *mlp.parameters()], up)
    out = chunked(y)
    torch.testing.assert_close(out, mlp(x))
    got = torch.autograd.grad(out, [y, *mlp.parameters()], up)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(chunked(x), mlp(x))


def test_inner_activations_are_not_kept():
    mlp = nn.Sequential(nn.Linear(4, 400), nn.SiLU(), nn.Linear(400, 4))

    def kept(module):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            module(torch.randn(1, 64, 4, requires_grad=True)).sum()
        return sum(sizes)

    assert kept(ChunkedMLP(mlp, 8)) < 0.1 * kept(mlp)
    assert next(iter(ChunkedMLP(mlp, 8).state_dict())) == "mlp.0.weight"


def test_refusals():
    for size in (0, 2.0, True):
        with pytest.raises(ConfigError, match="chunk_size is"):
            ChunkedMLP(nn.Linear(2, 2), size)
