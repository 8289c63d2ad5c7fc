"""Stick-breaking kernels on a CUDA device: what the interpreter cannot show."""

from __future__ import annotations

import os

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreting"),
]
pytest.importorskip("triton")

PLAIN = {
    "logit_bias": None,
    "query_offset": 0,
    "key_lengths": None,
    "attend_current": False,
    "window": None,
}


@pytest.fixture(autouse=True)
def _cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def forward(*args, **kwargs):
    from longspan.stick_breaking.impl.triton.forward import stick_forward

    return stick_forward(*args, **{**PLAIN, "early_stop": None, **kwargs})


def backward(grad, grad_rest, q, k, v, part, **kwargs):
    from longspan.stick_breaking.impl.triton.backward import stick_backward

    return stick_backward(
        grad, grad_rest, q, k, v, part.output, part.residual, part.log_rest, part.visited,
        **{**PLAIN, "early_stop": None, **kwargs},
    )  # fmt: skip


def draw(heads, kv_heads, n_q, n_k, d, d_v, dtype):
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(count, length, dim):
        shape = (1, length, count, dim)
        return torch.randn(shape, device="cuda", generator=generator).transpose(1, 2).to(dtype)

    return normal(heads, n_q, d), normal(kv_heads, n_k, d), normal(kv_heads, n_k, d_v)


def dense(q, k, v, scale, bias, offset=0, window=None, attend_current=False):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    z = scale * q @ k.transpose(-1, -2) + bias
    limit = torch.arange(q.shape[2], device=q.device)[:, None] + offset + int(attend_current)
    key = torch.arange(k.shape[2], device=q.device)
    seen = key < limit
    if window is not None:
        seen = seen & (key >= limit - window)
    logs = torch.where(seen, torch.nn.functional.logsigmoid(-z), 0.0)
    nearer = logs.flip(-1).cumsum(-1).flip(-1) - logs
    weights = torch.where(seen, torch.exp(torch.nn.functional.logsigmoid(z) + nearer), 0.0)
    return weights @ v, logs.sum(-1)


def error(actual, oracle):
    return float((actual.double() - oracle).norm() / oracle.norm())


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float32, 1e-5)],
    ids=["bfloat16", "float16", "float32"],
)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (40, 80), (16, 128)])
@pytest.mark.parametrize(
    "options", [{}, {"window": 150}, {"attend_current": True}], ids=["plain", "window", "current"]
)
def test_against_float64(dtype, tolerance, dims, options):
    q, k, v = draw(4, 2, 333, 333, *dims, dtype)
    bias = torch.tensor([0.0, -2.0, -4.0, -6.0], device="cuda")
    settings = {"scale": dims[0] ** -0.5, "logit_bias": bias, **options}
    part = forward(q, k, v, need_grad=True, **settings)
    grad = torch.randn_like(part.output)
    grad_rest = torch.randn_like(part.log_rest)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    wide_bias = bias.double().requires_grad_()
    oracle = dense(*leaves, settings["scale"], wide_bias[:, None, None], **options)
    want = torch.autograd.grad(oracle, [*leaves, wide_bias], [grad.double(), grad_rest.double()])
    got = backward(grad, grad_rest, q, k, v, part, **settings)
    again = backward(grad, grad_rest, q, k, v, part, **settings)
    assert error(part.output, oracle[0].detach()) < tolerance
    assert error(part.log_rest, oracle[1].detach()) < 1e-4
    for actual, repeated, expected in zip(got, again, want, strict=True):
        assert torch.equal(actual, repeated)
        assert error(actual, expected) < tolerance


@pytest.mark.parametrize("std", [10.0, 60.0])
def test_saturated(std):
    q, k, v = draw(2, 2, 700, 700, 64, 64, torch.bfloat16)
    q = q * std
    part = forward(q, k, v, scale=0.125, need_grad=True)
    grad = torch.randn_like(v)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    oracle, log_rest = dense(*leaves, 0.125, 0.0)
    want = torch.autograd.grad(oracle, leaves, grad.double())
    got = backward(grad, None, q, k, v, part, scale=0.125)
    assert error(part.output, oracle.detach()) < 5e-3
    assert error(part.log_rest, log_rest.detach()) < 1e-4
    for actual, expected in zip(got, want, strict=False):
        assert error(actual, expected) < 5e-3


def test_head_dim_256():
    q, k, v = draw(2, 1, 300, 300, 256, 256, torch.bfloat16)
    bias = torch.full((2,), -4.0, device="cuda")
    part = forward(q, k, v, scale=1 / 16, logit_bias=bias, need_grad=True)
    grad = torch.randn_like(part.output)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    oracle, _ = dense(*leaves, 1 / 16, -4.0)
    want = torch.autograd.grad(oracle, leaves, grad.double())
    got = backward(grad, None, q, k, v, part, scale=1 / 16, logit_bias=bias)
    for actual, expected in zip(got, want, strict=False):
        assert error(actual, expected) < 5e-3


def test_offsets_beyond_32_bits():
    """More than 2**31 elements in each tensor: the last head of the last rows is right."""
    heads, length = 66, 262144
    q = torch.randn(1, 1, length, 128, device="cuda", dtype=torch.bfloat16)
    q = q.repeat(1, heads, 1, 1)
    assert q.numel() > 2**31
    whole = forward(q, q, q, scale=0.1, window=64, need_grad=False)
    alone = forward(q[:, -1:], q[:, -1:], q[:, -1:], scale=0.1, window=64, need_grad=False)
    assert torch.equal(whole.output[:, -1:], alone.output)
    assert torch.equal(whole.log_rest[:, -1:], alone.log_rest)


@pytest.mark.parametrize("length", [16384, 32768])
def test_backward_workspace_is_bounded(length):
    q, k, v = draw(32, 32, length, length, 64, 64, torch.bfloat16)
    part = forward(q, k, v, scale=0.125, need_grad=True)
    grad = torch.randn_like(v)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = backward(grad, None, q, k, v, part, scale=0.125)
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    used -= sum(t.numel() * t.element_size() for t in results[:3])
    assert used <= 512 * 2**20


def test_row_chunks_give_the_same_gradient():
    q, k, v = draw(4, 2, 1000, 1000, 64, 64, torch.bfloat16)
    bias = torch.full((4,), -5.0, device="cuda")
    settings = {"scale": 0.125, "logit_bias": bias}
    part = forward(q, k, v, need_grad=True, **settings)
    grad = torch.randn_like(part.output)
    whole = backward(grad, None, q, k, v, part, **settings)
    for workspace_bytes in (1, 100_000, 1_000_000):
        parts = backward(grad, None, q, k, v, part, workspace_bytes=workspace_bytes, **settings)
        for a, b in zip(parts, whole, strict=True):
            assert error(a, b.double()) < 2e-3


def test_decode_in_a_cuda_graph():
    from longspan.stick_breaking.impl.triton.decode import stick_decode

    q, k, v = draw(8, 2, 1, 5000, 128, 128, torch.bfloat16)
    settings = {**PLAIN, "query_offset": 5000, "scale": 0.1, "early_stop": 1e-7}
    settings["logit_bias"] = torch.tensor([-1.0] * 4 + [-8.0] * 4, device="cuda")
    eager, _, visited = stick_decode(q, k, v, **settings)
    assert visited[0, 0] < visited[0, -1]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stick_decode(q, k, v, **settings)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = stick_decode(q, k, v, **settings)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured[0], eager)
    exact = forward(q, k, v, need_grad=False, **{**settings, "early_stop": None})
    assert error(eager, exact.output.double()) < 5e-3
