"""The search kernel in the interpreter finds the borders of the lock-step search."""

from __future__ import annotations

import pytest
import torch

from conv_cases import planted
from longspan import ConvBasisConfig, conv_basis_attention
from longspan.conv_basis.impl.recover import recover_starts
from longspan.conv_basis.impl.triton.search import search_starts


@pytest.mark.parametrize("dim", [8, 20])
@pytest.mark.parametrize(("near", "sinks"), [(0, 0), (3, 2)])
def test_same_borders_as_lock_step(dim, near, sinks, nan_scratch):
    query, key = torch.randn(2, 4, 41, dim), torch.randn(2, 2, 41, dim)
    query, key = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key))
    lengths = torch.tensor([41, 23])
    key[1, :, 23:] = float("nan")
    config = ConvBasisConfig(num_bases=4, probe_length=5, threshold=4.0, noise=0.1,
                             near_window=near, num_sinks=sinks)  # fmt: skip
    got = search_starts(query, key, lengths, 0.4, config)
    assert torch.equal(got, recover_starts(query, key, lengths, 0.4, config))
    assert (got[..., 1] < 41).any(), "the draw should have borders"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_planted_borders(dtype):
    q, k, v = planted(60, [0, 20, 59], heads=2, dtype=dtype)
    config = ConvBasisConfig(num_bases=4, probe_length=8, min_length=0, threshold=0.5, check_rows=0)
    starts = search_starts(q, k, torch.tensor([60]), 0.25, config)
    assert starts[0].tolist() == [[0, 20, 59, 60]] * 2
    out = conv_basis_attention(q, k, v, config=config, impl="triton")
    eager = conv_basis_attention(q, k, v, config=config, impl="eager")
    torch.testing.assert_close(out, eager, rtol=0.0, atol=1e-5 if dtype is torch.float32 else 2e-2)


def test_empty_and_length_one():
    config = ConvBasisConfig(num_bases=3)
    q = torch.randn(1, 2, 1, 8)
    assert search_starts(q, q, torch.tensor([1]), 1.0, config).tolist() == [[[0, 1, 1]] * 2]
    assert search_starts(q, q, torch.tensor([0]), 1.0, config).tolist() == [[[1, 1, 1]] * 2]
    q = torch.randn(0, 2, 5, 8)
    lengths = torch.zeros(0, dtype=torch.int64)
    assert search_starts(q, q, lengths, 1.0, config).shape == (0, 2, 3)


def test_the_threshold_shrinks_with_the_entries_that_are_left():
    """The last column has one entry: it is compared with an eighth of the threshold."""
    q, k, _ = planted(60, [0, 59], heads=1, dtype=torch.float32)
    change = 0.25 * float((q[0, 0, 59] @ k[0, 0, 59] - q[0, 0, 0] @ k[0, 0, 0]).abs())
    config = ConvBasisConfig(num_bases=2, probe_length=8, threshold=8 * 0.9 * change, noise=0.0)
    assert search_starts(q, k, torch.tensor([60]), 0.25, config).tolist() == [[[0, 59]]]
