"""Kernels of the paper's recursion in the interpreter, against the float64 definition."""

from __future__ import annotations

import pytest
import torch

from hyper_kernel_cases import CASES, SETTINGS, assert_kernels_match
from longspan._validation import validate
from longspan.hyper.impl.recursion import recursion_index
from longspan.hyper.impl.triton.index import triton_index
from longspan.hyper.impl.triton.tiles import block_dim
from longspan.hyper.index.lsh import draw_projections
from longspan.testing import make_qkv


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_float32(case, nan_scratch):
    assert_kernels_match(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [CASES[1], CASES[14]], ids=lambda c: c.id)
def test_half_precision(case, dtype, nan_scratch):
    assert_kernels_match(case, dtype)


@pytest.mark.parametrize("case", [c for c in CASES if c.settings != "kmeans"], ids=lambda c: c.id)
def test_index_is_that_of_plain_torch(case, nan_scratch):
    q, k, v = make_qkv(case.batch, case.heads, case.n_q, case.dim, n_k=case.n_k,
                       kv_heads=case.kv_heads, value_dim=case.value_dim,
                       transposed=case.transposed)  # fmt: skip
    config = SETTINGS[case.settings]
    call = validate("test", q, k, v, is_causal=case.is_causal, enable_gqa=True,
                    query_offset=case.offset)  # fmt: skip
    planes = draw_projections(3, case.kv_heads, case.dim, config.num_projections, q.device)
    for seed in (0, 2**40 + 12345):
        got = triton_index(call, config, planes, seed)
        want = recursion_index(call, config, planes, seed)
        for name, a, b in zip(got._fields, got, want, strict=True):
            assert a.dtype == b.dtype, name
            if a.is_floating_point():
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(a, b), name


def test_all_tiles_of_a_kernel_have_one_width():
    """Tiles of 32 and 16 columns in one kernel: Triton 3.6 read shared memory out of bounds on an
    H100, in the forward of nodes. The interpreter cannot see that."""
    assert block_dim(20, 5) == block_dim(5, 20) == block_dim(16, 16) == 32
    assert block_dim(64, 128) == 128
