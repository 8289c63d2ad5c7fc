"""Recover: planted bases are found, lock-step equals the paper's loop, edges of the sequence."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from conv_cases import as_scores, planted
from longspan import ConvBasisConfig, ShapeError, conv_basis_recover
from longspan.conv_basis.impl.recover import recover_starts, shifted_columns
from longspan.conv_basis.impl.reference import (
    difference_form,
    modelled_scores,
    recover_one_head,
)

N, K, T = 512, 6, 8


def planted_scores(count, eps, seed):
    """(count, N, N) of K sub-convolutions, non-degenerate, plus noise of at most eps; starts."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.zeros(count, N, N, dtype=torch.float64)
    starts = torch.zeros(count, K, dtype=torch.int64)
    lag = torch.arange(N)[:, None] - torch.arange(N)
    for r in range(count):
        inner = torch.randperm(N - 2, generator=generator)[: K - 1].sort().values + 1
        starts[r, 1:] = inner
        for s in starts[r].tolist():
            b = torch.randn(N, generator=generator, dtype=torch.float64)
            scores[r, s:, s:] += torch.where(lag >= 0, b[lag.clamp(min=0)], 0.0)[: N - s, : N - s]
    noise = eps * (2 * torch.rand(scores.shape, generator=generator, dtype=torch.float64) - 1)
    return scores, torch.where(lag >= 0, scores + noise, 0.0), starts


@pytest.mark.parametrize("eps", [0.0, 1e-3, 1e-2])
def test_fifty_of_fifty_planted_bases(eps):
    """Borders found exactly, every score within the paper's 2 eps; also in the last T columns."""
    found = 0
    config = ConvBasisConfig(num_bases=K, probe_length=T, threshold=max(5 * T * eps, 0.1),
                             noise=eps)  # fmt: skip
    late = 0
    for seed in range(5):
        clean, noisy, want = planted_scores(10, eps, seed)
        query, key = as_scores(noisy)
        lengths = torch.full((10,), N)
        starts = recover_starts(query, key, lengths, 1.0, config)
        late += int((want >= N - T).sum())
        kernels = shifted_columns(query, key, starts, 1.0)
        for r in range(10):
            if not torch.equal(starts[r, 0], want[r]):
                continue
            segment = (torch.arange(N)[:, None] >= want[r]).sum(-1) - 1
            lag = torch.arange(N)[:, None] - torch.arange(N)
            model = kernels[r, 0][segment.expand(N, -1), lag.clamp(min=0)]
            error = torch.where(lag >= 0, (model - clean[r]).abs(), 0.0).max()
            found += bool(error <= 2 * eps + 1e-12)
    assert found == 50
    assert late > 0, "the draw should hold starts within the last T columns"


@pytest.mark.parametrize("near_window", [0, 3])
def test_lock_step_equals_the_loop_of_the_paper(near_window):
    """On scores that are not k-conv, too: the same probes, the same borders."""
    torch.manual_seed(1)
    query, key = (torch.randn(2, 4, 90, 8, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([90, 61])
    config = ConvBasisConfig(num_bases=7, probe_length=5, threshold=6.0, noise=0.1,
                             near_window=near_window)  # fmt: skip
    starts = recover_starts(query, key, lengths, 0.3, config)
    for b in range(2):
        for h in range(4):
            scores = 0.3 * query[b, h] @ key[b, h].T
            if near_window:  # the probe begins behind the exact lags
                scores = torch.cat((scores[near_window:], scores.new_zeros(near_window, 90)))
            want = reference_loop(scores, config, int(lengths[b]), near_window)
            got = [s for s in starts[b, h].tolist() if s < 90]
            assert got == want


def reference_loop(scores, config, length, near_window):
    if near_window == 0:
        return recover_one_head(scores, config, length)
    return loop_with_window(scores, config, length, near_window)


def loop_with_window(shifted, config, length, near_window):
    """As `recover_one_head`, over scores whose rows were moved up by the exact lags."""
    n, t = shifted.shape[0], config.probe_length
    starts = [0]
    while len(starts) < config.num_bases:
        low, high = starts[-1] + 1, length
        while low < high:
            middle = (low + high) // 2
            steps = max(min(t, n - near_window - middle), 0)
            head = torch.arange(steps)
            change = (shifted[middle + head, middle] - shifted[starts[-1] + head, starts[-1]]).abs()
            enough = (config.threshold - 2 * t * config.noise) * steps / t
            if steps and float(change.sum()) >= enough:
                high = middle
            else:
                low = middle + 1
        if low >= length:
            break
        starts.append(low)
    return starts


def test_heads_with_different_numbers_of_bases():
    q, k, _ = planted(200, [0], heads=2)
    q2, k2, _ = planted(200, [0, 50, 120], heads=2, seed=1)
    q3, k3, _ = planted(200, [0, 199], heads=2, seed=2)
    query, key = torch.cat((q, q2, q3), 1), torch.cat((k, k2, k3), 1)
    config = ConvBasisConfig(num_bases=5, threshold=0.05, noise=0.0)
    basis = conv_basis_recover(query, key, config=config)
    assert basis.num_bases.tolist() == [[1, 1, 3, 3, 2, 2]]
    assert basis.starts[0, 2].tolist() == [0, 50, 120, 200, 200]
    assert basis.starts[0, 4].tolist() == [0, 199, 200, 200, 200]


@pytest.mark.parametrize("recover", ["grid", "segment"])
def test_other_ways_give_ordered_borders(recover):
    query, key, _ = planted(300, [0, 70, 210], heads=3)
    config = ConvBasisConfig(num_bases=4, recover=recover, num_sinks=2)
    lengths = torch.tensor([300, 130])
    query, key = query.expand(2, -1, -1, -1), key.expand(2, -1, -1, -1)
    starts = recover_starts(query, key, lengths, 0.25, config)
    assert starts.shape == (2, 3, 4)
    assert (starts[..., 0] == 2).all()
    assert (starts[..., 1:] >= starts[..., :-1]).all()
    inside = starts[1][starts[1] < 300]
    assert (inside < 130).all()


def test_segment_finds_planted_borders_up_to_its_grid():
    query, key, _ = planted(512, [0, 128, 320], heads=4)
    config = ConvBasisConfig(num_bases=3, recover="segment")
    starts = conv_basis_recover(query, key, config=config).starts
    step = 512 / (8 * 3)
    assert ((starts - torch.tensor([0, 128, 320])).abs() <= step + 1).all()


def test_grid_does_not_look_at_the_content():
    a, b = torch.randn(1, 2, 100, 8), torch.randn(1, 2, 100, 8)
    config = ConvBasisConfig(num_bases=4, recover="grid")
    starts = conv_basis_recover(a, a, config=config).starts
    assert torch.equal(starts, conv_basis_recover(b, b, config=config).starts)
    assert starts[0, 0].tolist() == [0, 25, 50, 75]


def test_constant_keys_have_one_segment():
    query = torch.ones(1, 1, 64, 8)
    basis = conv_basis_recover(query, query)
    assert basis.num_bases.tolist() == [[1]]
    assert torch.equal(basis.starts[0, 0, 1:], torch.full((15,), 64))


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("recover", ["binary", "grid", "segment", "means"])
def test_shorter_than_the_probe(n, recover):
    query = torch.randn(1, 2, n, 8)
    basis = conv_basis_recover(query, query, config=ConvBasisConfig(recover=recover))
    assert (basis.num_bases >= 1).all()
    assert (basis.num_bases <= n).all()


def test_components_and_the_difference_form():
    """b_r add up to the scores, and the paper's signed evaluation equals the positive segments."""
    query, key, value = planted(120, [0, 30, 31, 90], heads=2)
    config = ConvBasisConfig(num_bases=6, threshold=0.05, noise=0.0)
    basis = conv_basis_recover(query, key, config=config)
    assert basis.num_bases.tolist() == [[4, 4]]
    parts, n = basis.components(), 120
    lag = torch.arange(n)[:, None] - torch.arange(n)
    total = torch.zeros(1, 2, n, n, dtype=torch.float64)
    for h in range(2):
        for r, s in enumerate(basis.starts[0, h].tolist()):
            if s < n:
                block = parts[0, h, r][lag.clamp(min=0)][: n - s, : n - s]
                total[0, h, s:, s:] += block
    scores = modelled_scores(basis)
    seen = lag >= 0
    torch.testing.assert_close(total[..., seen], scores[..., seen])
    signed, positive = difference_form(basis, value), basis.apply(value)
    torch.testing.assert_close(signed.output, positive.output)
    torch.testing.assert_close(signed.lse, positive.lse)


def test_padding_and_neighbours_do_not_matter():
    query, key = torch.randn(2, 2, 80, 8), torch.randn(2, 2, 80, 8)
    config = ConvBasisConfig(num_bases=5, threshold=3.0)
    lengths = torch.tensor([80, 50], dtype=torch.int32)
    both = conv_basis_recover(query, key, key_lengths=lengths, config=config).starts
    key[1, :, 50:] = float("nan")
    again = conv_basis_recover(query, key, key_lengths=lengths, config=config).starts
    assert torch.equal(both, again)
    alone = conv_basis_recover(query[:1], key[:1], config=config).starts
    assert torch.equal(both[:1], alone)


def test_kernel_gradient_reaches_queries_and_anchor_keys():
    query, key, _ = planted(40, [0, 11], heads=1)
    query.requires_grad_(), key.requires_grad_()
    config = ConvBasisConfig(num_bases=2, threshold=0.05, noise=0.0)
    kernels = conv_basis_recover(query, key, config=config).log_kernels
    assert torch.autograd.gradcheck(
        lambda q, k: shifted_columns(q, k, torch.tensor([[[0, 11]]]), 0.3)[..., :29], (query, key)
    )
    kernels[0, 0, 1, :5].sum().backward()
    rows = key.grad[0, 0].abs().sum(-1).nonzero().flatten().tolist()
    assert rows == [11]


def test_lengths_must_agree():
    with pytest.raises(ShapeError, match="8 tokens but key has 9"):
        conv_basis_recover(torch.randn(1, 1, 8, 4), torch.randn(1, 1, 9, 4))


def test_config_refuses_what_cannot_be():
    from longspan import ConfigError

    with pytest.raises(ConfigError, match=r"threshold is 0.1.*2 \* probe_length \* noise = 0.16"):
        ConvBasisConfig(threshold=0.1)
    with pytest.raises(ConfigError, match="Did you mean 'binary'"):
        ConvBasisConfig(recover="binry")
    with pytest.raises(ConfigError, match="num_bases is int 0.*Nearest valid: 1"):
        ConvBasisConfig(num_bases=0)
    with pytest.raises(ConfigError, match="max_tv is 2"):
        ConvBasisConfig(max_tv=2)
    with pytest.raises(ConfigError, match="rope_base is 0.5"):
        ConvBasisConfig(rope_base=0.5)
    assert dataclasses.replace(ConvBasisConfig(), num_bases=3).num_bases == 3
