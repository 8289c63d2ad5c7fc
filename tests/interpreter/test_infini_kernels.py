"""Kernels of Infini-attention in the interpreter, against the loop in float64."""

from __future__ import annotations

import pytest
import torch

from infini_cases import CASES, assert_matches
from longspan import InfiniConfig, InfiniState, infini_attention, infini_attention_chunk
from longspan._triton.interpreter import repair_interpreter
from longspan.infini.ops import infini_mix, infini_states

repair_interpreter()  # for tests that call a kernel without its operator


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_values_and_gradients(case, nan_scratch):
    assert_matches(case, "triton", torch.float32, 2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("case", CASES[1:4], ids=lambda c: c.id)
def test_half_precision(case, dtype, tolerance, nan_scratch):
    assert_matches(case, "triton", dtype, tolerance)


def test_padding_never_reaches_a_result():
    q, k, v = (torch.randn(2, 2, 20, 16) for _ in range(3))
    k[1, :, 11:], v[1, :, 11:] = float("nan"), float("inf")
    k, v = k.requires_grad_(), v.requires_grad_()
    lengths = torch.tensor([20, 11], dtype=torch.int32)
    result = infini_attention(
        q, k, v, config=InfiniConfig(segment_length=4), key_lengths=lengths, impl="triton"
    )
    assert torch.isfinite(result.output).all()
    assert torch.isfinite(result.final_state.memory).all()
    result.output.sum().backward()
    assert torch.isfinite(k.grad).all()
    assert (v.grad[1, :, 11:] == 0).all()


def test_chunks_equal_the_whole():
    q, k, v = (torch.randn(1, 2, 21, 16) for _ in range(3))
    config = InfiniConfig(segment_length=6)
    whole = infini_attention(q, k, v, config=config, impl="triton")
    state, pieces, start = None, [], 0
    for size in (5, 1, 13, 2):
        part = [t[:, :, start : start + size] for t in (q, k, v)]
        piece, state = infini_attention_chunk(*part, state, config=config, impl="triton")
        pieces.append(piece)
        start += size
    torch.testing.assert_close(torch.cat(pieces, 2), whole.output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.memory, whole.final_state.memory, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("local", ["segment", "sliding"])
@pytest.mark.parametrize("first", ["local", "gated"])
def test_decoding(dtype, local, first, nan_scratch):
    """Tokens one or two at a time, through folds, against the whole in float64."""
    config = InfiniConfig(segment_length=5, local=local, first_segment=first)
    wide = [torch.randn(2, h, 13, 8).to(dtype).double() for h in (4, 2, 2, 4, 2)]
    gate = torch.randn(4)

    def call(t, state=None, impl="triton"):
        return infini_attention(
            *t[:3], memory_query=t[3], memory_key=t[4], gate=gate, enable_gqa=True, config=config,
            initial_state=state, impl=impl,
        )  # fmt: skip

    want = call(wide, impl="reference")
    state, pieces = None, []
    with torch.no_grad():
        for start, stop in ((0, 1), (1, 3), (3, 4), (4, 5), (5, 7), (7, 9), (9, 10), (10, 13)):
            result = call([t[:, :, start:stop].to(dtype) for t in wide], state)
            state = result.final_state
            pieces.append(result.output)
    limit = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(torch.cat(pieces, 2).double(), want.output, rtol=limit, atol=limit)
    torch.testing.assert_close(state.memory.double(), want.final_state.memory, rtol=1e-5, atol=1e-5)


def test_decoding_splits_a_long_segment(nan_scratch):
    config = InfiniConfig(segment_length=700)
    q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 600, 8), torch.randn(1, 1, 600, 8)
    both = [
        infini_attention(q, k, v, enable_gqa=True, query_offset=at, config=config, impl=impl).output
        for impl in ("triton", "reference")
        for at in (599, 300, 3)
    ]
    for a, b in zip(both[:3], both[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_same_bits_again():
    q, k, v = (torch.randn(1, 4, 40, 16, requires_grad=True) for _ in range(3))
    config = InfiniConfig(segment_length=8)
    runs = []
    for _ in range(2):
        out = infini_attention(q, k, v, config=config, impl="triton").output
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_parts_of_a_segment_add_up(nan_scratch):
    """The memory's gradient, in one piece and in parts, of which the last may be empty."""
    from longspan.infini.impl.triton.mix import Layout
    from longspan.infini.impl.triton.mix_bwd import mix_backward

    layout = Layout(40, 0, 0, 70, True)
    query, local, grad = (torch.randn(1, 4, 70, 16) for _ in range(3))
    memory, total = torch.randn(1, 2, 2, 16, 16), torch.rand(1, 2, 2, 16)
    rest = (torch.randn(4), torch.tensor([1]), None, layout)
    whole = mix_backward(grad, query, local, memory, total, *rest, parts=1)
    for parts in (2, 4):
        pieces = mix_backward(grad, query, local, memory, total, *rest, parts=parts)
        for a, b in zip(pieces, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_sums_of_rows_that_are_loaded_in_turns(nan_scratch):
    """One warp loads 16 of 64 rows at once: the sums over them are in four pieces."""
    from longspan._triton.launch import KernelConfig
    from longspan.infini.impl.triton.delta import segment_turns
    from longspan.infini.impl.triton.sums import segment_sums

    key, value = torch.randn(1, 2, 120, 16), torch.randn(1, 2, 120, 8)
    sizes = KernelConfig(64, 64, 1, 1)
    phi = torch.where(key > 0, key + 1, key.exp()).unflatten(2, (2, 60))
    memory, total = segment_sums(key, value, None, 60, 2, sizes)
    want = phi.transpose(-1, -2) @ value.unflatten(2, (2, 60))
    torch.testing.assert_close(memory[:, :, 1:], want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(total[:, :, 1:], phi.sum(3), rtol=1e-5, atol=1e-4)
    before, weights = torch.rand(1, 2, 3, 16), torch.randn(1, 2, 2, 16, 16)
    weights = weights + weights.transpose(-1, -2)
    got = segment_turns(key, before, weights, None, 60, sizes)
    den = (phi @ before[:, :, :2].unsqueeze(-1)).squeeze(-1)
    dden = 0.5 * ((phi @ weights) * phi).sum(-1) / den.square()
    want = (dden.unsqueeze(-1) * phi).sum(3)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_maps_take_the_normaliser_to_what_it_grows_by(nan_scratch):
    """P_s z_{s-1} = sum of sigma(k) over segment s; padding and missing rows add nothing."""
    from longspan.infini.impl.triton.delta import segment_maps

    key, before = torch.randn(2, 2, 34, 16) - 1.0, torch.rand(2, 2, 4, 16) + 0.1
    lengths = torch.tensor([34, 19], dtype=torch.int32)
    maps = segment_maps(key, before, lengths, 12, 3)
    phi = torch.where(key > 0, key + 1, key.exp())
    phi = torch.where(torch.arange(34) < lengths[:, None], 1.0, 0.0)[:, None, :, None] * phi
    grows = torch.nn.functional.pad(phi, (0, 0, 0, 2)).unflatten(2, (3, 12)).sum(3)
    got = (maps @ before[:, :, :3].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(got, grows, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(maps, maps.transpose(-1, -2), rtol=1e-4, atol=1e-4)


def test_gradients_are_added_to_those_of_others(nan_scratch):
    """Keys and values past the last segment, and padded ones, get the others' alone."""
    from longspan.infini.impl.triton.sums import segment_sums_backward

    key, value = torch.randn(2, 1, 23, 8), torch.randn(2, 1, 23, 16)
    memory, total = torch.randn(2, 1, 3, 8, 16), torch.randn(2, 1, 3, 8)
    lengths = torch.tensor([23, 12], dtype=torch.int32)
    more = torch.randn(2, 23, 1, 8).transpose(1, 2), torch.randn(2, 1, 23, 16)
    for given in ((None, None), (more[0], None), (None, more[1]), more):
        alone = segment_sums_backward(memory, total, key, value, lengths, 10, 2)
        got = segment_sums_backward(
            memory, total, key, value, lengths, 10, 2, more_key=given[0], more_value=given[1]
        )
        for a, b, other in zip(got, alone, given, strict=True):
            torch.testing.assert_close(a, b if other is None else b + other)


def test_operators_pass_opcheck():
    key, value = torch.randn(2, 1, 12, 8, requires_grad=True), torch.randn(2, 1, 12, 8)
    memory, z = torch.randn(2, 1, 8, 8, requires_grad=True), torch.rand(2, 1, 8)
    lengths = torch.tensor([12, 7], dtype=torch.int32)
    torch.library.opcheck(infini_states, (key, value, memory, z, lengths, 5, 2))
    strided = value.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    torch.library.opcheck(infini_states, (key.detach(), strided, memory, z, None, 4, 3))
    query, local = torch.randn(2, 2, 9, 8, requires_grad=True), torch.randn(2, 2, 9, 8)
    states, totals = torch.randn(2, 1, 3, 8, 8, requires_grad=True), torch.rand(2, 1, 3, 8)
    rest = (torch.randn(2), torch.tensor([0, 3]), lengths, 5, 0, 1, 12, True)
    torch.library.opcheck(infini_mix, (query, local, states, totals, *rest))


def test_compiles_as_one_graph():
    q, k, v = (torch.randn(1, 2, 24, 8) for _ in range(3))
    gate = torch.randn(2, requires_grad=True)
    config = InfiniConfig(segment_length=8)

    def call(q, k, v, gate):
        return infini_attention(q, k, v, gate=gate, config=config, impl="triton").output

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, gate)
    want = call(q, k, v, gate)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    grad, gate.grad = gate.grad, None
    want.sum().backward()
    torch.testing.assert_close(grad, gate.grad)


def test_reads_what_a_state_holds():
    """A memory of one value is read as that value, whatever the query."""
    config = InfiniConfig(segment_length=8)
    phi = torch.rand(1, 2, 16) + 0.1
    value = torch.randn(1, 2, 1, 8)
    state = InfiniState.empty(config, 1, 2, 16, 8)._replace(
        memory=phi[..., None] @ value, normaliser=phi, written=torch.tensor([1]), seen=8
    )
    q, k, v = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 8)
    out = infini_attention(
        q, k, v, gate=torch.full((2,), 30.0), initial_state=state, config=config, impl="triton"
    ).output
    torch.testing.assert_close(out, value.expand_as(out), rtol=1e-5, atol=1e-5)
