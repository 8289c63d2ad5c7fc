"""Kernels of HyperAttention's default mode on a GPU: the interpreter's cases, and larger ones."""

from __future__ import annotations

import pytest
import torch

from hyper_chunk_cases import (
    CASES,
    LARGE_CASES,
    assert_backward_matches,
    assert_forward_matches,
)

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
