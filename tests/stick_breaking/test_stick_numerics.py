"""Saturated and vanishing gates, low precision, early stop within its bound, long sticks."""

from __future__ import annotations

import math

import pytest
import torch

from longspan import (
    StickBreakingConfig,
    UnsupportedError,
    stick_breaking_attention,
    stick_breaking_attention_stats,
    stick_breaking_attention_with_remainder,
)
from longspan.testing import (
    assert_within_budget,
    make_qkv,
    relative_error,
    stick_breaking_oracle,
)


def with_logits(logits, heads=1, value_dim=3, dtype=torch.float64):
    """Inputs whose scores are exactly `logits` (N_q, N_k): one-hot queries, scale 1."""
    n_q, n_k = logits.shape
    q = torch.eye(n_q, dtype=dtype).expand(1, heads, n_q, n_q).contiguous()
    k = logits.to(dtype).T.expand(1, heads, n_k, n_q).contiguous()
    v = torch.randn(1, heads, n_k, value_dim, generator=torch.Generator().manual_seed(3)).to(dtype)
    return tuple(t.requires_grad_() for t in (q, k, v))


@pytest.mark.parametrize("size", [30.0, 80.0, 1000.0])
def test_saturated_logits(impl, size, gradients):
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (24, 24), generator=generator) * 2 - 1
    logits = size * signs * torch.rand(24, 24, generator=generator).clamp(min=0.5)
    dtype = torch.float32
    inputs = with_logits(logits, dtype=dtype)
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    expected = gradients(lambda: stick_breaking_oracle(*wide, scale=1.0), wide)
    actual = gradients(
        lambda: stick_breaking_attention_with_remainder(*inputs, scale=1.0, impl=impl), inputs
    )
    for got, wanted in zip(actual, expected, strict=True):
        assert bool(torch.isfinite(got).all())
        assert relative_error(got.detach(), wanted.detach()) < 2e-5


def test_saturated_gradient_keeps_relative_accuracy():
    # the far key's gate moves nothing: dz is a tiny number, not the rounding of a large one
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-2.0, 30.0, 0.0]])
    results = []
    for dtype in (torch.float32, torch.float64):
        q, k, v = with_logits(logits, dtype=dtype)
        output = stick_breaking_attention(q, k, v, scale=1.0, impl="eager")
        (dk,) = torch.autograd.grad(output[0, 0, 2].sum(), k)
        results.append(dk[0, 0, :2, 2].double())
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=0)
    assert 0 < results[1][1].abs() < 1e-12


@pytest.mark.parametrize("logit", [-40.0, -9.0])
def test_all_logits_negative(impl, logit):
    n = 60
    inputs = with_logits(torch.full((n, n), logit), dtype=torch.float32)
    output, log_rest = stick_breaking_attention_with_remainder(*inputs, scale=1.0, impl=impl)
    taken = torch.arange(n) * torch.nn.functional.softplus(torch.tensor(logit)).item()
    # the kernels multiply 1 / (1 + e): rounding 1 + e costs up to 2**-24 a key
    atol = n * 2.0**-24 if impl == "triton" else 1e-9
    torch.testing.assert_close(log_rest[0, 0], -taken, rtol=1e-4, atol=atol)
    expected, _ = stick_breaking_oracle(*inputs, scale=1.0)
    assert relative_error(output.detach(), expected.detach()) < 1e-5


def test_zero_queries_and_huge_scores_stay_finite(impl, gradients):
    for kind in ("zero", "large", "shifted", "peaked"):
        q, k, v = make_qkv(1, 2, 40, 8, kind=kind, requires_grad=True)
        for tensor in gradients(
            lambda q=q, k=k, v=v: stick_breaking_attention_with_remainder(q, k, v, impl=impl),
            (q, k, v),
        ):
            assert bool(torch.isfinite(tensor).all()), kind


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_error_budget(impl, dtype, transposed, gradients):
    if impl == "triton" and dtype is torch.float64:
        q, k, v = make_qkv(1, 1, 4, 8, dtype=dtype)
        with pytest.raises(UnsupportedError, match="float64"):
            stick_breaking_attention(q, k, v, impl=impl)
        return
    inputs = make_qkv(
        1, 2, 50, 16, kv_heads=1, dtype=dtype, transposed=transposed, requires_grad=True
    )
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    oracle = gradients(lambda: stick_breaking_oracle(*wide), tuple(wide))
    low = gradients(lambda: naive(*inputs), inputs)
    actual = gradients(
        lambda: stick_breaking_attention_with_remainder(*inputs, enable_gqa=True, impl=impl),
        inputs,
    )
    labels = ("output", "log_rest", "dq", "dk", "dv")
    for label, got, exact, plain in zip(labels, actual, oracle, low, strict=True):
        if label != "log_rest":
            assert got.dtype is dtype
        magnitude = float(exact.detach().abs().max())
        assert_within_budget(got, exact, plain, magnitude=magnitude, label=label)


def naive(q, k, v):
    """Plain torch in the dtype of the inputs: what the budget is measured by."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    n = q.shape[2]
    z = (q @ k.mT) * q.shape[-1] ** -0.5
    hidden = torch.ones(n, n, dtype=torch.bool).triu()
    log_keep = torch.nn.functional.logsigmoid(-z).masked_fill(hidden, 0.0)
    after = log_keep.flip(-1).cumsum(-1).flip(-1) - log_keep
    weights = (torch.sigmoid(z) * after.exp()).masked_fill(hidden, 0.0)
    return weights @ v, log_keep.sum(-1)


@pytest.mark.parametrize("early_stop", [0.3, 1e-3, 2.0**-14])
@pytest.mark.parametrize("bias", [-3.0, -6.0])
def test_early_stop_error_is_within_its_bound(early_stop, bias, gradients):
    n = 1100
    q, k, v = inputs = make_qkv(1, 2, n, 8, kv_heads=1, dtype=torch.float64, requires_grad=True)
    logit_bias = torch.full((2,), bias, dtype=torch.float64)

    def call(**config):
        return stick_breaking_attention_with_remainder(
            q,
            k,
            v,
            enable_gqa=True,
            logit_bias=logit_bias,
            config=StickBreakingConfig(**config),
            impl="eager",
        )

    with torch.no_grad():
        whole, stopped = call(), call(early_stop=early_stop)
        assert bool(((stopped.output - whole.output).abs() <= early_stop * v.abs().max()).all())
        dropped = stopped.log_rest.exp() - whole.log_rest.exp()
        assert bool((dropped >= -1e-12).all())
        assert bool((dropped < early_stop).all())
    stats = stick_breaking_attention_stats(
        q,
        k,
        v,
        enable_gqa=True,
        logit_bias=logit_bias,
        config=StickBreakingConfig(early_stop=early_stop),
    )
    if bias == -3.0:
        assert stats.visited_fraction < 0.9, "this case must stop early"

    # Skipped gates: sum |dz| <= 2 R reach. Visited ones lack at most R reach in their far sum, each
    # times its gate b, and sum b <= log(1/R). With R < early_stop:
    upstream = torch.randn(1, 2, n, 8, generator=torch.Generator().manual_seed(1)).double()
    dq = [
        torch.autograd.grad((call(**c).output * upstream).sum(), inputs)[0]
        for c in ({}, {"early_stop": early_stop})
    ]
    reach = float((upstream @ v.detach().mT).abs().max())
    key_size = float(k.detach().norm(dim=-1).max()) * 8**-0.5
    bound = early_stop * (2 + math.log(1 / early_stop)) * reach * key_size
    assert float((dq[0] - dq[1]).norm(dim=-1).max()) <= bound
    assert early_stop > 0.1 or bound < float(dq[0].norm(dim=-1).max()), (
        "the bound must say something"
    )


def test_early_stop_gradient_is_the_derivative_of_what_ran():
    q, k, v = make_qkv(1, 1, 600, 2, dtype=torch.float64)
    config = StickBreakingConfig(early_stop=0.05)
    direction = torch.randn(q.shape, generator=torch.Generator().manual_seed(2)).double()
    probe = torch.randn(1, 1, 600, 2, generator=torch.Generator().manual_seed(3)).double()

    def loss(step):
        moved = (q + step * direction).requires_grad_()
        output, log_rest = stick_breaking_attention_with_remainder(
            moved, k, v, config=config, impl="eager"
        )
        return (output * probe).sum() + log_rest.sum(), moved

    value, leaf = loss(0.0)
    (grad,) = torch.autograd.grad(value, leaf)
    with torch.no_grad():
        numeric = (loss(1e-6)[0] - loss(-1e-6)[0]) / 2e-6
    torch.testing.assert_close((grad * direction).sum(), numeric, rtol=1e-6, atol=1e-6)


def test_early_stop_with_triton_matches_its_bound(impl):
    if impl != "triton":
        pytest.skip("eager has its own test; reference walks everything")
    q, k, v = make_qkv(1, 2, 200, 16)
    whole = stick_breaking_attention(q, k, v, impl=impl)
    config = StickBreakingConfig(early_stop=1e-3)
    stopped = stick_breaking_attention(q, k, v, config=config, impl=impl)
    assert float((whole - stopped).abs().max()) <= 1e-3 * float(v.abs().max()) + 1e-5


def test_gate_threshold_zeroes_small_gates():
    q, k, v = make_qkv(1, 2, 50, 8, dtype=torch.float64)
    config = StickBreakingConfig(gate_threshold=0.4)
    output = stick_breaking_attention(q, k, v, config=config, impl="eager")
    z = (q @ k.mT) * 8**-0.5
    small = torch.sigmoid(z) < 0.4
    assert bool(small.any())
    log_keep = torch.nn.functional.logsigmoid(-z)
    hidden = small | torch.ones(50, 50, dtype=torch.bool).triu()
    log_keep = log_keep.masked_fill(hidden, 0.0)
    after = log_keep.flip(-1).cumsum(-1).flip(-1) - log_keep
    weights = (torch.sigmoid(z) * after.exp()).masked_fill(hidden, 0.0)
    torch.testing.assert_close(output, weights @ v)
    reference = stick_breaking_attention(q, k, v, config=config, impl="reference")
    torch.testing.assert_close(output, reference)


@pytest.mark.parametrize("head_dim", [16, 32, 50, 64])
def test_published_dense_shapes(head_dim):
    # the authors' dense tests: logits around -0.7, lengths that are no multiple of a tile
    q, k, v = make_qkv(2, 3, 257, head_dim, dtype=torch.float64)
    bias = torch.full((3,), -0.7)
    wanted = stick_breaking_attention_with_remainder(q, k, v, logit_bias=bias, impl="reference")
    actual = stick_breaking_attention_with_remainder(q, k, v, logit_bias=bias, impl="eager")
    torch.testing.assert_close(actual, wanted, atol=1e-11, rtol=1e-11)
    single = stick_breaking_attention_with_remainder(
        q.float(), k.float(), v.float(), logit_bias=bias, impl="eager"
    )
    assert relative_error(single.output, wanted.output) < 1e-6


def test_stick_does_not_drift_over_many_chunks(gradients):
    # gates near e^-7: every one of 3000 keys still counts at the far end
    q, k, v = make_qkv(1, 1, 3, 8, n_k=3000, requires_grad=True)
    bias = torch.full((1,), -7.0, requires_grad=True)

    def call(q, k, v, bias, impl):
        return stick_breaking_attention_with_remainder(
            q, k, v, query_offset=2997, logit_bias=bias, impl=impl
        )

    wide = tuple(t.detach().double().requires_grad_() for t in (q, k, v, bias))
    wanted = gradients(lambda: call(*wide, "reference"), wide)
    actual = gradients(lambda: call(q, k, v, bias, "eager"), (q, k, v, bias))
    for got, exact in zip(actual, wanted, strict=True):
        assert relative_error(got.detach(), exact.detach()) < 5e-6


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_autocast_does_not_round_inside(impl):
    """Autocast once turned the float32 products of the walk into bfloat16: gradients 22 % off."""
    inputs = make_qkv(n_q=300, head_dim=32, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(inputs.query.shape, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = stick_breaking_attention(*inputs, impl=impl)
    found = (out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype)))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out = stick_breaking_attention(*exact, impl="reference")
    wanted = (out, *torch.autograd.grad(out, exact, upstream.to(torch.bfloat16).double()))
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).norm() < 5e-3 * b.norm()
