"""Packed sequences equal separate calls, values and gradients."""

from __future__ import annotations

import pytest
import torch

from longspan import (
    StickBreakingConfig,
    UnsupportedError,
    stick_breaking_attention,
    stick_breaking_attention_varlen,
)
from longspan.testing import make_qkv


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed_inputs(lengths_q, lengths_k, *, heads=4, kv_heads=2, head_dim=16, dtype=torch.float32):
    q, _, _ = make_qkv(1, heads, sum(lengths_q), head_dim, dtype=dtype, seed=1)
    _, k, v = make_qkv(1, kv_heads, sum(lengths_k), head_dim, value_dim=8, dtype=dtype, seed=2)
    return tuple(t[0].transpose(0, 1).contiguous().requires_grad_() for t in (q, k, v))


def one_by_one(q, k, v, lengths_q, lengths_k, config, bias):
    parts = []
    for q_i, k_i, v_i in zip(
        q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True
    ):
        n_q, n_k = q_i.shape[0], k_i.shape[0]
        if n_q == 0:
            continue
        part = stick_breaking_attention(
            *(t.transpose(0, 1)[None] for t in (q_i, k_i, v_i)),
            enable_gqa=True,
            query_offset=n_k - n_q,
            logit_bias=bias,
            config=config,
            impl="reference",
        )
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize(
    "config",
    [
        StickBreakingConfig(),
        StickBreakingConfig(attend_current=True, window=5),
        StickBreakingConfig(remainder="value"),
    ],
)
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [
        ([7, 0, 1, 40, 3], [7, 0, 1, 40, 3]),
        ([1, 4, 0], [9, 4, 5]),
    ],
)
def test_packed_equals_separate(impl, config, lengths_q, lengths_k, gradients):
    inputs = packed_inputs(lengths_q, lengths_k)
    bias = torch.tensor([-1.0, 0.0, 0.5, -3.0], requires_grad=True)
    call = lambda: [  # noqa: E731
        stick_breaking_attention_varlen(
            *inputs,
            cumulative(lengths_q),
            cumulative(lengths_k),
            max(lengths_q),
            max(lengths_k),
            enable_gqa=True,
            logit_bias=bias,
            config=config,
            impl=impl,
        )
    ]
    if impl == "reference":
        with pytest.raises(UnsupportedError, match="packed calls run in eager"):
            call()
        return
    leaves = (*inputs, bias)
    wanted = gradients(lambda: [one_by_one(*inputs, lengths_q, lengths_k, config, bias)], leaves)
    for got, expected in zip(gradients(call, leaves), wanted, strict=True):
        torch.testing.assert_close(got, expected, atol=3e-5, rtol=3e-5)


def test_published_packed_shape():
    # the authors' packed tests: head dim 128, ragged lengths
    lengths = [64, 1, 129, 300]
    inputs = packed_inputs(lengths, lengths, heads=2, kv_heads=2, head_dim=128, dtype=torch.float64)
    cu = cumulative(lengths)
    config = StickBreakingConfig()
    got = stick_breaking_attention_varlen(*inputs, cu, cu, 300, 300, config=config)
    wanted = one_by_one(*inputs, lengths, lengths, config, None)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


def test_early_stop_is_per_sequence():
    config = StickBreakingConfig(early_stop=1e-2)
    lengths = [700, 600]
    inputs = packed_inputs(lengths, lengths, dtype=torch.float64)
    cu = cumulative(lengths)
    together = stick_breaking_attention_varlen(
        *inputs, cu, cu, 700, 700, enable_gqa=True, config=config
    )
    for part, tensors in zip(
        together.split(lengths),
        zip(*(t.split(lengths) for t in inputs), strict=True),
        strict=True,
    ):
        alone = stick_breaking_attention(
            *(t.transpose(0, 1)[None] for t in tensors), enable_gqa=True, config=config
        )
        assert torch.equal(part, alone[0].transpose(0, 1))


def test_more_queries_than_keys_and_value_remainder():
    # the first query of the sequence has no key of its own: it gets nothing
    inputs = packed_inputs([3], [2], heads=2, kv_heads=2)
    config = StickBreakingConfig(remainder="value")
    output = stick_breaking_attention_varlen(
        *inputs, cumulative([3]), cumulative([2]), 3, 2, config=config
    )
    assert bool((output[0] == 0).all())
    torch.testing.assert_close(output[1], inputs[2][0].detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_opcheck_packed(dtype):
    from longspan.stick_breaking.ops import stick_breaking_fwd

    lengths = [3, 0, 6]
    cu = cumulative(lengths)
    inputs = packed_inputs(lengths, lengths, dtype=dtype)
    rest = (None, None, cu, cu, 6, 6, 0.25, 0, False, None, None, None, True, "eager")
    torch.library.opcheck(stick_breaking_fwd, (*inputs, *rest))
