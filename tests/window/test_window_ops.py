"""The torch.library operators: fakes, autograd registration, compilation."""

from __future__ import annotations

import pytest
import torch

from longspan import WindowConfig, window_attention, window_attention_varlen
from longspan.testing import make_qkv
from longspan.window.ops import window_fwd

SETTINGS = (True, 0.25, 3, 7, 2, "eager")  # is_causal, scale, offset, window, sinks, impl


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_opcheck_dense(dtype, transposed):
    q, k, v = make_qkv(2, 4, 9, 8, n_k=12, kv_heads=2, value_dim=6, dtype=dtype,
                       transposed=transposed, requires_grad=True)  # fmt: skip
    lengths = torch.tensor([12, 10], dtype=torch.int32)
    torch.library.opcheck(window_fwd, (q, k, v, lengths, None, None, 0, 0, *SETTINGS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck_packed(dtype):
    q, k, v = make_qkv(1, 4, 9, 8, n_k=12, kv_heads=2, dtype=dtype, transposed=True,
                       requires_grad=True)  # fmt: skip
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in ([0, 4, 9], [0, 4, 12]))
    settings = (True, 0.25, 0, 7, 2, "eager")
    torch.library.opcheck(window_fwd, (q, k, v, None, cu_q, cu_k, 5, 8, *settings))


def test_compiles_in_one_graph():
    config = WindowConfig(window=7, num_sinks=1)

    def function(q, k, v):
        return window_attention(q * 2, k, v, is_causal=True, config=config, impl="eager") + 1

    q, k, v = make_qkv(2, 2, 20, 8, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = compiled(q, k, v), function(q, k, v)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.square().sum(), (q, k, v)),
                    torch.autograd.grad(want.square().sum(), (q, k, v)), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_packed_compiles_in_one_graph():
    q = torch.randn(9, 2, 8)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)

    def function(q):
        return window_attention_varlen(q, q, q, cu, cu, 5, 5, is_causal=True,
                                       config=WindowConfig(window=3), impl="eager")  # fmt: skip

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), function(q))
