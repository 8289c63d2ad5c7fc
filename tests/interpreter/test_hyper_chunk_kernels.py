"""Kernels of HyperAttention's default mode in the interpreter, against the float64 definition."""

from __future__ import annotations

import pytest
import torch

from hyper_chunk_cases import (
    CASES,
    SMALL,
    assert_backward_matches,
    assert_forward_matches,
    assert_index_is_balanced,
    make_case,
)
from longspan import HyperConfig, hyper_attention
from longspan.errors import UnsupportedError
from longspan.hyper.impl.common import chunk_index
from longspan.hyper.impl.triton.chunks_forward import triton_chunks_forward
from longspan.hyper.impl.triton.chunks_index import triton_chunk_index
from longspan.hyper.impl.triton.chunks_lists import make_lists


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_float32(case, nan_scratch):
    assert_forward_matches(case, torch.float32)


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 4, 5, 7)], ids=lambda c: c.id)
def test_gradients(case, nan_scratch):
    assert_backward_matches(case, torch.float32)


def test_half_precision(nan_scratch):
    assert_forward_matches(CASES[1], torch.float16)
    assert_backward_matches(CASES[1], torch.bfloat16)


def test_opened_clusters_that_hold_all_the_weight():
    """The column of a cluster is taken off again: exact where the cluster is all there is."""
    case = CASES[0]
    call, index = make_case(case, torch.float32)
    key = call.key.clone()
    key[:, :, 5] = 40 * call.query[:, :1, -1]  # a needle for the last query
    call = call._replace(key=key)
    index = chunk_index(call, case.config, None, 0)
    output, _, _ = triton_chunks_forward(call, case.config, index)
    torch.testing.assert_close(output[:, 0, -1], call.value[:, 0, 5], rtol=1e-5, atol=1e-5)


def test_lists_hold_every_entry_once_and_in_order():
    chosen = torch.tensor([[2, -1, 0, 2, 2, 0, -1, 2], [1, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.int32)
    lists = make_lists(chosen, 3, 2)
    found = [lists.entries[c // 3, b:e].tolist()
             for c, (b, e) in enumerate(zip(lists.begins, lists.ends, strict=True))]  # fmt: skip
    assert found == [[2, 5], [], [0, 3, 4, 7], [], list(range(8)), []]
    tiles = lists.tile_list.tolist()
    assert tiles[:7] == [0, 2, 2, 4, 4, 4, 4]
    assert set(tiles[7:]) == {6}


def test_bits_repeat(nan_scratch):
    call, index = make_case(CASES[0], torch.float32)
    one, two = (triton_chunks_forward(call, CASES[0].config, index) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_public_function_takes_the_kernels():
    case = CASES[0]
    call, _ = make_case(case, torch.float32)
    grads, outputs = [], []
    for impl in ("triton", "eager"):
        leaves = [t.clone().requires_grad_() for t in call[:3]]
        output = hyper_attention(*leaves, is_causal=True, enable_gqa=True, config=case.config,
                                 impl=impl)  # fmt: skip
        outputs.append(output)
        grads.append(torch.autograd.grad(output.square().sum(), leaves))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "change", "said"),
    [
        ({}, {"is_causal": False}, "not causal"),
        ({}, {"key_lengths": torch.tensor([40], dtype=torch.int32)}, "key_lengths"),
        ({"residual": "uniform"}, {}, "residual"),
        ({"num_globals": 1}, {}, "num_globals"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(settings, change, said):
    q = torch.randn(1, 1, 64, 16)
    config = HyperConfig(**{**SMALL, **settings})
    arguments = {"is_causal": True, "config": config, **change}
    with pytest.raises(UnsupportedError, match=said):
        hyper_attention(q, q, q, impl="triton", **arguments)
    hyper_attention(q, q, q, **arguments)


@pytest.mark.parametrize("first_chunk", [0, 2])
def test_tree_of_the_index(first_chunk, nan_scratch):
    key = torch.randn(1, 2, 150, 20, generator=torch.Generator().manual_seed(3))
    config = HyperConfig(**{**SMALL, "chunk_size": 64})
    assert_index_is_balanced(key, config, first_chunk)
    assert_index_is_balanced(key, HyperConfig(**{**SMALL, "cluster_size": 32}), first_chunk)


def test_tree_of_equal_and_of_infinite_keys():
    key = torch.zeros(1, 1, 64, 16)
    key[:, :, 40, 3] = float("inf")
    key[:, :, 41, 3] = float("nan")
    index = triton_chunk_index(key, HyperConfig(**SMALL))
    assert torch.equal(index.order.sort(-1).values, torch.arange(64).view(1, 1, -1).int())
