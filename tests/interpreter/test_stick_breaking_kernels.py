"""Stick-breaking kernels in Triton's interpreter, against a float64 walk along the definition."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

import triton.runtime.interpreter as interpreter

from longspan._merge import merge_stick_breaking
from longspan.stick_breaking.impl.triton import decode, forward
from longspan.stick_breaking.impl.triton.backward import stick_backward
from longspan.stick_breaking.impl.triton.decode import split_plan, stick_decode
from longspan.stick_breaking.impl.triton.forward import stick_forward

DEFAULTS = {
    "logit_bias": None,
    "query_offset": 0,
    "key_lengths": None,
    "attend_current": False,
    "window": None,
}


@pytest.fixture(autouse=True)
def _numpy_scalars(monkeypatch):
    """Triton 3.6: int() of the one-element arrays that stand for scalars; NumPy 2.4 refuses it."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def definition(q, k, v, *, scale, logit_bias, query_offset, key_lengths, attend_current, window):
    """Break the stick key by key, near to far, all rows at once; float64, differentiable."""
    batch, heads, n_q, _ = q.shape
    n_k = k.shape[2]
    k = k.repeat_interleave(heads // k.shape[1], 1)
    v = v.repeat_interleave(heads // v.shape[1], 1)
    logits = scale * q @ k.transpose(-1, -2)
    if logit_bias is not None:
        logits = logits + logit_bias[None, :, None, None]
    limit = torch.arange(n_q) + query_offset + int(attend_current)
    lengths = torch.full((batch,), n_k) if key_lengths is None else key_lengths
    rest = 1 + 0 * q.sum(-1)  # in the graph even where no row sees a key
    log_rest = 0 * q.sum(-1)
    output = 0 * q.sum(-1, keepdim=True) * v.new_zeros(v.shape[-1])
    for distance in range(int(limit.max()) if n_q else 0):
        key = limit - 1 - distance
        seen = (key >= 0) & (key < lengths[:, None])  # (B, N_q)
        if window is not None and distance >= window:
            break
        key = key.clamp(0, n_k - 1)
        z = logits[:, :, torch.arange(n_q), key]
        take = torch.where(seen[:, None], torch.sigmoid(z), 0.0)
        output = output + (rest * take)[..., None] * v[:, :, key]
        rest = rest * (1 - take)
        log_rest = log_rest + torch.where(
            seen[:, None], torch.nn.functional.logsigmoid(-z), torch.zeros_like(z)
        )
    return output, log_rest


def draw(batch=1, heads=2, kv_heads=1, n_q=70, n_k=None, d=16, d_v=16, std=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n_k = n_q if n_k is None else n_k
    q = torch.randn(batch, n_q, heads, d, generator=generator).transpose(1, 2) * std
    k = torch.randn(batch, kv_heads, n_k, d, generator=generator)
    v = torch.randn(batch, kv_heads, n_k, d_v, generator=generator)
    return q, k, v, generator


def distance(actual, oracle):
    """Relative Frobenius error; absolute where the oracle vanishes."""
    oracle = oracle.detach()
    return float((actual.double() - oracle).norm() / oracle.norm().clamp_min(1e-3))


def check(
    inputs,
    settings,
    *,
    early_stop=None,
    tolerance=1e-5,
    through_rest=True,
    grad_factor=3,
    **backward,
):
    """Forward and all gradients of one problem."""
    q, k, v, generator = inputs
    settings = {**DEFAULTS, "scale": q.shape[-1] ** -0.5, **settings}
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    bias = settings["logit_bias"]
    wide_bias = None if bias is None else bias.double().requires_grad_()
    output, log_rest = definition(*wide, **{**settings, "logit_bias": wide_bias})
    grad_output = torch.randn(output.shape, generator=generator).to(q.dtype)
    grad_rest = torch.randn(log_rest.shape, generator=generator) if through_rest else None

    part = stick_forward(q, k, v, early_stop=early_stop, need_grad=True, **settings)
    assert part.output.dtype is q.dtype
    assert part.log_rest.dtype is torch.float32
    assert distance(part.output, output) < tolerance
    if early_stop is None:
        # absolute near 0: the stick is a product of float32 factors close to 1
        torch.testing.assert_close(part.log_rest, log_rest.detach().float(), rtol=1e-5, atol=5e-6)

    results, grads = [output], [grad_output.double()]
    if through_rest:
        results.append(log_rest)
        grads.append(grad_rest.double())
    leaves = wide if bias is None else [*wide, wide_bias]
    oracle = torch.autograd.grad(results, leaves, grads, allow_unused=True)
    grads = stick_backward(
        grad_output,
        grad_rest,
        q,
        k,
        v,
        *reorder(part),
        early_stop=early_stop,
        **settings,
        **backward,
    )
    for actual, expected in zip(grads, oracle, strict=False):
        assert actual.isfinite().all()
        assert (
            distance(actual, torch.zeros(()) if expected is None else expected)
            < grad_factor * tolerance
        )
    assert (grads[3] is None) == (bias is None)
    return part


def reorder(part):
    return part.output, part.residual, part.log_rest, part.visited


CASES = {
    "one tile": ({}, {}),
    "several tiles": ({"n_q": 140}, {"logit_bias": -5.0}),
    "exact tiles": ({"n_q": 128}, {}),
    "one more than a tile": ({"n_q": 129}, {"logit_bias": -3.0}),
    "group": ({"heads": 4, "kv_heads": 2, "n_q": 70}, {}),
    "value dim": ({"d": 24, "d_v": 40}, {}),
    "batch": ({"batch": 2, "n_q": 65}, {}),
    "attend current": ({"n_q": 80}, {"attend_current": True}),
    "offset": ({"n_q": 40, "n_k": 170}, {"query_offset": 130, "logit_bias": -4.0}),
    "offset beyond the keys": ({"n_q": 30, "n_k": 64}, {"query_offset": 60}),
    "more queries than keys": ({"n_q": 100, "n_k": 30}, {}),
    "window": ({"n_q": 150}, {"window": 70, "logit_bias": -3.0}),
    "window of one": ({"n_q": 100}, {"window": 1}),
    "window, current": ({"n_q": 135}, {"window": 64, "attend_current": True}),
    "window beyond": ({"n_q": 80}, {"window": 1000}),
    "window, offset": ({"n_q": 40, "n_k": 200}, {"window": 90, "query_offset": 150}),
    "saturated": ({"n_q": 100, "std": 30.0}, {}),
    "all open": ({"n_q": 80}, {"logit_bias": 30.0}),
    "all shut": ({"n_q": 80}, {"logit_bias": -14.0}),
    "length one": ({"n_q": 1}, {}),
    "length one, current": ({"n_q": 1}, {"attend_current": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_against_definition(name, nan_scratch):
    shape, settings = CASES[name]
    if "logit_bias" in settings:
        heads = shape.get("heads", 2)
        bias = settings["logit_bias"] + 0.3 * torch.arange(heads, dtype=torch.float32)
        settings = {**settings, "logit_bias": bias}
    check(draw(**shape), settings)


@pytest.mark.parametrize("lengths", [(100, 37), (64, 0), (1, 100)])
@pytest.mark.parametrize("window", [None, 50])
def test_key_lengths(lengths, window, nan_scratch):
    lengths = torch.tensor(lengths, dtype=torch.int32)
    check(draw(batch=2, n_q=100), {"key_lengths": lengths, "window": window})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype, nan_scratch):
    """Open gates: without the low part of the output, gradients are off by percents."""
    q, k, v, generator = draw(n_q=100)
    inputs = (q.to(dtype), k.to(dtype), v.to(dtype), generator)
    part = check(inputs, {}, tolerance=5e-3, grad_factor=1)
    assert part.residual.dtype is dtype


def test_spent_stick_leaves_no_gradient():
    """Far keys of a spent stick get exactly nothing, not the rounding of what came before."""
    q, k, v, generator = (t.bfloat16() if torch.is_tensor(t) else t for t in draw(n_q=1, n_k=300))
    settings = {**DEFAULTS, "scale": 0.25, "query_offset": 300, "early_stop": None}
    part = stick_forward(q, k, v, need_grad=True, **settings)
    grad = torch.randn(part.output.shape, generator=generator).bfloat16()
    _, dk, dv, _ = stick_backward(grad, None, q, k, v, *reorder(part), **settings)
    assert dk[:, :, 192:].any()
    assert not dk[:, :, :128].any()
    assert dv[:, :, :128].abs().max() < 1e-6


@pytest.mark.parametrize("workspace_bytes", [1, 4_000])
def test_backward_in_chunks(workspace_bytes, nan_scratch):
    inputs = draw(batch=2, heads=2, kv_heads=1, n_q=100)
    bias = torch.full((2,), -4.0)
    check(inputs, {"logit_bias": bias}, workspace_bytes=workspace_bytes)
    check(inputs, {"logit_bias": bias, "window": 40}, workspace_bytes=workspace_bytes)


def test_same_bits_twice():
    q, k, v, generator = draw(n_q=100, heads=2, kv_heads=1)
    settings = {**DEFAULTS, "scale": 0.25, "early_stop": 1e-3}
    grad = torch.randn(v.shape[0], 2, 100, 16, generator=generator)
    runs = []
    for _ in range(2):
        part = stick_forward(q, k, v, need_grad=True, **settings)
        runs.append(
            (*part[:2], *stick_backward(grad, None, q, k, v, *reorder(part), **settings)[:3])
        )
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_without_gradient_of_rest(nan_scratch):
    check(draw(n_q=100), {}, through_rest=False)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("workspace_bytes", [1, 2**20])
def test_early_stop_gradients(window, workspace_bytes, monkeypatch, nan_scratch):
    """What is skipped weighs less than the bound, also in the gradients."""
    monkeypatch.setattr(forward, "_TILES_PER_CHECK", 1)
    inputs = draw(n_q=230)
    bias = torch.tensor([-1.0, -6.0])  # one head stops, the other walks on
    part = check(
        inputs, {"logit_bias": bias, "window": window}, early_stop=1e-7, through_rest=False,
        workspace_bytes=workspace_bytes,
    )  # fmt: skip
    if window is None:
        visited = part.visited[0]
        assert visited[0].max() < visited[1].max()
        assert visited[1].tolist() == [-(-min(t * 32 + 31, 229) // 64) for t in range(8)]


@pytest.mark.parametrize("bound", [0.3, 1e-2, 1e-4])
def test_early_stop_keeps_its_bound(bound, monkeypatch):
    monkeypatch.setattr(forward, "_TILES_PER_CHECK", 1)
    q, k, v, _ = draw(n_q=400, heads=1)
    settings = {**DEFAULTS, "scale": 0.25, "logit_bias": torch.tensor([-3.0])}
    part = stick_forward(q, k, v, early_stop=bound, need_grad=False, **settings)
    exact = stick_forward(q, k, v, early_stop=None, need_grad=False, **settings)
    assert part.residual is None
    error = (part.output - exact.output).norm(dim=-1)
    assert (error <= bound * v.norm(dim=-1).max() + 1e-6).all()
    assert (part.visited <= exact.visited).all()
    if bound == 0.3:
        assert (part.visited < exact.visited).any()


def test_early_stop_zero_walks_everything():
    q, k, v, _ = draw(n_q=300)
    settings = {**DEFAULTS, "scale": 1.0}
    part = stick_forward(q, k, v, early_stop=0.0, need_grad=False, **settings)
    exact = stick_forward(q, k, v, early_stop=None, need_grad=False, **settings)
    assert torch.equal(part.output, exact.output)
    assert torch.equal(part.visited, exact.visited)


LENGTHS = [
    ([70, 1, 0, 33], [70, 1, 0, 33]),
    ([40, 5, 0], [130, 5, 20]),
    ([10, 3], [0, 90]),
]


@pytest.mark.parametrize(("query_lengths", "key_lengths"), LENGTHS)
@pytest.mark.parametrize(("early_stop", "workspace_bytes"), [(None, 1), (1e-7, 2**20)])
def test_packed_equals_separate(
    query_lengths, key_lengths, early_stop, workspace_bytes, nan_scratch
):
    generator = torch.Generator().manual_seed(1)
    heads, kv_heads, d = 2, 1, 16
    q = torch.randn(sum(query_lengths), heads, d, generator=generator)
    k = torch.randn(sum(key_lengths), kv_heads, d, generator=generator)
    v = torch.randn(sum(key_lengths), kv_heads, d, generator=generator)
    grad = torch.randn(q.shape, generator=generator)
    grad_rest = torch.randn(q.shape[:2], generator=generator)
    bias = torch.tensor([0.0, -4.0])
    common = {"scale": 0.25, "logit_bias": bias, "attend_current": False, "window": None}
    cu_q = torch.tensor([0, *query_lengths]).cumsum(0).int()
    cu_k = torch.tensor([0, *key_lengths]).cumsum(0).int()
    packed = {
        **common, "query_offset": 0, "key_lengths": None, "early_stop": early_stop,
        "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k,
        "max_seqlen_q": max(query_lengths), "max_seqlen_k": max(key_lengths),
    }  # fmt: skip
    part = stick_forward(q, k, v, need_grad=True, **packed)
    grads = stick_backward(
        grad, grad_rest, q, k, v, *reorder(part), **packed, workspace_bytes=workspace_bytes
    )
    bias_sum = torch.zeros(heads)
    for i, (n_q, n_k) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        one = {**common, "query_offset": n_k - n_q, "key_lengths": None, "early_stop": early_stop}
        qi, ki, vi, gi = (t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys], grad[rows]))
        ri = grad_rest[rows].t()[None]
        alone = stick_forward(qi, ki, vi, need_grad=True, **one)
        assert torch.equal(part.output[rows], alone.output[0].transpose(0, 1))
        assert torch.equal(part.log_rest[rows], alone.log_rest[0].t())
        expected = stick_backward(gi, ri, qi, ki, vi, *reorder(alone), **one)
        assert torch.equal(grads[0][rows], expected[0][0].transpose(0, 1))
        for got, want in ((grads[1][keys], expected[1]), (grads[2][keys], expected[2])):
            torch.testing.assert_close(got, want[0].transpose(0, 1), rtol=1e-5, atol=1e-6)
        bias_sum += expected[3]
    torch.testing.assert_close(grads[3], bias_sum, rtol=1e-4, atol=1e-5)


DECODING = {
    "one query": ({"n_q": 1, "n_k": 300}, {}),
    "queries, current": ({"n_q": 3, "n_k": 300}, {"attend_current": True}),
    "window": ({"n_q": 2, "n_k": 300}, {"window": 100}),
    "few keys": ({"n_q": 1, "n_k": 5}, {}),
    "no key": ({"n_q": 1, "n_k": 1}, {}),
    "saturated": ({"n_q": 1, "n_k": 200, "std": 30.0}, {}),
    "more rows": ({"n_q": 5, "n_k": 200, "heads": 8}, {"logit_bias": torch.full((8,), -5.0)}),
    "lengths": (
        {"n_q": 1, "n_k": 300, "batch": 2},
        {"key_lengths": torch.tensor([130, 0], dtype=torch.int32)},
    ),
}


@pytest.mark.parametrize("name", DECODING)
@pytest.mark.parametrize("num_splits", [None, 1, 3])
def test_decode_against_definition(name, num_splits, nan_scratch):
    shape, settings = DECODING[name]
    q, k, v, _ = draw(**{"heads": 4, "kv_heads": 2, **shape})
    offset = k.shape[2] - q.shape[2]
    settings = {**DEFAULTS, "scale": 0.25, "query_offset": offset, **settings}
    output, log_rest, _ = stick_decode(q, k, v, early_stop=None, num_splits=num_splits, **settings)
    wide = {**settings}
    if wide["logit_bias"] is not None:
        wide["logit_bias"] = wide["logit_bias"].double()
    expected, expected_log = definition(q.double(), k.double(), v.double(), **wide)
    assert distance(output, expected) < 1e-5
    assert distance(log_rest, expected_log) < 1e-5


def test_decode_row_is_the_prefill_row():
    q, k, v, _ = draw(n_q=150, heads=4, kv_heads=2)
    settings = {**DEFAULTS, "scale": 0.25, "logit_bias": torch.full((4,), -3.0), "early_stop": None}
    whole = stick_forward(q, k, v, need_grad=False, **settings)
    settings["query_offset"] = 149
    output, log_rest, _ = stick_decode(q[:, :, -1:], k, v, **settings)
    torch.testing.assert_close(output, whole.output[:, :, -1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_rest, whole.log_rest[:, :, -1:], rtol=1e-5, atol=1e-6)


def test_decode_phases_stop_reading(monkeypatch, nan_scratch):
    monkeypatch.setattr(decode, "_PHASES", (128, 256))
    q, k, v, _ = draw(n_q=1, n_k=700, heads=4, kv_heads=2)
    settings = {**DEFAULTS, "scale": 0.25, "query_offset": 699}
    settings["logit_bias"] = torch.tensor([0.0, 0.0, 0.0, -7.0])  # the second group goes on
    output, _, visited = stick_decode(q, k, v, early_stop=1e-7, num_splits=2, **settings)
    exact, _, everything = stick_decode(q, k, v, early_stop=None, **settings)
    assert (output - exact).norm(dim=-1).max() < 1e-6 * v.norm(dim=-1).max()
    assert visited.flatten().tolist() == [2, 2, 11, 11]
    assert everything.flatten().tolist() == [11, 11, 11, 11]


def test_decode_refuses_many_rows():
    q, k, v, _ = draw(n_q=70, heads=2)
    with pytest.raises(ValueError, match="use stick_forward"):
        stick_decode(q, k, v, scale=1.0, early_stop=None, **DEFAULTS)


def test_split_plan_covers_every_key_once():
    for keys in (1, 63, 64, 2047, 2049, 20_000, 131_072):
        for phases in ((), (2048, 16384)):
            for splits in (None, 1, 7):
                plan = split_plan(keys, 8, 528, phases, splits)
                assert plan[0][0] == 0
                assert plan[-1][1] == keys
                for (_, end, *_), (start, *_) in itertools.pairwise(plan):
                    assert end == start
                for start, end, size, count in plan:
                    assert (count - 1) * size < end - start <= count * size


@pytest.mark.parametrize("cut", [1, 64, 100, 199])
def test_segments_merge_to_the_whole(cut):
    """Keys [cut, n) then keys [0, cut), each as a call of its own, joined by the merge."""
    q, k, v, _ = draw(n_q=1, n_k=200, heads=2)
    settings = {**DEFAULTS, "scale": 0.25, "logit_bias": torch.full((2,), -3.0), "early_stop": None}
    whole = stick_forward(q, k, v, need_grad=False, **{**settings, "query_offset": 200})
    parts = []
    for lo, hi in ((cut, 200), (0, cut)):
        part = stick_forward(
            q, k[:, :, lo:hi], v[:, :, lo:hi], need_grad=False,
            **{**settings, "query_offset": hi - lo},
        )  # fmt: skip
        parts.append((part.output, part.log_rest))
    output, log_rest = merge_stick_breaking(parts)
    torch.testing.assert_close(output, whole.output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_rest, whole.log_rest, rtol=1e-5, atol=1e-6)


def test_weights_and_rest_sum_to_one():
    q, k, _, _ = draw(n_q=150)
    ones = torch.ones(1, 1, 150, 16)
    part = stick_forward(q, k, ones, scale=0.25, early_stop=None, need_grad=False, **DEFAULTS)
    total = part.output[..., 0] + part.log_rest.exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=1e-6)


def test_padding_and_neighbours_do_not_matter():
    q, k, v, _ = draw(batch=2, n_q=90)
    settings = {**DEFAULTS, "scale": 0.25}
    both = stick_forward(q, k, v, early_stop=1e-6, need_grad=False, **settings)
    alone = stick_forward(q[1:], k[1:], v[1:], early_stop=1e-6, need_grad=False, **settings)
    assert torch.equal(both.output[1:], alone.output)
    k[:, :, 50:], v[:, :, 50:] = float("nan"), float("nan")
    settings["key_lengths"] = torch.tensor([50, 50], dtype=torch.int32)
    padded = stick_forward(q, k, v, early_stop=1e-6, need_grad=False, **settings)
    assert padded.output.isfinite().all()
    assert torch.equal(padded.output[:, :, :50], both.output[:, :, :50])


def test_empty():
    q, k, v, _ = draw(n_q=0)
    settings = {**DEFAULTS, "scale": 1.0, "early_stop": None}
    part = stick_forward(q, k, v, need_grad=True, **settings)
    assert part.output.shape == (1, 2, 0, 16)
    q, _, _, _ = draw(n_q=4)
    part = stick_forward(q, k, v, need_grad=True, **settings)
    assert not part.output.any()
    assert not part.log_rest.any()
    grads = stick_backward(part.output, None, q, k, v, *reorder(part), **settings)
    assert not grads[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_keep_the_strides_their_fakes_promise(dtype):
    """Compilers lay out memory by the fakes; inputs are transposed, as models give them."""
    from longspan.stick_breaking.ops import stick_breaking_bwd, stick_breaking_fwd

    q, k, v = (torch.randn(1, 20, 2, 16).to(dtype).transpose(1, 2) for _ in range(3))
    settings = (None, None, None, None, 20, 20, 0.25, 0, False, None, None, None)
    checks = ("test_faketensor",)
    results = stick_breaking_fwd(q, k, v, *settings, True, "triton")
    torch.library.opcheck(
        stick_breaking_fwd, (q, k, v, *settings, True, "triton"), test_utils=checks
    )
    grads = (torch.randn_like(results[0]).transpose(1, 2).contiguous().transpose(1, 2),
             torch.randn_like(results[1]))  # fmt: skip
    torch.library.opcheck(
        stick_breaking_bwd, (*grads, q, k, v, *results, *settings, "triton"), test_utils=checks
    )
