"""The one contract, for every mechanism of the registry."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

import longspan
from longspan import (
    ConfigError,
    ExactConfig,
    ShapeError,
    UnsupportedError,
    WindowConfig,
    patched_sdpa,
)
from longspan.mechanisms import MECHANISMS, get_mechanism, mechanism_of_config
from longspan.testing import INPUT_KINDS, assert_within_budget, make_qkv

NAMES = sorted(MECHANISMS)
SDPA = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal"]


def run(name, q, k, v, **settings):
    mechanism = get_mechanism(name)
    settings = {"is_causal": True, "enable_gqa": True, **settings}
    return output_of(mechanism.function(q, k, v, **settings))


def output_of(result):
    """Mechanisms with a state return a NamedTuple whose first field is the output."""
    return result if isinstance(result, torch.Tensor) else result.output


@pytest.mark.parametrize("name", NAMES)
def test_signature_begins_like_torch(name):
    mechanism = get_mechanism(name)
    parameters = inspect.signature(mechanism.function).parameters
    assert list(parameters)[:6] == SDPA
    for common in ("scale", "enable_gqa", "query_offset", "key_lengths", "config", "impl"):
        assert parameters[common].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["query_offset"].default == 0
    assert isinstance(parameters["config"].default, mechanism.config_class)
    assert mechanism.config_class.__dataclass_params__.frozen
    assert hash(mechanism.config_class()) == hash(mechanism.config_class())
    for section in ("Args:", "Returns:", "Raises:", "Cost:", "Example:"):
        assert section in (mechanism.function.__doc__ or "")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_equals_reference(name, kind, dtype):
    q, k, v = make_qkv(2, 4, 33, 16, n_k=50, kv_heads=2, value_dim=8, dtype=dtype, kind=kind)
    got = run(name, q, k, v, query_offset=17)
    low = run(name, q, k, v, query_offset=17, impl="reference")
    oracle = run(name, q.double(), k.double(), v.double(), query_offset=17, impl="reference")
    assert got.dtype is dtype
    assert got.shape == (2, 4, 33, 8)
    # the reference computes in float32; rounding of the inputs' products is what "plain" adds
    plain = low if dtype is torch.float32 else low + torch.finfo(dtype).eps * low.abs().max()
    assert_within_budget(got, oracle, plain, factor=4.0)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_again_and_in_any_batch_slot(name):
    q, k, v = make_qkv(3, 2, 40, 16)
    whole = run(name, q, k, v)
    assert torch.equal(run(name, q, k, v), whole)
    turned = run(name, q.flip(0), k.flip(0), v.flip(0)).flip(0)
    assert torch.equal(turned, whole)
    alone = run(name, q[1:2], k[1:2], v[1:2])
    torch.testing.assert_close(alone[0], whole[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_future_and_padding_do_not_matter(name):
    q, k, v = make_qkv(2, 2, 40, 16)
    lengths = torch.tensor([40, 25], dtype=torch.int32)
    before = run(name, q, k, v, key_lengths=lengths)
    k[0, :, 30:], v[0, :, 30:] = 7.0, -7.0
    k[1, :, 25:], v[1, :, 25:] = float("nan"), float("inf")
    after = run(name, q, k, v, key_lengths=lengths)
    assert torch.equal(after[0, :, :30], before[0, :, :30])
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0, :, 30:], before[0, :, 30:])


@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter_forward_or_backward(name):
    plain = make_qkv(2, 4, 24, 16, kv_heads=2, requires_grad=True)
    turned = make_qkv(2, 4, 24, 16, kv_heads=2, requires_grad=True, transposed=True)
    upstream = torch.randn(2, 24, 4, 16).transpose(1, 2)
    a, b = run(name, *plain), run(name, *turned)
    torch.testing.assert_close(a, b)
    for x, y in zip(torch.autograd.grad(a, plain, upstream.contiguous()),
                    torch.autograd.grad(b, turned, upstream), strict=True):  # fmt: skip
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 1, 1)])
def test_empty_and_length_one(name, shape):
    batch, n_q, n_k = shape
    q, k, v = make_qkv(batch, 2, n_q, 8, n_k=n_k, requires_grad=True)
    out = run(name, q, k, v)
    assert out.shape == (batch, 2, n_q, 8)
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert torch.isfinite(q.grad).all()
    if n_k == 0:
        assert (out == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_separate(name):
    mechanism = get_mechanism(name)
    cu = torch.tensor([0, 5, 5, 18, 19], dtype=torch.int32)
    q, k, v = (torch.randn(19, 2, 8) for _ in range(3))
    packed = mechanism.function_varlen(q, k, v, cu, cu, 13, 13, is_causal=True)
    for start, end in ((0, 5), (5, 18), (18, 19)):
        part = [t[start:end].transpose(0, 1)[None] for t in (q, k, v)]
        torch.testing.assert_close(packed[start:end], run(name, *part)[0].transpose(0, 1))


@pytest.mark.parametrize("name", NAMES)
def test_decoding_one_token_equals_the_whole(name):
    q, k, v = make_qkv(1, 2, 12, 8)
    whole = run(name, q, k, v)
    for i in (0, 5, 11):
        row = run(name, q[:, :, i : i + 1], k, v, query_offset=i)
        torch.testing.assert_close(row, whole[:, :, i : i + 1])


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name):
    q, k, v = make_qkv(1, 2, 6, 8)
    with pytest.raises(ShapeError, match=f"{name}_attention: key has head dim 4"):
        run(name, q, k[..., :4], v)
    with pytest.raises(ConfigError, match="impl is 'tritn'.*Did you mean 'triton'"):
        run(name, q, k, v, impl="tritn")
    with pytest.raises(UnsupportedError):
        run(name, q, k, v, attn_mask=torch.ones(6, 6, dtype=torch.bool))
    with pytest.raises(UnsupportedError, match="triton"):
        run(name, q, k, v, impl="triton")
    if get_mechanism(name).is_causal_only:
        with pytest.raises(UnsupportedError, match="is_causal"):
            run(name, q, k, v, is_causal=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("length", [33, 130])
def test_scale_that_is_not_positive(name, scale, length):
    """Torch's kernels multiply -inf of their mask by the scale: NaN, or all the hidden keys."""
    q, k, v = make_qkv(1, 2, length, 16, dtype=torch.float64, requires_grad=True)

    def outcome(impl):
        config = WindowConfig(window=40) if name == "window" else None
        settings = {} if config is None else {"config": config}
        output = run(name, q, k, v, scale=scale, impl=impl, **settings)
        return output, *torch.autograd.grad(output.square().sum(), (q, k, v), allow_unused=True)

    for got, want in zip(outcome("auto"), outcome("reference"), strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_refuses_what_is_not_its_config(name):
    q, k, v = make_qkv(1, 2, 8, 4)
    own = get_mechanism(name).config_class
    other = ExactConfig if name != "exact" else WindowConfig
    said = {"a dict": ({}, "of type dict"), "None": (None, "of type NoneType"),
            "class": (own, f"the class {own.__name__}"),
            "other": (other(), f"of type {other.__name__}")}  # fmt: skip
    for config, got in said.values():
        with pytest.raises(ConfigError) as caught:
            run(name, q, k, v, config=config)
        assert f"config is {got}; it must be a {own.__name__}. Pass" in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors_tell_the_shape(name):
    q, k, v = (t.to("meta") for t in make_qkv(2, 4, 40, 16, kv_heads=2, value_dim=8))
    output = run(name, q, k, v)
    assert output.is_meta
    assert output.shape == (2, 4, 40, 8)


def test_exact_wants_a_probability_of_dropping():
    q, k, v = make_qkv(1, 2, 8, 4)
    for dropout_p in (2.0, -0.1, float("nan")):
        with pytest.raises(ShapeError, match="it must be a probability, 0.0 to 1.0. Pass 0.0"):
            run("exact", q, k, v, dropout_p=dropout_p)


@pytest.mark.parametrize("name", NAMES)
def test_explain_says_what_runs(name):
    q, k, v = make_qkv(1, 2, 6, 8)
    told = longspan.explain(q, k, v, get_mechanism(name).config_class(), is_causal=True)
    assert told.mechanism == name
    assert told.chosen is longspan.Impl.EAGER
    assert 0 < told.visited_fraction <= 1
    assert name in str(told)
    for report in told.reports:
        assert report.impl.value in str(told)
        assert report.refusal is None or report.refusal in str(told)


@pytest.mark.parametrize("name", NAMES)
def test_patched_sdpa_redirects_and_leaves_nothing(name):
    q, k, v = make_qkv(2, 2, 20, 8)
    config = get_mechanism(name).config_class()
    want = run(name, q, k, v)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with patched_sdpa(config) as patch:
        got = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        flat = F.scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True)
        compiled = torch.compile(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            fullgraph=True,
            backend="aot_eager",
        )(q, k, v)
    assert patch.calls >= 3
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(compiled, want)
    torch.testing.assert_close(flat, want[0])
    assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), plain)


def test_patched_sdpa_stacks():
    q, k, v = make_qkv(1, 1, 20, 8)
    with patched_sdpa(ExactConfig()) as outer, patched_sdpa(WindowConfig(window=2, num_sinks=0)):
        inner = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    want = longspan.window_attention(
        q, k, v, is_causal=True, config=WindowConfig(window=2, num_sinks=0)
    )
    torch.testing.assert_close(inner, want)
    assert outer.calls == 0


def test_front_door_and_registry():
    q, k, v = make_qkv(1, 1, 6, 8)
    for name in NAMES:
        config = get_mechanism(name).config_class()
        assert mechanism_of_config(config).name == name
        torch.testing.assert_close(
            output_of(longspan.attention(q, k, v, config, is_causal=True)), run(name, q, k, v)
        )
        compiled = torch.compile(
            lambda q, k, v, config=config: longspan.attention(q, k, v, config, is_causal=True),
            fullgraph=True,
            backend="aot_eager",
        )
        torch.testing.assert_close(output_of(compiled(q, k, v)), run(name, q, k, v))
    with pytest.raises(ConfigError, match="Did you mean 'window'"):
        get_mechanism("windw")
    with pytest.raises(ConfigError, match="belongs to no mechanism"):
        longspan.attention(q, k, v, {"window": 3})
