"""Kernels of HyperAttention's recursion on a GPU: the interpreter's cases, and larger ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hyper_kernel_cases import CASES, SETTINGS, Case, assert_kernels_match
from longspan import HyperConfig, hyper_attention, hyper_attention_with_lse
from longspan._validation import validate
from longspan.hyper.impl.recursion import geometry_of, recursion_index
from longspan.hyper.impl.triton.index import triton_index
from longspan.hyper.index.lsh import draw_projections
from longspan.testing import make_qkv

pytestmark = pytest.mark.gpu

LARGE = [
    Case(2048, 2048, settings="large", heads=4, kv_heads=2, dim=64, value_dim=64),
    Case(1500, 1777, 277, settings="large", dim=128, value_dim=128, batch=2, transposed=True),
    Case(1300, 1300, settings="large", dim=80, value_dim=96, kind="peaked"),
    Case(1100, 1100, settings="large", dim=192, value_dim=256),
    Case(1999, 1999, settings="large", dim=20, value_dim=5, heads=6, transposed=True),
    Case(1100, 1100, settings="large", dim=64, value_dim=128),
    Case(1024, 1024, settings="large", dim=128, value_dim=16),
    Case(1025, 1025, settings="large", dim=16, value_dim=16),
    Case(1500, 1100, settings="large", is_causal=False, dim=64, value_dim=64),
    Case(1024, 1024, settings="large", is_causal=False, dim=128, value_dim=128, heads=4),
    Case(1200, 1200, settings="large", dim=64, value_dim=64, kind="large"),
    Case(5000, 9000, 4000, settings="official", dim=128, value_dim=128, heads=2, kv_heads=1),
    Case(9000, 9000, settings="official", dim=64, value_dim=64, is_causal=False),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", LARGE, ids=lambda c: c.id)
def test_large_shapes(case, dtype, nan_scratch):
    assert_kernels_match(case, dtype, "cuda")


@pytest.mark.parametrize("case", [LARGE[0], LARGE[1], LARGE[8]], ids=lambda c: c.id)
def test_large_shapes_in_single_precision(case, nan_scratch):
    assert_kernels_match(case, torch.float32, "cuda")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_small_shapes(case, nan_scratch):
    assert_kernels_match(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [LARGE[0], LARGE[1], LARGE[8]], ids=lambda c: c.id)
def test_index_is_that_of_plain_torch(case, dtype, nan_scratch):
    """The same blocks, but for rows on a hash plane up to rounding; the same draws."""
    q, k, v = make_qkv(case.batch, case.heads, case.n_q, case.dim, n_k=case.n_k,
                       kv_heads=case.kv_heads, value_dim=case.value_dim, dtype=dtype,
                       device="cuda", transposed=case.transposed)  # fmt: skip
    call = validate("test", q, k, v, is_causal=case.is_causal, enable_gqa=True,
                    query_offset=case.offset)  # fmt: skip
    config = SETTINGS[case.settings]
    planes = draw_projections(3, case.kv_heads, case.dim, config.num_projections, q.device)
    got, want = triton_index(call, config, planes, 9), recursion_index(call, config, planes, 9)
    geometry = geometry_of(call, config)
    for orders, bases, side in (
        (got.query_order, geometry.query_bases, "q"), (got.key_order, geometry.key_bases, "k"),
    ):  # fmt: skip
        other = want.query_order if side == "q" else want.key_order
        for node, base in zip(geometry.nodes, bases, strict=False):
            start, end = ((node.q_start, node.q_end) if side == "q" else
                          (node.k_start, node.k_end))  # fmt: skip
            mine, theirs = (t[..., base : base + end - start].long() for t in (orders, other))
            natural = torch.arange(start, end, device="cuda").expand_as(mine)
            assert torch.equal(mine.sort(-1).values, natural)
            block = node.q_block if side == "q" else node.k_block
            numbers = torch.arange(end - start, device="cuda") // block
            of_mine, of_theirs = (torch.empty_like(t).scatter_(-1, t - start, numbers.expand_as(t))
                                  for t in (mine, theirs))  # fmt: skip
            assert (of_mine != of_theirs).float().mean() < 0.02
    torch.testing.assert_close(got.sample_bias, want.sample_bias, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.sample_owner, want.sample_owner)


def test_public_function_and_gradients():
    """auto runs the kernels in paper mode; the same seed gives the same bits."""
    q, k, v = make_qkv(1, 4, 3000, 64, kv_heads=2, dtype=torch.bfloat16, device="cuda")
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    config = SETTINGS["large"]
    runs = []
    for impl in ("auto", "triton"):
        part = hyper_attention_with_lse(q, k, v, is_causal=True, enable_gqa=True, config=config,
                                        seed=4, impl=impl)  # fmt: skip
        total = part.output.float().square().sum() + part.lse.sum()
        runs.append((*part, *torch.autograd.grad(total, (q, k, v))))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    eager = hyper_attention_with_lse(q, k, v, is_causal=True, enable_gqa=True, config=config,
                                     seed=4, impl="eager")  # fmt: skip
    # Rows on a hash plane may sit in another block: nearly all rows agree.
    apart = (runs[0][1] - eager.lse).abs() > 1e-3
    assert apart.float().mean() < 0.05


@pytest.mark.parametrize("length", [1, 100, 4097, 20000])
@pytest.mark.parametrize("is_causal", [True, False])
def test_zero_queries_count_keys(length, is_causal):
    """lse = log(visible keys): exactly with as many samples, in expectation with fewer. With no
    samples to weigh, i.e. blocks over everything, it is exact."""
    q = torch.zeros(1, 2, length, 64, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, 1, length, 64, device="cuda", dtype=torch.bfloat16)
    config = HyperConfig.paper(block_size=max(16, length), min_length=max(16, length))
    part = hyper_attention_with_lse(q, k, k, is_causal=is_causal, enable_gqa=True, config=config,
                                    impl="triton")  # fmt: skip
    seen = torch.arange(1, length + 1, device="cuda") if is_causal else torch.tensor(length)
    want = seen.to("cuda").float().log().expand(1, 2, length)
    torch.testing.assert_close(part.lse, want, rtol=0, atol=2e-5)
    config = replace(HyperConfig.paper(), num_samples=1024)
    paper = hyper_attention_with_lse(
        q, k, k, is_causal=is_causal, enable_gqa=True, impl="triton", config=config
    )
    assert (paper.lse - want).abs().max() < 0.5


def test_default_mode_falls_back():
    q = torch.randn(1, 2, 700, 64, device="cuda", dtype=torch.bfloat16)
    assert hyper_attention(q, q, q, is_causal=True).isfinite().all()
    with pytest.raises(Exception, match="structure='chunks'"):
        hyper_attention(q, q, q, is_causal=True, impl="triton")


def test_many_programs():
    """More than 65,535 tiles of one head count."""
    q = torch.randn(1, 1, 64, 64, device="cuda", dtype=torch.bfloat16)
    one = hyper_attention(q, q, q, is_causal=True, config=SETTINGS["paper"], impl="triton")
    many = q.expand(70000, 1, 64, 64)
    all_of = hyper_attention(many, many, many, is_causal=True, config=SETTINGS["paper"],
                             impl="triton")  # fmt: skip
    assert torch.equal(all_of[-1], one[0])
