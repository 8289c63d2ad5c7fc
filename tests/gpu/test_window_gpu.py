"""Window kernels on a GPU: the cases of the interpreter, and what only a GPU can show."""

from __future__ import annotations

import pytest
import torch

from longspan import WindowConfig, window_attention, window_attention_varlen
from longspan._triton.launch import KernelConfig
from longspan._validation import validate
from longspan.testing import make_qkv
from longspan.window.impl.reference import window_reference
from longspan.window.impl.triton.forward import triton_forward
from longspan.window.ops import window_fwd
from window_cases import CASES, Case, assert_matches_reference, attend

pytestmark = pytest.mark.gpu
HALF = [torch.bfloat16, torch.float16]

LARGE = [
    Case(700, 700, window=300, sinks=4, heads=4, kv_heads=2, dim=64, value_dim=64),
    Case(513, 1100, 587, window=257, sinks=20, dim=128, value_dim=128, transposed=True),
    Case(400, 400, window=150, sinks=200, dim=80, value_dim=96, padded=True),
    Case(300, 300, window=100, dim=192, value_dim=256, heads=1),
    Case(600, 500, -50, window=130, sinks=7, dim=64, value_dim=64, is_causal=False, padded=True),
    Case(1, 3000, 2999, window=1024, dim=128, value_dim=128, heads=8, kv_heads=2),
    Case(2500, 2500, window=64, sinks=70, dim=64, value_dim=64, batch=1),
    Case(500, 500, window=200, dim=64, value_dim=64, kind="peaked"),
    Case(500, 500, window=200, dim=64, value_dim=64, kind="large"),
]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", LARGE, ids=lambda c: c.id)
def test_large_shapes(case, dtype, nan_scratch):
    assert_matches_reference(case, "triton", dtype, "cuda")


@pytest.mark.parametrize("case", LARGE[:3], ids=lambda c: c.id)
def test_large_shapes_in_single_precision(case, nan_scratch):
    assert_matches_reference(case, "triton", torch.float32, "cuda")


@pytest.mark.parametrize("case", [*CASES[::2], CASES[25], CASES[27]], ids=lambda c: c.id)
def test_small_shapes(case, nan_scratch):
    assert_matches_reference(case, "triton", torch.bfloat16, "cuda")


ODD = Case(340, 340, heads=6, kv_heads=1, dim=20, value_dim=5, transposed=True, window=90)


@pytest.mark.parametrize("case", [ODD, LARGE[0], LARGE[4]], ids=lambda c: c.id)
@pytest.mark.parametrize(
    "kernel",
    [KernelConfig(64, 64, 4, 3, None, True), KernelConfig(128, 32, 8, 4, 128, True)],
)
def test_forward_of_each_kind_of_configuration(kernel, case):
    q, k, v = make_qkv(case.batch, case.heads, case.n_q, case.dim, n_k=case.n_k,
                       kv_heads=case.kv_heads, value_dim=case.value_dim, dtype=torch.bfloat16,
                       device="cuda", transposed=case.transposed)  # fmt: skip
    lengths = torch.tensor([case.n_k, case.n_k - 5], device="cuda") if case.padded else None
    call = validate("test", q, k, v, is_causal=case.is_causal, enable_gqa=True,
                    query_offset=case.offset, key_lengths=lengths)  # fmt: skip
    config = WindowConfig(window=case.window, num_sinks=case.sinks)
    output, lse = triton_forward(call, config, None, None, 0, 0, kernel)
    want = window_reference(call._replace(query=q.double(), key=k.double(), value=v.double()),
                            config)  # fmt: skip
    assert (output.double() - want.output).norm() < 6e-3 * want.output.norm()
    torch.testing.assert_close(lse.double(), want.lse, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_eager_on_a_gpu(dtype):
    assert_matches_reference(LARGE[0], "eager", dtype, "cuda")


@pytest.mark.parametrize("is_causal", [True, False])
def test_packed(is_causal):
    lengths_q, lengths_k = [300, 0, 417, 1, 50], [300, 20, 600, 900, 20]
    cu_q = torch.tensor([0, *lengths_q]).cumsum(0).int().cuda()
    cu_k = torch.tensor([0, *lengths_k]).cumsum(0).int().cuda()
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    made = [torch.randn(n, h, 64, device="cuda", dtype=torch.bfloat16)
            for n, h in ((total_q, 4), (total_k, 2), (total_k, 2))]  # fmt: skip
    up = torch.randn(total_q, 64, 4, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    config = WindowConfig(window=200, num_sinks=5)

    def run(impl, dtype):
        q, k, v = (t.to(dtype).requires_grad_() for t in made)
        out = window_attention_varlen(q, k, v, cu_q, cu_k, 512, 1000, is_causal=is_causal,
                                      enable_gqa=True, config=config, impl=impl)  # fmt: skip
        return out, *torch.autograd.grad(out, (q, k, v), up.to(dtype))

    for got, want in zip(run("triton", torch.bfloat16), run("reference", torch.float64),
                         strict=True):  # fmt: skip
        assert (got.double() - want).norm() / want.norm() < 6e-3


def test_repeats_bit_for_bit():
    case = Case(3000, 3000, window=500, sinks=9, heads=8, kv_heads=2, dim=64, value_dim=64)
    q, k, v = make_qkv(2, 8, 3000, 64, kv_heads=2, dtype=torch.bfloat16, device="cuda")
    first = attend(case, "triton", q, k, v)
    for _ in range(3):
        for a, b in zip(first, attend(case, "triton", q, k, v), strict=True):
            assert torch.equal(a, b)


def test_batch_neighbours_change_no_bit():
    case = Case(900, 900, window=200, heads=4, kv_heads=2, dim=64, value_dim=64, batch=3)
    q, k, v = make_qkv(3, 4, 900, 64, kv_heads=2, dtype=torch.bfloat16, device="cuda")
    whole = attend(case, "triton", q, k, v)
    up = torch.randn(3, 4, 900, 64, device="cuda", dtype=torch.bfloat16)
    config = WindowConfig(window=200, num_sinks=3)

    def grads(q, k, v, up):
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        out = window_attention(q, k, v, is_causal=True, enable_gqa=True, config=config)
        return torch.autograd.grad(out, (q, k, v), up)

    alone = window_attention(q[1:2], k[1:2], v[1:2], is_causal=True, enable_gqa=True,
                             config=config, impl="triton")  # fmt: skip
    assert torch.equal(whole.output[1:2], alone)
    for a, b in zip(grads(q, k, v, up), grads(q[1:2], k[1:2], v[1:2], up[1:2]), strict=True):
        assert torch.equal(a[1:2], b)


def test_offsets_beyond_31_bits():
    """The last head begins more than 2**31 elements after the first."""
    n, heads = 300_000, 60
    if torch.cuda.mem_get_info()[0] < 45 * 2**30:
        pytest.skip("needs 45 GB of free device memory")
    q = torch.randn(1, n, heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    assert (heads - 1) * 128 + (n - 1) * q.stride(2) > 2**31
    config = WindowConfig(window=300, num_sinks=4)
    tail = [t[:, -1:, -2000:].detach() for t in (q, q, q)]
    sinks = q[:, -1:, :4]
    keys = torch.cat((sinks, q[:, -1:, -2400:]), 2)
    want = window_attention(tail[0].double(), keys.double(), keys.double(), is_causal=True,
                            query_offset=404, config=config, impl="reference")  # fmt: skip
    q.requires_grad_()
    out = window_attention(q, q, q, is_causal=True, config=config, impl="triton")
    assert (out[:, -1:, -2000:].double() - want).abs().max() < 3e-2
    up = torch.zeros((), device="cuda", dtype=torch.bfloat16).expand_as(out)
    (grad,) = torch.autograd.grad(out, q, up)
    assert bool((grad[:, -1, -2000:] == 0).all())


def test_any_stride():
    base = torch.randn(2, 4, 300, 128, device="cuda", dtype=torch.bfloat16)
    q = base[..., ::2]
    k = torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.bfloat16).expand(2, 2, 300, 64)
    v = torch.randn(2, 5, 300, 65, device="cuda", dtype=torch.bfloat16)[:, 1:4:2, :, 1:]

    def run(impl, dtype):
        inputs = [t.detach().to(dtype) if dtype is torch.float64 else t.detach() for t in (q, k, v)]
        inputs = [t.requires_grad_() for t in inputs]
        out = window_attention(*inputs, is_causal=True, enable_gqa=True, impl=impl,
                               config=WindowConfig(window=120, num_sinks=3))  # fmt: skip
        return out, *torch.autograd.grad(out.sum(), inputs)

    for got, want in zip(run("triton", torch.bfloat16), run("reference", torch.float64),
                         strict=True):  # fmt: skip
        assert (got.double() - want).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize("dtype", HALF)
def test_opcheck(dtype):
    q, k, v = make_qkv(2, 4, 90, 32, n_k=120, kv_heads=2, value_dim=16, dtype=dtype, device="cuda",
                       transposed=True, requires_grad=True)  # fmt: skip
    settings = (True, 0.25, 30, 70, 2, "triton")
    torch.library.opcheck(window_fwd, (q, k, v, None, None, None, 0, 0, *settings))


def test_compiles_in_one_graph():
    config = WindowConfig(window=70, num_sinks=1)

    def function(q, k, v):
        return window_attention(q * 2, k, v, is_causal=True, config=config) + 1

    q, k, v = make_qkv(2, 2, 200, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    compiled = torch.compile(function, fullgraph=True)
    got, want = compiled(q, k, v), function(q, k, v)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    for a, b in zip(torch.autograd.grad(got.square().sum(), (q, k, v)),
                    torch.autograd.grad(want.square().sum(), (q, k, v)), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)


def test_memory_is_linear():
    def peak(n):
        q, k, v = make_qkv(1, 4, n, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        window_attention(q, k, v, is_causal=True, config=WindowConfig(window=256)).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(32768) < 5 * peak(8192)
