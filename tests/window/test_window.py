"""Window attention on the CPU: the definition, the block-wise form, and what both promise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan import (
    ConfigError,
    ShapeError,
    UnsupportedError,
    WindowConfig,
    explain,
    window_attention,
    window_attention_varlen,
    window_attention_with_lse,
)
from longspan.testing import make_qkv
from longspan.window.api import visited_fraction
from window_cases import CASES, Case, Result, assert_matches_reference, attend

IMPLS = ["eager", "reference"]


def mask_of(n_q, n_k, offset, config, is_causal):
    p = torch.arange(n_q)[:, None] + offset
    j = torch.arange(n_k)
    mask = ((p - j).abs() < config.window) | (j < config.num_sinks)
    return mask & (j <= p) if is_causal else mask


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_equals_sdpa_with_explicit_mask(impl, is_causal):
    config = WindowConfig(window=7, num_sinks=2)
    q, k, v = make_qkv(2, 4, 30, 8, n_k=41, dtype=torch.float64)
    mask = mask_of(30, 41, 11, config, is_causal)
    want = F.scaled_dot_product_attention(q, k, v, mask)
    got = window_attention(q, k, v, is_causal=is_causal, query_offset=11, config=config, impl=impl)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_eager_equals_reference_in_float64(case, nan_scratch):
    q, k, v = make_qkv(case.batch, case.heads, case.n_q, case.dim, n_k=case.n_k,
                       kv_heads=case.kv_heads, value_dim=case.value_dim, dtype=torch.float64,
                       kind=case.kind, transposed=case.transposed)  # fmt: skip
    got, want = attend(case, "eager", q, k, v), attend(case, "reference", q, k, v)
    for name, a, b in zip(Result._fields, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES[6:8] + CASES[18:20] + CASES[-4:], ids=lambda c: c.id)
def test_eager_within_error_budget(case, dtype):
    assert_matches_reference(case, "eager", dtype)


def test_eager_crosses_blocks():
    """Longer than several blocks of queries, with the sinks apart from the window."""
    for case in (Case(700, 700, window=130, sinks=5, batch=1), Case(300, 800, 450, window=90),
                 Case(400, 400, window=100, sinks=150, is_causal=False, padded=True)):  # fmt: skip
        q, k, v = make_qkv(case.batch, case.heads, case.n_q, case.dim, n_k=case.n_k,
                           kv_heads=case.kv_heads, dtype=torch.float64)  # fmt: skip
        for a, b in zip(attend(case, "eager", q, k, v), attend(case, "reference", q, k, v),
                        strict=True):  # fmt: skip
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_gradcheck_through_output_and_lse(impl, is_causal):
    q, k, v = make_qkv(1, 2, 6, 3, n_k=8, kv_heads=1, value_dim=2, dtype=torch.float64,
                       requires_grad=True)  # fmt: skip

    def function(q, k, v):
        return tuple(
            window_attention_with_lse(
                q,
                k,
                v,
                is_causal=is_causal,
                query_offset=2,
                enable_gqa=True,
                impl=impl,
                config=WindowConfig(window=3, num_sinks=1),
            )
        )

    assert torch.autograd.gradcheck(function, (q, k, v))


@pytest.mark.parametrize("impl", IMPLS)
def test_window_over_everything_is_exact_attention(impl):
    q, k, v = make_qkv(2, 2, 40, 8, dtype=torch.float64)
    for is_causal in (True, False):
        want = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        for config in (WindowConfig(window=40, num_sinks=0), WindowConfig(window=1, num_sinks=40)):
            got = window_attention(q, k, v, is_causal=is_causal, config=config, impl=impl)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_batch_neighbours_do_not_matter():
    case = Case(90, 90, window=20, sinks=4, batch=5, heads=4, kv_heads=2)
    q, k, v = make_qkv(5, 4, 90, 16, kv_heads=2)
    whole = attend(case, "eager", q, k, v)
    for entry in (0, 3):
        one = slice(entry, entry + 1)
        alone = window_attention(q[one], k[one], v[one], is_causal=True, enable_gqa=True,
                                 config=WindowConfig(window=20), impl="eager")  # fmt: skip
        assert torch.equal(whole.output[one], alone)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_padding_never_reaches_a_result(impl, is_causal):
    config = WindowConfig(window=12, num_sinks=3)
    q, k, v = make_qkv(2, 2, 50, 8, dtype=torch.float64)
    short = [t[1:, :, :31] for t in (q, k, v)]
    k, v = k.clone(), v.clone()
    k[1, :, 31:] = float("nan")
    v[1, :, 31:] = float("inf")
    lengths = torch.tensor([50, 31], dtype=torch.int32)

    def run(q, k, v, **extra):
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        got = window_attention_with_lse(q, k, v, is_causal=is_causal, config=config, impl=impl,
                                        **extra)  # fmt: skip
        rows = (got.output[-1, :, :31], got.lse[-1, :, :31])
        grads = torch.autograd.grad(rows[0].sum() + rows[1].sum(), (q, k, v))
        return *rows, *(g[-1, :, :31] for g in grads)

    for a, b in zip(run(q, k, v, key_lengths=lengths), run(*short), strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-12, atol=1e-12)
    mask = (torch.arange(50) < lengths[:, None])[:, None, None]
    same = window_attention(q, k, v, mask, is_causal=is_causal, config=config, impl=impl)
    other = window_attention(q, k, v, is_causal=is_causal, key_lengths=lengths, config=config,
                             impl=impl)  # fmt: skip
    assert torch.equal(same, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_future_never_changes_the_past(impl):
    q, k, v = make_qkv(1, 2, 80, 8)
    config = WindowConfig(window=10, num_sinks=2)
    before = window_attention(q, k, v, is_causal=True, config=config, impl=impl)
    for tensor in (q, k, v):
        tensor[:, :, 47:] = torch.randn_like(tensor[:, :, 47:]) * 9
    after = window_attention(q, k, v, is_causal=True, config=config, impl=impl)
    assert torch.equal(before[:, :, :47], after[:, :, :47])
    assert not torch.equal(before[:, :, 47:], after[:, :, 47:])


def test_a_non_finite_key_stays_near():
    """Rows that see it are not finite; rows in blocks that do not hold it are untouched."""
    q, k, v = make_qkv(1, 1, 600, 8)
    config = WindowConfig(window=16, num_sinks=0)
    clean = window_attention(q, k, v, is_causal=True, config=config, impl="eager")
    k[:, :, 200] = float("nan")
    dirty = window_attention(q, k, v, is_causal=True, config=config, impl="eager")
    assert not torch.isfinite(dirty[:, :, 200:216]).any()
    assert torch.equal(dirty[:, :, :128], clean[:, :, :128])
    assert torch.equal(dirty[:, :, 280:], clean[:, :, 280:])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)])
def test_empty_tensors(impl, shape):
    batch, heads, n_q, n_k = shape
    q, k, v = make_qkv(batch, heads, n_q, 8, n_k=n_k, value_dim=4, requires_grad=True)
    got = window_attention_with_lse(q, k, v, is_causal=True, impl=impl)
    assert got.output.shape == (batch, heads, n_q, 4)
    assert bool((got.output == 0).all())
    assert bool((got.lse == float("-inf")).all())
    grads = torch.autograd.grad(got.output.sum(), (q, k, v))
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_varlen_equals_each_sequence(impl, is_causal):
    lengths_q, lengths_k = [3, 0, 30, 1, 5], [3, 2, 41, 20, 2]
    cu_q = torch.tensor([0, *lengths_q]).cumsum(0).int()
    cu_k = torch.tensor([0, *lengths_k]).cumsum(0).int()
    q = torch.randn(39, 4, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(68, 2, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(68, 2, 6, dtype=torch.float64, requires_grad=True)
    config = WindowConfig(window=9, num_sinks=2)
    got = window_attention_varlen(q, k, v, cu_q, cu_k, 30, 41, is_causal=is_causal,
                                  enable_gqa=True, config=config, impl=impl)  # fmt: skip
    rows = []
    for s in range(5):
        part = [t[c[s] : c[s + 1]].transpose(0, 1)[None]
                for t, c in ((q, cu_q), (k, cu_k), (v, cu_k))]  # fmt: skip
        rows.append(window_attention(*part, is_causal=is_causal, enable_gqa=True, config=config,
                                     query_offset=lengths_k[s] - lengths_q[s],
                                     impl="reference")[0].transpose(0, 1))  # fmt: skip
    want = torch.cat(rows)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    up = torch.randn(39, 6, 4, dtype=torch.float64).transpose(1, 2)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), up),
                    torch.autograd.grad(want, (q, k, v), up), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_varlen_checks_bounds():
    q = torch.randn(6, 1, 8)
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ShapeError, match="end at 6, the packed length"):
        window_attention_varlen(q, q, q, cu, cu, 4, 4, impl="eager")
    cu = torch.tensor([0, 1, 6], dtype=torch.int32)
    with pytest.raises(ShapeError, match="max_seqlen_q is 4 but a sequence has 5"):
        window_attention_varlen(q, q, q, cu, cu, 4, 5, impl="eager")


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 40), st.integers(1, 40), st.integers(-20, 50), st.integers(1, 45),
    st.integers(0, 45), st.booleans(),
)  # fmt: skip
def test_any_shape(n_q, n_k, offset, window, sinks, is_causal):
    case = Case(n_q, n_k, offset, window, sinks, is_causal, heads=2, kv_heads=1, dim=3, value_dim=2)
    q, k, v = make_qkv(2, 2, n_q, 3, n_k=n_k, kv_heads=1, value_dim=2, dtype=torch.float64)
    for a, b in zip(attend(case, "eager", q, k, v), attend(case, "reference", q, k, v),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 30), st.integers(0, 30), st.integers(-35, 40), st.integers(1, 35),
    st.integers(0, 35), st.booleans(),
)  # fmt: skip
def test_visited_fraction_is_a_count(n_q, n_k, offset, window, sinks, is_causal):
    config = WindowConfig(window=window, num_sinks=sinks)
    visited = int(mask_of(n_q, n_k, offset, config, is_causal).sum())
    everything = WindowConfig(window=1000, num_sinks=0)
    visible = int(mask_of(n_q, n_k, offset, everything, is_causal).sum())
    got = visited_fraction(config, n_q, n_k, is_causal=is_causal, query_offset=offset)
    assert got == (visited / visible if visible else 1.0)


def test_config_messages():
    assert WindowConfig() == WindowConfig(window=1024, num_sinks=4)
    with pytest.raises(ConfigError, match=r"window is 0; it must be an int >= 1.*valid: 1"):
        WindowConfig(window=0)
    with pytest.raises(ConfigError, match=r"num_sinks is -2.*Nearest valid: 0"):
        WindowConfig(num_sinks=-2)
    with pytest.raises(ConfigError, match=r"window is float 8\.4.*Nearest valid: 8"):
        WindowConfig(window=8.4)
    with pytest.raises(ConfigError, match="num_sinks is bool True"):
        WindowConfig(num_sinks=True)


def test_refusals_and_explanation(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = make_qkv(1, 2, 100, 8)
    with pytest.raises(UnsupportedError, match=r'impl="triton"\): query is on cpu.*impl=\'eager\''):
        window_attention(q, k, v, impl="triton")
    with pytest.raises(UnsupportedError, match=r"dropout_p is 0\.1"):
        window_attention(q, k, v, dropout_p=0.1)
    with pytest.raises(UnsupportedError, match="only boolean right-padding masks"):
        window_attention(q, k, v, torch.ones(100, 100, dtype=torch.bool))
    with pytest.raises(ConfigError, match="Did you mean 'eager'"):
        window_attention(q, k, v, impl="eagr")
    with pytest.raises(ShapeError, match="enable_gqa is False"):
        window_attention(q, k[:, :1], v[:, :1])
    told = explain(q, k, v, WindowConfig(window=10, num_sinks=0), is_causal=True)
    assert told.chosen == "eager"
    assert told.visited_fraction == (45 + 91 * 10) / 5050
    assert [r.impl for r in told.reports] == ["triton", "eager", "reference"]


def test_autocast_stays_outside():
    q, k, v = make_qkv(1, 2, 40, 8)
    config = WindowConfig(window=8)
    want = window_attention(*(t.bfloat16() for t in (q, k, v)), is_causal=True, config=config)
    for impl in ("auto", "eager", "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = window_attention(q, k, v, is_causal=True, config=config, impl=impl)
        assert got.dtype is torch.bfloat16
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert torch.equal(want, window_attention(*(t.bfloat16() for t in (q, k, v)), is_causal=True,
                                              config=config, impl="eager"))  # fmt: skip


def test_memory_is_never_quadratic():
    """Time at 4 N over time at N; a quadratic method gives 16."""
    from time import process_time

    config = WindowConfig(window=64)

    def seconds(n):
        q, k, v = make_qkv(1, 1, n, 16, requires_grad=True)
        best = float("inf")
        for _ in range(3):
            start = process_time()
            window_attention(q, k, v, is_causal=True, config=config, impl="eager").sum().backward()
            best = min(best, process_time() - start)
        return best

    seconds(2048)
    assert seconds(16384) < 8 * seconds(4096)
