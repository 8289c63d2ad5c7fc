"""Infini-attention on a GPU: the cases of the interpreter, and what only a GPU can show."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from infini_cases import CASES, NAMES, Case, assert_matches, run
from longspan import InfiniConfig, infini_attention, infini_attention_chunk

pytestmark = pytest.mark.gpu
HALF = [torch.bfloat16, torch.float16]

LARGE = [
    Case(n=1000, length=256, batch=2, heads=4, kv_heads=2, dim=128, value_dim=128),
    Case(n=1000, length=256, dim=128, value_dim=128, transposed=True, own=True, kv_heads=2),
    Case(n=700, length=128, batch=2, heads=4, dim=64, value_dim=64, lengths=(700, 300)),
    Case(n=900, n_q=300, offset=600, length=200, dim=80, value_dim=96, state=True, own=True),
    Case(n=600, length=150, dim=64, value_dim=128, local="sliding", first="gated"),
    Case(n=800, length=100, dim=128, value_dim=64, shift=-9.0, own=True),
    Case(n=500, length=100, dim=24, value_dim=40, transposed=True),
    Case(n=2500, length=1024, heads=4, kv_heads=2, dim=128, value_dim=128, state=True),
    Case(n=1000, length=256, heads=4, kv_heads=2, dim=128, value_dim=128, update="delta"),
    Case(
        n=700,
        length=128,
        batch=2,
        dim=64,
        value_dim=96,
        lengths=(700, 300),
        update="delta",
        state=True,
        own=True,
    ),
]


def assert_close_in_norm(case: Case, dtype: torch.dtype, limit: float) -> None:
    got = run(case, "triton", dtype, dtype, "cuda")
    want = run(case, "reference", torch.float64, dtype, "cuda")
    for name, actual, oracle in zip(NAMES, got, want, strict=True):
        scale = float(oracle.detach().norm()) or 1.0
        distance = float((actual.detach().double() - oracle.detach()).norm()) / scale
        if name == "dgate":  # a sum of n * D_v terms that cancel: as far off as plain torch
            plain = run(case, "eager", dtype, dtype, "cuda")[NAMES.index(name)]
            off = float((plain.detach().double() - oracle.detach()).norm()) / scale
            assert distance <= max(limit, 2 * off), f"{name}: {distance:.2e}, eager {off:.2e}"
            continue
        assert distance <= limit, f"{name}: {distance:.2e}"


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", LARGE, ids=lambda c: c.id)
def test_large_shapes(case, dtype, nan_scratch):
    assert_close_in_norm(case, dtype, 1e-2 if dtype is torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_small_shapes(case, nan_scratch):
    assert_matches(case, "triton", torch.bfloat16, 2e-2, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_on_a_gpu(dtype):
    assert_matches(dataclasses.replace(LARGE[2], update="delta"), "eager", dtype,
                   2e-4 if dtype is torch.float32 else 2e-2, "cuda")  # fmt: skip


def test_forward_repeats_bit_for_bit():
    q, k, v = (torch.randn(2, 8, 2048, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    config = InfiniConfig(segment_length=512)
    first = infini_attention(q, k, v, config=config, impl="triton")
    for _ in range(3):
        again = infini_attention(q, k, v, config=config, impl="triton")
        assert torch.equal(first.output, again.output)
        assert torch.equal(first.final_state.memory, again.final_state.memory)


def test_chunks_equal_the_whole_and_the_state_moves():
    q, k, v = (torch.randn(1, 4, 1500, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    config = InfiniConfig(segment_length=256)
    whole = infini_attention(q, k, v, config=config).output
    state, pieces, start = None, [], 0
    for size in (700, 1, 1, 298, 500):
        part = [t[:, :, start : start + size] for t in (q, k, v)]
        piece, state = infini_attention_chunk(*part, state, config=config)
        state = state.to("cpu").to("cuda")
        pieces.append(piece)
        start += size
    torch.testing.assert_close(torch.cat(pieces, 2), whole, rtol=2e-2, atol=2e-2)


def test_auto_takes_the_kernels():
    q = torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.bfloat16)
    config = InfiniConfig(segment_length=64)
    got = infini_attention(q, q, q, config=config).output
    assert torch.equal(got, infini_attention(q, q, q, config=config, impl="triton").output)


@pytest.mark.parametrize("dtype", HALF)
def test_decoding_token_by_token(dtype):
    """Through two folds, with grouped heads, against the whole in float64."""
    torch.manual_seed(1)
    shapes = ((4, 560), (2, 560), (2, 560), (4, 560), (2, 560))
    wide = [torch.randn(2, h, n, 128, device="cuda").to(dtype).double() for h, n in shapes]
    config, gate = InfiniConfig(segment_length=256), torch.randn(4, device="cuda")

    def call(tensors, state=None, impl="triton"):
        return infini_attention(
            *tensors[:3], memory_query=tensors[3], memory_key=tensors[4], gate=gate,
            enable_gqa=True, config=config, initial_state=state, impl=impl,
        )  # fmt: skip

    want = call(wide, impl="reference").output[:, :, 500:].float()
    with torch.no_grad():
        state, pieces = call([t[:, :, :500].to(dtype) for t in wide]).final_state, []
        for i in range(500, 560, 2):
            result = call([t[:, :, i : i + 2].to(dtype) for t in wide], state)
            state = result.final_state
            pieces.append(result.output)
    got = torch.cat(pieces, 2).float()
    limit = 1e-2 if dtype is torch.bfloat16 else 2e-3
    assert (got - want).norm() / want.norm() < limit
