"""Every implementation against the loop that defines stick-breaking: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan import StickBreakingConfig, stick_breaking_attention_with_remainder
from longspan._validation import validate
from longspan.stick_breaking.impl.reference import stick_breaking_weights
from longspan.testing import make_qkv, stick_breaking_oracle

RULES = [
    {},
    {"attend_current": True},
    {"window": 3},
    {"window": 1, "attend_current": True},
]


def leaves(dtype=torch.float64, bias=True, **shape):
    tensors = make_qkv(dtype=dtype, requires_grad=True, **shape)
    heads = tensors.query.shape[1]
    logit_bias = torch.linspace(-2.0, 1.0, heads, dtype=dtype).requires_grad_() if bias else None
    return (*tensors, logit_bias)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(
    "shape",
    [
        {"n_q": 1},
        {"n_q": 9, "heads": 4, "kv_heads": 2, "value_dim": 3},
        {"n_q": 3, "n_k": 8, "query_offset": 5},
        {"n_q": 6, "n_k": 4, "query_offset": -2},
        {"n_q": 4, "n_k": 3, "query_offset": 2, "batch": 2, "key_lengths": [3, 1]},
    ],
)
def test_equals_the_loop(impl, rules, shape, gradients):
    dtype = torch.float32 if impl == "triton" else torch.float64
    shape = {"head_dim": 4, **shape}
    common = {"query_offset": shape.pop("query_offset", 0)}
    if "key_lengths" in shape:
        common["key_lengths"] = torch.tensor(shape.pop("key_lengths"), dtype=torch.int32)
    *qkv, bias = inputs = leaves(dtype, **shape)

    def call():
        return stick_breaking_attention_with_remainder(
            *qkv,
            enable_gqa=True,
            logit_bias=bias,
            config=StickBreakingConfig(**rules),
            impl=impl,
            **common,
        )

    expected = gradients(
        lambda: stick_breaking_oracle(*qkv, logit_bias=bias, **rules, **common), tuple(inputs)
    )
    tolerance = 2e-5 if impl == "triton" else 1e-12
    for actual, wanted in zip(gradients(call, tuple(inputs)), expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted.double(), atol=tolerance, rtol=tolerance)


@settings(max_examples=25, deadline=None)
@given(
    n_q=st.integers(0, 7),
    n_k=st.integers(0, 7),
    offset=st.integers(-3, 5),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    window=st.none() | st.integers(1, 5),
    attend_current=st.booleans(),
)
def test_eager_equals_reference_for_any_shape(
    n_q, n_k, offset, kv_heads, group, window, attend_current
):
    q, k, v = make_qkv(2, kv_heads * group, n_q, 4, n_k=n_k, kv_heads=kv_heads, dtype=torch.float64)
    results = [
        stick_breaking_attention_with_remainder(
            q,
            k,
            v,
            enable_gqa=True,
            query_offset=offset,
            config=StickBreakingConfig(window=window, attend_current=attend_current),
            impl=impl,
        )
        for impl in ("reference", "eager")
    ]
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("n", [255, 256, 257, 600])
@pytest.mark.parametrize("rules", [{}, {"window": 300, "attend_current": True}])
def test_eager_across_its_tiles(n, rules, gradients):
    inputs = leaves(batch=1, heads=2, kv_heads=1, n_q=n, head_dim=8, value_dim=5)
    *qkv, bias = inputs
    results = [
        gradients(
            lambda impl=impl: stick_breaking_attention_with_remainder(
                *qkv,
                enable_gqa=True,
                logit_bias=bias,
                config=StickBreakingConfig(**rules),
                impl=impl,
            ),
            inputs,
        )
        for impl in ("reference", "eager")
    ]
    for wanted, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-10, rtol=1e-10)


def test_eager_few_rows_use_longer_chunks():
    q, k, v = make_qkv(1, 2, 3, 8, n_k=2500, dtype=torch.float64)
    bias = torch.full((2,), -7.0)
    common = {"query_offset": 2497, "logit_bias": bias}
    wanted = stick_breaking_attention_with_remainder(q, k, v, impl="reference", **common)
    actual = stick_breaking_attention_with_remainder(q, k, v, impl="eager", **common)
    torch.testing.assert_close(actual, wanted, atol=1e-12, rtol=1e-12)
    assert bool((wanted.log_rest > -40).all()), "the walk must matter to the far end"


@pytest.mark.parametrize("rules", RULES)
def test_weights_and_rest_sum_to_one(rules):
    q, k, v = make_qkv(1, 2, 40, 8, dtype=torch.float64)
    call = validate("test", q, k, v, is_causal=True)
    weights, log_rest, _ = stick_breaking_weights(call, StickBreakingConfig(**rules), None)
    torch.testing.assert_close(weights.sum(-1) + log_rest.exp(), torch.ones(1, 2, 40).double())
    assert bool((weights >= 0).all())


def test_output_of_ones_and_rest_sum_to_one(impl):
    q, k, v = make_qkv(1, 2, 40, 8)
    output, log_rest = stick_breaking_attention_with_remainder(q, k, torch.ones_like(v), impl=impl)
    whole = output + log_rest.exp().unsqueeze(-1)
    torch.testing.assert_close(whole, torch.ones_like(v), atol=1e-5, rtol=0)


def test_two_keys_by_hand(impl):
    # equal logits 0: the nearer key takes 1/2, the farther 1/4, 1/4 is left
    q = torch.zeros(1, 1, 3, 4)
    v = torch.tensor([1.0, 10.0, 100.0]).reshape(1, 1, 3, 1).expand(1, 1, 3, 4).contiguous()
    output, log_rest = stick_breaking_attention_with_remainder(q, q, v, impl=impl)
    torch.testing.assert_close(output[0, 0, :, 0], torch.tensor([0.0, 0.5, 0.25 * 1 + 0.5 * 10]))
    torch.testing.assert_close(log_rest[0, 0].exp(), torch.tensor([1.0, 0.5, 0.25]))


@pytest.mark.parametrize("impl_", ["reference", "eager"])
@pytest.mark.parametrize("rules", [{}, {"attend_current": True, "window": 3, "remainder": "value"}])
def test_gradcheck(impl_, rules):
    q, k, v, bias = leaves(batch=1, heads=2, kv_heads=1, n_q=6, head_dim=3, value_dim=2)

    def call(q, k, v, bias):
        return tuple(
            stick_breaking_attention_with_remainder(
                q,
                k,
                v,
                enable_gqa=True,
                logit_bias=bias,
                config=StickBreakingConfig(**rules),
                impl=impl_,
            )
        )

    assert torch.autograd.gradcheck(call, (q, k, v, bias))
