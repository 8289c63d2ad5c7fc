"""Kernels of HyperAttention's default mode on a GPU: the interpreter's cases, and larger ones."""

from __future__ import annotations

import pytest
import torch

from hyper_chunk_cases import (
    CASES,
    LARGE_CASES,
    assert_backward_matches,
    assert_forward_matches,
    assert_index_is_balanced,
)
from longspan import HyperConfig, hyper_attention, hyper_attention_chunk

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", LARGE_CASES, ids=lambda c: c.id)
def test_large_shapes(case, dtype, nan_scratch):
    assert_forward_matches(case, dtype, "cuda")


@pytest.mark.parametrize("case", [LARGE_CASES[0], LARGE_CASES[1]], ids=lambda c: c.id)
def test_large_shapes_in_single_precision(case, nan_scratch):
    assert_forward_matches(case, torch.float32, "cuda")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_small_shapes(case, nan_scratch):
    assert_forward_matches(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", LARGE_CASES, ids=lambda c: c.id)
def test_gradients_of_large_shapes(case, dtype, nan_scratch):
    assert_backward_matches(case, dtype, "cuda")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_gradients_of_small_shapes(case, nan_scratch):
    assert_backward_matches(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [20, 64, 128])
def test_tree_of_the_index(dtype, dim):
    key = torch.randn(2, 2, 1100, dim, device="cuda").to(dtype)
    for first_chunk in (0, 3):
        assert_index_is_balanced(key, HyperConfig(), first_chunk)


def test_one_token_at_a_time_equals_the_whole():
    q, k, v = torch.randn(3, 1, 2, 700, 64, device="cuda").bfloat16()
    config = HyperConfig(window=64, chunk_size=256, cluster_size=16, num_probes=4)
    with torch.no_grad():
        whole = hyper_attention(q, k, v, is_causal=True, config=config)
        state, at = None, 0
        for size in (300, 1, 250, 149):
            part = (t[:, :, at : at + size] for t in (q, k, v))
            chunk = hyper_attention_chunk(*part, state, config=config)
            torch.testing.assert_close(chunk.output, whole[:, :, at : at + size], rtol=2e-2,
                                       atol=2e-2)  # fmt: skip
            state, at = chunk.final_state, at + size
