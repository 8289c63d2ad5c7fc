"""The promises every mechanism keeps: invariances, operators, compilation, refusals with advice."""

from __future__ import annotations

import re

import pytest
import torch

import longspan
from longspan import (
    ConfigError,
    ShapeError,
    StickBreakingConfig,
    UnsupportedError,
    stick_breaking_attention,
    stick_breaking_attention_with_remainder,
)
from longspan.stick_breaking.ops import stick_breaking_bwd, stick_breaking_fwd
from longspan.testing import make_qkv, stick_breaking_oracle

CONFIGS = [
    StickBreakingConfig(),
    StickBreakingConfig(early_stop=1e-3, attend_current=True),
    StickBreakingConfig(window=20, remainder="value"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_batch_neighbours_do_not_matter(impl, config):
    q, k, v = make_qkv(3, 2, 70, 16)
    together = stick_breaking_attention(q, k, v, config=config, impl=impl)
    for b in range(3):
        alone = stick_breaking_attention(
            q[b : b + 1], k[b : b + 1], v[b : b + 1], config=config, impl=impl
        )
        torch.testing.assert_close(together[b : b + 1], alone, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("config", CONFIGS)
def test_padding_does_not_matter_not_even_nan(impl, config, gradients):
    q, k, v = make_qkv(2, 2, 40, 16)
    lengths = torch.tensor([40, 27], dtype=torch.int32)
    k[1, :, 27:], v[1, :, 27:] = float("nan"), float("inf")
    padded = tuple(t.clone().requires_grad_() for t in (q, k, v))
    results = gradients(
        lambda: [
            stick_breaking_attention(*padded, key_lengths=lengths, config=config, impl=impl)[
                1:, :, :27
            ]
        ],
        padded,
    )
    alone = tuple(t[1:, :, :27].clone().requires_grad_() for t in (q, k, v))
    expected = gradients(
        lambda: [stick_breaking_attention(*alone, config=config, impl=impl)], alone
    )
    torch.testing.assert_close(results[0], expected[0], atol=2e-6, rtol=1e-6)
    for got, wanted in zip(results[1:], expected[1:], strict=True):
        torch.testing.assert_close(got[1:, :, :27], wanted, atol=2e-5, rtol=1e-5)
        assert bool((got[1, :, 27:] == 0).all())
        assert bool((got[0] == 0).all())


def test_a_padding_mask_is_key_lengths(impl):
    q, k, v = make_qkv(2, 2, 20, 16)
    lengths = torch.tensor([20, 11])
    mask = (torch.arange(20) < lengths[:, None])[:, None, None]
    torch.testing.assert_close(
        stick_breaking_attention(q, k, v, mask, impl=impl),
        stick_breaking_attention(q, k, v, key_lengths=lengths, impl=impl),
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_the_future_does_not_matter(impl, config):
    q, k, v = make_qkv(1, 2, 80, 16)
    before = stick_breaking_attention(q, k, v, config=config, impl=impl)
    k[:, :, 50:], v[:, :, 50:] = 3.0, -5.0
    after = stick_breaking_attention(q, k, v, config=config, impl=impl)
    limit = 50 + (0 if config.attend_current or config.remainder == "value" else 1)
    assert torch.equal(before[:, :, :limit], after[:, :, :limit])
    assert not torch.equal(before[:, :, limit:], after[:, :, limit:])


@pytest.mark.parametrize("config", CONFIGS)
def test_same_bits_twice(impl, config, gradients):
    inputs = make_qkv(2, 4, 70, 16, kv_heads=2, dtype=torch.bfloat16, requires_grad=True)

    def run():
        return gradients(
            lambda: stick_breaking_attention_with_remainder(
                *inputs, enable_gqa=True, config=config, impl=impl
            ),
            inputs,
        )

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_strided_inputs_and_upstream_gradients(impl, gradients):
    plain = make_qkv(2, 2, 33, 16, requires_grad=True)
    strided = make_qkv(2, 2, 33, 16, transposed=True, requires_grad=True)
    results = [
        gradients(
            # the transposed result makes autograd hand a strided gradient to the operator
            lambda t=t: [
                stick_breaking_attention(*t, impl=impl).transpose(2, 3).contiguous().transpose(2, 3)
            ],
            t,
        )
        for t in (plain, strided)
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_window_sees_exactly_that_many_keys(impl):
    q = torch.zeros(1, 1, 30, 16)
    for attend_current in (False, True):
        for window in (1, 4, 29):
            v = torch.ones(1, 1, 30, 1)
            config = StickBreakingConfig(window=window, attend_current=attend_current)
            part = stick_breaking_attention_with_remainder(q, q, v, config=config, impl=impl)
            # every visible key has gate 1/2
            visible = (torch.arange(30) + int(attend_current)).clamp(max=window)
            torch.testing.assert_close(
                part.log_rest[0, 0], -visible * 0.6931471805599453, atol=1e-5, rtol=1e-6
            )


@pytest.mark.parametrize("attend_current", [False, True])
def test_remainder_value_gives_the_rest_to_the_own_value(impl, attend_current):
    q, k, v = make_qkv(2, 4, 12, 16, n_k=20, kv_heads=2)
    common = {"enable_gqa": True, "query_offset": 8, "impl": impl}
    dropped = stick_breaking_attention_with_remainder(
        q, k, v, config=StickBreakingConfig(attend_current=attend_current), **common
    )
    config = StickBreakingConfig(attend_current=attend_current, remainder="value")
    given = stick_breaking_attention_with_remainder(q, k, v, config=config, **common)
    own = v[:, :, 8:].repeat_interleave(2, 1)
    wanted = dropped.output + dropped.log_rest.exp().unsqueeze(-1) * own
    torch.testing.assert_close(given.output, wanted)
    assert torch.equal(given.log_rest, dropped.log_rest)


def test_without_keys_or_queries(impl):
    q, k, v = make_qkv(2, 2, 3, 16, n_k=0)
    part = stick_breaking_attention_with_remainder(q, k, v, impl=impl)
    assert bool((part.output == 0).all())
    assert bool((part.log_rest == 0).all())
    q, k, v = make_qkv(2, 2, 0, 16, n_k=3)
    assert stick_breaking_attention(q, k, v, impl=impl).shape == (2, 2, 0, 16)
    q, k, v = make_qkv(2, 2, 4, 16)
    part = stick_breaking_attention_with_remainder(
        q, k, v, key_lengths=torch.zeros(2, dtype=torch.int32), impl=impl
    )
    assert bool((part.output == 0).all())
    assert bool((part.log_rest == 0).all())


def settings(q, n_k, *, bias=None, lengths=None, early_stop=None, impl="eager", grad=True):
    n_q = q.shape[2]
    return (
        (bias, lengths, None, None, n_q, n_k, q.shape[-1] ** -0.5, n_k - n_q)
        + (False, 9, early_stop, None)
        + ((grad, impl) if grad is not None else (impl,))
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("early_stop", [None, 0.1])
def test_opcheck(dtype, transposed, early_stop):
    q, k, v = make_qkv(
        2, 4, 6, 16, n_k=11, kv_heads=2, dtype=dtype, transposed=transposed, requires_grad=True
    )
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    bias = torch.zeros(4, dtype=wide, requires_grad=True)
    lengths = torch.tensor([11, 5], dtype=torch.int32)
    rest = settings(q, 11, bias=bias, lengths=lengths, early_stop=early_stop)
    torch.library.opcheck(stick_breaking_fwd, (q, k, v, *rest))


def test_opcheck_backward():
    q, k, v = make_qkv(2, 2, 6, 16, dtype=torch.bfloat16)
    results = stick_breaking_fwd(q, k, v, *settings(q, 6))
    grads = [torch.randn_like(results[0]), torch.randn_like(results[1])]
    rest = settings(q, 6, grad=None)
    torch.library.opcheck(stick_breaking_bwd, (*grads, q, k, v, *results, *rest))


@pytest.mark.parametrize("config", CONFIGS)
def test_compiles_into_one_graph(config, gradients):
    inputs = make_qkv(1, 2, 40, 16, requires_grad=True)
    bias = torch.zeros(2, requires_grad=True)

    def run(q, k, v, bias):
        return stick_breaking_attention_with_remainder(
            2 * q, k, v, logit_bias=bias, config=config, impl="eager"
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    leaves = (*inputs, bias)
    for got, wanted in zip(
        gradients(lambda: compiled(*leaves), leaves),
        gradients(lambda: run(*leaves), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_front_door_patch_and_explain():
    q, k, v = make_qkv(1, 2, 16, 8)
    config = StickBreakingConfig(window=4)
    wanted = stick_breaking_attention(q, k, v, config=config)
    assert torch.equal(longspan.attention(q, k, v, config, is_causal=True), wanted)
    with longspan.patched_sdpa(config):
        patched = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        with pytest.raises(UnsupportedError, match="is_causal=True"):
            torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(patched, wanted)
    said = longspan.explain(q, k, v, config, is_causal=True)
    assert said.mechanism == "stick_breaking"
    assert said.chosen == "eager" or longspan._triton.launch.interpreting()
    visible = sum(range(16))
    assert said.visited_fraction == pytest.approx(sum(min(p, 4) for p in range(16)) / visible)
    refused = longspan.explain(q, k, v, config)
    assert refused.chosen is None
    assert all("causal by definition" in r.refusal for r in refused.reports)


def test_visited_fraction_agrees_with_the_reference():
    from longspan.mechanisms import get_mechanism

    mechanism = get_mechanism("stick_breaking")
    assert mechanism.config_class is StickBreakingConfig
    for n_q, n_k, offset in ((7, 7, 0), (3, 9, 6), (5, 4, -2), (1, 1, 0)):
        for window, current in ((2, False), (3, True)):
            config = StickBreakingConfig(window=window, attend_current=current)
            q, k, v = make_qkv(1, 1, n_q, 4, n_k=n_k)
            q = torch.zeros_like(q)
            counts = []
            for c in (config, StickBreakingConfig(attend_current=current)):
                _, log_rest = stick_breaking_attention_with_remainder(
                    q, k, v, query_offset=offset, config=c
                )
                counts.append(float(-log_rest.sum() / 0.6931471805599453))
            expected = counts[0] / counts[1] if counts[1] else 1.0
            got = mechanism.visited_fraction(config, n_q, n_k, is_causal=True, query_offset=offset)
            assert got == pytest.approx(expected)


def refusal(error, words, call):
    with pytest.raises(error, match=re.escape(words)):
        call()


def test_refusals_say_what_to_do():
    q, k, v = make_qkv(1, 2, 8, 16)
    f = stick_breaking_attention
    refusal(UnsupportedError, "Pass is_causal=True", lambda: f(q, k, v, is_causal=False))
    refusal(UnsupportedError, "dropout_p is 0.1", lambda: f(q, k, v, dropout_p=0.1))
    mask = torch.ones(8, 8, dtype=torch.bool)
    refusal(UnsupportedError, "key_lengths", lambda: f(q, k, v, mask))
    refusal(ShapeError, "enable_gqa=True", lambda: f(q, k[:, :1], v[:, :1]))
    refusal(ShapeError, "one number per query head", lambda: f(q, k, v, logit_bias=torch.ones(3)))
    refusal(ShapeError, "torch.full", lambda: f(q, k, v, logit_bias=-1.0))
    integers = torch.ones(2, dtype=torch.int64)
    refusal(ShapeError, "floating point", lambda: f(q, k, v, logit_bias=integers))
    value = StickBreakingConfig(remainder="value")
    refusal(
        ShapeError,
        'use remainder="drop"',
        lambda: f(q, k, v, query_offset=1, config=value),
    )
    gate = StickBreakingConfig(gate_threshold=0.1)
    leaf = q.clone().requires_grad_()
    refusal(UnsupportedError, "torch.no_grad()", lambda: f(leaf, k, v, config=gate))
    bias = torch.zeros(2, requires_grad=True)
    refusal(UnsupportedError, "torch.no_grad()", lambda: f(q, k, v, logit_bias=bias, config=gate))
    with torch.no_grad():
        assert f(leaf, k, v, config=gate).shape == q.shape
    refusal(ConfigError, "Did you mean 'eager'", lambda: f(q, k, v, impl="eagr"))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"remainder": "embedding"}, "longspan.nn.StickBreakingAttention"),
        ({"remainder": "valu"}, "Did you mean 'value'"),
        ({"window": 0}, "int >= 1"),
        ({"window": 2.0}, "int >= 1"),
        ({"early_stop": 0.0}, "strictly between 0 and 1"),
        ({"early_stop": 1.0}, "2**-14"),
        ({"gate_threshold": -0.1}, "gate_threshold is -0.1"),
        ({"gate_threshold": True}, "gate_threshold is True"),
        ({"attend_current": 1}, "attend_current is 1"),
    ],
)
def test_settings_are_checked_when_built(setting, words):
    refusal(ConfigError, words, lambda: StickBreakingConfig(**setting))


def test_autocast_casts_like_torch():
    q, k, v = make_qkv(1, 2, 16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = stick_breaking_attention(q, k, v)
    assert output.dtype is torch.bfloat16
    exact, _ = stick_breaking_oracle(q, k, v)
    assert float((output.double() - exact).abs().max()) < 0.05
