"""Both merge algebras: exact, associative, with identities, differentiable."""

from __future__ import annotations

import itertools

import pytest
import torch

from longspan import AttentionOutput, ShapeError, merge, merge_stick_breaking
from longspan.testing import make_qkv, softmax_oracle


def softmax_parts(cuts, dtype=torch.float64, requires_grad=False):
    q, k, v = make_qkv(2, 2, 5, 8, n_k=12, dtype=dtype, requires_grad=requires_grad)
    edges = [0, *cuts, 12]
    parts = []
    for start, end in itertools.pairwise(edges):
        parts.append(softmax_oracle(q, k[:, :, start:end], v[:, :, start:end]))
    return (q, k, v), parts, softmax_oracle(q, k, v)


@pytest.mark.parametrize("cuts", [[], [6], [1, 2, 11], [0, 5], [3, 3, 3]])
def test_parts_join_to_the_whole_with_gradients(cuts):
    inputs, parts, whole = softmax_parts(cuts, requires_grad=True)
    joined = merge(parts)
    torch.testing.assert_close(joined.output, whole.output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(joined.lse, whole.lse, rtol=1e-12, atol=1e-12)
    up_o, up_l = torch.randn_like(whole.output), torch.randn_like(whole.lse)
    got = torch.autograd.grad((joined.output * up_o).sum() + (joined.lse * up_l).sum(), inputs)
    want = torch.autograd.grad((whole.output * up_o).sum() + (whole.lse * up_l).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_commutative_and_associative():
    _, parts, whole = softmax_parts([3, 7])
    a, b, c = parts
    for joined in (merge([c, a, b]), merge([merge([a, c]), b]), merge([a, merge([b, c])])):
        torch.testing.assert_close(joined.output, whole.output, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(joined.lse, whole.lse, rtol=1e-12, atol=1e-12)


def test_identity_and_empty_rows_have_finite_gradients():
    output = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    lse = torch.tensor([[[1.0, float("-inf"), -3.0]]], dtype=torch.float64, requires_grad=True)
    nothing = AttentionOutput(
        torch.zeros(1, 1, 3, 4).double(), torch.full((1, 1, 3), -torch.inf).double()
    )
    joined = merge([nothing, AttentionOutput(output, lse), nothing])
    torch.testing.assert_close(joined.output[0, 0, [0, 2]], output[0, 0, [0, 2]])
    assert (joined.output[0, 0, 1] == 0).all()
    torch.testing.assert_close(joined.lse, lse)
    finite = torch.where(torch.isfinite(joined.lse), joined.lse, 0.0)
    (joined.output.sum() + finite.sum()).backward()
    assert torch.isfinite(output.grad).all()
    assert torch.isfinite(lse.grad[0, 0, [0, 2]]).all()


def test_huge_scores_do_not_overflow():
    outputs = [torch.full((1, 1, 1, 2), value) for value in (1.0, 2.0)]
    lses = [
        torch.full((1, 1, 1), value)
        for value in (5000.0, 5000.0 + torch.log(torch.tensor(3.0)).item())
    ]
    joined = merge([AttentionOutput(o, s) for o, s in zip(outputs, lses, strict=True)])
    torch.testing.assert_close(joined.output, torch.full((1, 1, 1, 2), 1.75), rtol=1e-3, atol=0)


def test_low_precision_outputs_are_merged_in_float32():
    _, parts, whole = softmax_parts([3, 5, 7, 9])
    low = [AttentionOutput(o.bfloat16(), s.float()) for o, s in parts]
    joined = merge(low)
    assert joined.output.dtype is torch.bfloat16
    assert joined.lse.dtype is torch.float32
    assert (joined.output.double() - whole.output).abs().max() < 2 * 2**-8
    torch.testing.assert_close(joined.lse.double(), whole.lse, rtol=1e-6, atol=1e-6)


def stick_parts(cuts, requires_grad=False):
    """Stick-breaking of one query over 12 keys, nearest first, cut into runs."""
    torch.manual_seed(0)
    z = torch.randn(12, dtype=torch.float64, requires_grad=requires_grad)
    v = torch.randn(12, 4, dtype=torch.float64, requires_grad=requires_grad)

    def run(start, end):
        output, log_rest = (
            torch.zeros(1, 4, dtype=torch.float64),
            torch.zeros(1, dtype=torch.float64),
        )
        for i in range(start, end):
            output = output + torch.exp(log_rest)[:, None] * torch.sigmoid(z[i]) * v[i]
            log_rest = log_rest + torch.nn.functional.logsigmoid(-z[i])
        return output, log_rest

    edges = [0, *cuts, 12]
    return (z, v), [run(a, b) for a, b in itertools.pairwise(edges)], run(0, 12)


@pytest.mark.parametrize("cuts", [[], [6], [1, 2, 11], [0, 5], [4, 4]])
def test_stick_parts_join_to_the_whole_with_gradients(cuts):
    inputs, parts, whole = stick_parts(cuts, requires_grad=True)
    joined = merge_stick_breaking(parts)
    for a, b in zip(joined, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    up = torch.randn_like(whole[0])
    got = torch.autograd.grad((joined[0] * up).sum() + joined[1].sum(), inputs)
    want = torch.autograd.grad((whole[0] * up).sum() + whole[1].sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_stick_merge_is_associative_but_not_commutative():
    _, (a, b, c), whole = stick_parts([4, 8])
    for joined in (merge_stick_breaking([merge_stick_breaking([a, b]), c]),
                   merge_stick_breaking([a, merge_stick_breaking([b, c])])):  # fmt: skip
        torch.testing.assert_close(joined[0], whole[0])
    swapped = merge_stick_breaking([b, a, c])
    assert (swapped[0] - whole[0]).abs().max() > 1e-3


@pytest.mark.parametrize("function", [merge, merge_stick_breaking])
def test_wrong_parts_raise(function):
    with pytest.raises(ShapeError, match="parts is empty"):
        function([])
    good = AttentionOutput(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3))
    with pytest.raises(ShapeError, match="part 1 has shapes"):
        function([good, AttentionOutput(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2))])
    with pytest.raises(ShapeError, match="the log must be"):
        function([AttentionOutput(torch.zeros(1, 1, 3, 4), torch.zeros(1, 3))])
