"""Conv-Basis attention: exact where it must be, equal to its dense reference, certified, routed."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

import longspan
from conv_cases import planted
from longspan import (
    ConfigError,
    ConvBasisConfig,
    LongspanWarning,
    ShapeError,
    UnsupportedError,
    conv_basis_apply,
    conv_basis_attention,
    conv_basis_attention_varlen,
    conv_basis_attention_with_lse,
    conv_basis_check,
    conv_basis_recover,
    exact_attention_with_lse,
)
from longspan.conv_basis.impl.certificate import sample_rows
from longspan.conv_basis.ops import exact_heads, find_starts, find_violations
from longspan.testing import assert_within_budget

BARE = ConvBasisConfig(min_length=0, check_rows=0, num_bases=5, threshold=3.0)
SETTINGS = [
    BARE,
    dataclasses.replace(BARE, near_window=7, num_sinks=3),
    dataclasses.replace(BARE, num_sinks=2),
    dataclasses.replace(BARE, recover="grid", near_window=4),
    dataclasses.replace(BARE, recover="segment", near_window=5, num_sinks=1),
    dataclasses.replace(BARE, recover="means", near_window=6, num_sinks=2, rope_base=100.0),
    dataclasses.replace(BARE, recover="means"),
]


def noise(n=90, heads=4, kv_heads=2, dim=8, batch=2, dtype=torch.float64, requires_grad=False):
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, 6))
    return [
        torch.randn(batch, h, n, d, dtype=dtype).requires_grad_(requires_grad) for h, d in shapes
    ]


def run(q, k, v, config, **settings):
    return conv_basis_attention_with_lse(q, k, v, enable_gqa=True, config=config, **settings)


@pytest.mark.parametrize("config", SETTINGS)
@pytest.mark.parametrize("lengths", [None, [90, 41]])
def test_equals_the_dense_reference_with_gradients(config, lengths):
    q, k, v = noise(requires_grad=True)
    if lengths is not None:
        lengths = torch.tensor(lengths, dtype=torch.int32)
    got = run(q, k, v, config, key_lengths=lengths)
    want = run(q, k, v, config, key_lengths=lengths, impl="reference")
    torch.testing.assert_close(got.output, want.output, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-8, atol=1e-10)
    upstream, upstream_lse = torch.randn_like(got.output), torch.randn_like(got.lse)
    grads = [
        torch.autograd.grad((p.output * upstream).sum() + (p.lse * upstream_lse).sum(), (q, k, v))
        for p in (got, want)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("recover", ["grid", "binary"])
def test_a_segment_for_each_key_is_exact_attention(recover):
    """k = n. Generic columns all differ, so that the search opens one segment after the other."""
    n = 48
    q, k, v = noise(n)
    config = dataclasses.replace(BARE, num_bases=n, recover=recover, threshold=1e-6, noise=0.0)
    got = run(q, k, v, config)
    want = exact_attention_with_lse(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got.output, want.output)
    torch.testing.assert_close(got.lse, want.lse)


def test_planted_heads_equal_exact_attention():
    q, k, v = planted(700, [0, 150, 151, 600], heads=4, kv_heads=2, batch=2)
    config = ConvBasisConfig(min_length=0, threshold=0.05, noise=0.0, on_violation="raise")
    got = run(q, k, v, config)
    want = exact_attention_with_lse(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got.output, want.output, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_budget_of_low_precision(dtype):
    q, k, v = planted(500, [0, 100, 333], heads=2, dtype=dtype)
    config = dataclasses.replace(BARE, recover="grid", num_bases=4)
    oracle = run(q.double(), k.double(), v.double(), config, impl="reference")
    plain = run(q, k, v, config, impl="reference")
    got = run(q, k, v, config)
    assert got.output.dtype is dtype
    if dtype is torch.float32:  # a transform rounds relative to its block, not to each element
        error = (got.output - oracle.output).norm(dim=-1) / oracle.output.norm(dim=-1)
        assert error.max() <= 1e-4
    else:
        assert_within_budget(got.output, oracle.output, plain.output, factor=2.0)
    assert (got.lse.double() - oracle.lse).abs().max() < 1e-4


def test_gradcheck():
    q, k, v = noise(14, 2, 1, 4, 1, requires_grad=True)
    for config in (BARE, dataclasses.replace(BARE, recover="means", near_window=3, num_sinks=1)):
        assert torch.autograd.gradcheck(lambda q, k, v, c=config: tuple(run(q, k, v, c)), (q, k, v))


def test_exact_gradient_is_that_of_exact_attention():
    q, k, v = noise(60, requires_grad=True)
    approximate = run(q, k, v, dataclasses.replace(BARE, gradient="exact"))
    plain = run(q, k, v, BARE)
    torch.testing.assert_close(approximate.output, plain.output)
    exact = exact_attention_with_lse(q, k, v, is_causal=True, enable_gqa=True)
    upstream, upstream_lse = torch.randn_like(plain.output), torch.randn_like(plain.lse)
    grads = [
        torch.autograd.grad((p.output * upstream).sum() + (p.lse * upstream_lse).sum(), (q, k, v))
        for p in (approximate, exact, plain)
    ]
    for got, want, other in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)
        assert not torch.allclose(got, other)


def test_heads_unlike_a_convolution_fall_back_alone():
    """Head 0 is planted, head 1 is noise: the first stays, the second is exact."""
    q, k, v = planted(300, [0, 90], heads=2)
    q[:, 1], k[:, 1] = torch.randn(1, 300, 16), 2 * torch.randn(1, 300, 16)
    config = ConvBasisConfig(min_length=0, threshold=0.05, noise=0.0)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    got = run(*leaves, config)
    bare = run(*leaves, dataclasses.replace(config, on_violation="return"))
    exact = exact_attention_with_lse(*leaves, is_causal=True)
    assert torch.equal(got.output[:, 0], bare.output[:, 0])
    assert not torch.allclose(got.output[:, 1], bare.output[:, 1], atol=1e-2)
    torch.testing.assert_close(got.output[:, 1], exact.output[:, 1])
    torch.testing.assert_close(got.lse[:, 1], exact.lse[:, 1])
    upstream = torch.randn_like(v)
    grads = [torch.autograd.grad(p.output, leaves, upstream) for p in (got, bare, exact)]
    for mine, approximate, dense in zip(*grads, strict=True):
        torch.testing.assert_close(mine[:, 0], approximate[:, 0])
        torch.testing.assert_close(mine[:, 1], dense[:, 1])


def test_violations_warn_raise_or_pass():
    q, k, v = noise(80)
    config = ConvBasisConfig(min_length=0, num_bases=3)
    with pytest.warns(LongspanWarning, match="8 of 8 heads.*near_window"):
        warned = run(q, k, v, dataclasses.replace(config, on_violation="warn")).output
    with pytest.raises(UnsupportedError, match="on_violation='exact'"):
        run(q, k, v, dataclasses.replace(config, on_violation="raise"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        passed = run(q, k, v, dataclasses.replace(config, on_violation="return")).output
    assert torch.equal(warned, passed)


@pytest.mark.parametrize("config", SETTINGS[:6])
def test_certificate_is_what_it_says(config):
    """Distances are those of the dense weights; the output error stays below 2 TV R."""
    q, k, v = noise(batch=1)
    basis = conv_basis_recover(q, k, enable_gqa=True, config=config)
    stats = conv_basis_check(basis, q, k, check_rows=40, seed=3)
    eye = torch.eye(90, dtype=torch.float64).expand(1, 2, 90, 90)
    model = run(q, k, eye, config, impl="reference").output
    exact = exact_attention_with_lse(q, k, eye, is_causal=True, enable_gqa=True).output
    distances = 0.5 * (model - exact).abs().sum(-1)  # (1, H, N)
    rows = stats.rows[0]
    torch.testing.assert_close(stats.distances[0], distances[0][:, rows])
    got = run(q, k, v, config).output
    want = exact_attention_with_lse(q, k, v, is_causal=True, enable_gqa=True).output
    value = v.repeat_interleave(2, 1)
    radius = (value - value.mean(2, keepdim=True)).norm(dim=-1).amax(-1)
    error = (got - want).norm(dim=-1)[0][:, rows]
    assert (error <= 2 * stats.distances[0] * radius[0][:, None] + 1e-9).all()
    assert (stats.mean <= stats.upper_bound(0.9)).all()
    assert (stats.p95 <= 1).all()


def test_bound_on_the_mean_covers():
    """Over 200 draws of rows, the 80 % bound fails in at most 20 % (it is conservative)."""
    from longspan.conv_basis.impl.certificate import spread_bound

    truth = torch.rand(10000).square()
    missed = 0
    for seed in range(200):
        rows = sample_rows(torch.tensor([10000]), 64, seed)[0]
        late = torch.cat((truth, truth[5000:], truth[5000:])).mean()  # what the rows are drawn from
        missed += bool(spread_bound(truth[rows], 0.8) < late)
    assert missed <= 40


def test_packed_documents_do_not_mix():
    cu = torch.tensor([0, 70, 70, 190, 191], dtype=torch.int32)
    q, k, v = (torch.randn(191, 2, 8, dtype=torch.float64) for _ in range(3))
    packed = conv_basis_attention_varlen(q, k, v, cu, cu, 120, 120, config=BARE)
    for start, end in ((0, 70), (70, 190), (190, 191)):
        part = [t[start:end].transpose(0, 1)[None] for t in (q, k, v)]
        alone = conv_basis_attention(*part, config=BARE)[0].transpose(0, 1)
        torch.testing.assert_close(packed[start:end], alone)


def test_padding_does_not_matter():
    q, k, v = noise()
    lengths = torch.tensor([90, 41], dtype=torch.int32)
    config = dataclasses.replace(SETTINGS[1], check_rows=16)
    before = run(q, k, v, config, key_lengths=lengths).output
    k[1, :, 41:], v[1, :, 41:] = float("nan"), float("inf")
    after = run(q, k, v, config, key_lengths=lengths).output
    assert torch.equal(before, after)
    alone = [t[1:, :, :41] for t in (q, k, v)]
    torch.testing.assert_close(after[1:, :, :41], run(*alone, config).output)


def test_grid_without_check_is_causal():
    q, k, v = noise()
    config = dataclasses.replace(BARE, recover="grid", near_window=4)
    before = run(q, k, v, config).output
    for t in (q, k, v):
        t[:, :, 60:] = torch.randn_like(t[:, :, 60:])
    after = run(q, k, v, config).output
    torch.testing.assert_close(before[:, :, :60], after[:, :, :60], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(before[:, :, 60:], after[:, :, 60:])


def test_apply_reuses_a_basis():
    q, k, v = noise()
    for config in (BARE, SETTINGS[1]):
        basis = conv_basis_recover(q, k, enable_gqa=True, config=config)
        for value in (v, torch.randn(2, 4, 90, 3, dtype=torch.float64)):
            got = conv_basis_apply(basis, value)
            if value.shape[1] == 2:
                want = run(q, k, value, config).output
            else:
                k4 = k.repeat_interleave(2, 1)
                want = run(q, k4, value, config).output
            torch.testing.assert_close(got, want)
    with pytest.raises(ShapeError, match="H_kv a divisor of 4"):
        conv_basis_apply(basis, v[:, :, :7])


@pytest.mark.parametrize("n", [1, 2, 17])
@pytest.mark.parametrize("config", SETTINGS)
def test_short_sequences(n, config):
    q, k, v = noise(n)
    got = run(q, k, v, config)
    want = run(q, k, v, config, impl="reference")
    torch.testing.assert_close(got.output, want.output)
    torch.testing.assert_close(got.output[:, :, 0], v.repeat_interleave(2, 1)[:, :, 0])


def test_constant_and_zero_inputs():
    q = torch.zeros(1, 2, 100, 8)
    v = torch.randn(1, 2, 100, 8)
    got = conv_basis_attention(q, q, v, config=ConvBasisConfig(min_length=0, on_violation="raise"))
    mean = v.cumsum(2) / torch.arange(1, 101)[:, None]
    torch.testing.assert_close(got, mean, rtol=1e-4, atol=1e-5)


def test_same_bits_again():
    q, k, v = noise(dtype=torch.float32, requires_grad=True)
    config = dataclasses.replace(SETTINGS[1], check_rows=16, max_tv=0.5)

    def once():
        out = run(q, k, v, config).output
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


def test_decoding_and_chunks_are_exact():
    q, k, v = noise()
    got = run(q[:, :, 80:], k, v, BARE, query_offset=80)
    want = exact_attention_with_lse(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got.output, want.output[:, :, 80:])
    told = longspan.explain(q[:, :, 80:], k, v, BARE, is_causal=True, query_offset=80,
                            enable_gqa=True)  # fmt: skip
    assert "exact attention: the queries of earlier tokens" in str(told)
    assert told.visited_fraction == 1.0
    assert longspan.explain(q, k, v, BARE, is_causal=True, enable_gqa=True).visited_fraction < 1


def test_means_model_is_exact_for_constant_content():
    """Rotated constants: the closed form from means, with the rotary base, is the score itself."""
    q, k, v = planted(200, [0], heads=2)
    config = dataclasses.replace(BARE, recover="means", rope_base=100.0)
    got = run(q, k, v, config)
    want = exact_attention_with_lse(q, k, v, is_causal=True)
    torch.testing.assert_close(got.output, want.output)
    torch.testing.assert_close(got.lse, want.lse)


def test_means_model_carries_key_offsets():
    """No rotation, keys = mean + their own part: scores separate exactly for constant queries."""
    k = torch.randn(1, 2, 150, 8, dtype=torch.float64)
    q = torch.randn(1, 2, 1, 8, dtype=torch.float64).expand(-1, -1, 150, -1)
    v = torch.randn(1, 2, 150, 8, dtype=torch.float64)
    got = run(q, k, v, dataclasses.replace(BARE, recover="means"))
    want = exact_attention_with_lse(q, k, v, is_causal=True)
    torch.testing.assert_close(got.output, want.output)
    torch.testing.assert_close(got.lse, want.lse)


def test_opcheck():
    q, k, v = (t.requires_grad_() for t in noise(40, 2, 1, 8, 1, dtype=torch.bfloat16))
    lengths = torch.tensor([40])
    torch.library.opcheck(
        find_starts, (q.detach(), k.detach(), lengths, 0.3, 3, 4, 1.0, 0.0, "binary", 0, 0, "eager")
    )
    out, lse = (t.detach().requires_grad_() for t in run(q, k, v, BARE))
    chosen = torch.tensor([[True, False]])
    for exact in (False, True):
        torch.library.opcheck(
            exact_heads,
            (q.float().detach().requires_grad_(), k.float().detach().requires_grad_(),
             v.float().detach().requires_grad_(), None, out.float().detach().requires_grad_(),
             lse, chosen, 0.3, exact),
        )  # fmt: skip
    basis = conv_basis_recover(q.detach(), k.detach(), enable_gqa=True, config=BARE)
    torch.library.opcheck(
        find_violations,
        (q.detach(), k.detach(), lengths, basis.log_kernels, basis.starts, None, None,
         lse.detach(), 0.3, 0, 0, 8, 0.5, "exact", 0, "eager"),
    )  # fmt: skip


@pytest.mark.parametrize("config", [SETTINGS[0], SETTINGS[1], SETTINGS[5]])
def test_compiles_whole_with_gradients(config):
    q, k, v = noise(40, dtype=torch.float32, requires_grad=True)
    config = dataclasses.replace(config, check_rows=8, max_tv=0.4)

    def function(q, k, v):
        return conv_basis_attention(q, k, v, enable_gqa=True, config=config)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(2, 4, 40, 6)
    for f in (function, compiled):
        out = f(q, k, v)
        grads = torch.autograd.grad(out, (q, k, v), upstream)
        if f is function:
            want = (out, *grads)
    for a, b in zip((out, *grads), want, strict=True):
        torch.testing.assert_close(a, b)


def test_refusals():
    q, k, v = noise(20, 2, 2)
    with pytest.raises(UnsupportedError, match=r"is_causal is False.*toeplitz_attention"):
        conv_basis_attention(q, k, v, is_causal=False)
    with pytest.raises(ConfigError, match="check_rows is 0"):
        conv_basis_check(conv_basis_recover(q, k), q, k, check_rows=0)
    with pytest.raises(ShapeError, match="made from 2 entries, 2 heads and 20 tokens"):
        conv_basis_check(conv_basis_recover(q, k), q[:, :1], k)


def test_certificate_of_long_padded_sequences():
    """Rows are looked at in groups of as many columns as they see: the same distances."""
    n = 1100
    q, k, _ = noise(n, 2, 1, 8)
    lengths = torch.tensor([n, 700], dtype=torch.int32)
    config = dataclasses.replace(BARE, near_window=5, num_sinks=2)
    basis = conv_basis_recover(q, k, enable_gqa=True, config=config, key_lengths=lengths)
    stats = conv_basis_check(basis, q, k, check_rows=16)
    eye = torch.eye(n, dtype=torch.float64)[:, :200].expand(2, 1, n, 200)
    settings = {"is_causal": True, "enable_gqa": True, "key_lengths": lengths}
    model = run(q, k, eye, config, key_lengths=lengths, impl="reference").output
    exact = exact_attention_with_lse(q, k, eye, **settings).output
    for b in range(2):
        rows = stats.rows[b]
        assert (rows < lengths[b]).all()
        lower = 0.5 * (model - exact).abs().sum(-1)[b][:, rows]  # over the first 200 keys only
        assert (stats.distances[b] >= lower - 1e-9).all()
        early = rows < 200
        torch.testing.assert_close(stats.distances[b][:, early], lower[:, early])
    assert (stats.rows < 200).any()
