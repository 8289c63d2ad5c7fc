"""Sub-quadratic torch against the dense definition, values and gradients, through lse too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hyper_cases import ALL, CHUNKS, make_plan

from longspan import HyperConfig, hyper_attention, hyper_attention_varlen, hyper_attention_with_lse
from longspan.hyper.impl.eager import eager_forward
from longspan.testing import make_qkv, softmax_oracle


def run(q, k, v, impl, config, **common):
    part = hyper_attention_with_lse(
        q, k, v, enable_gqa=True, config=config, impl=impl, seed=3, **common
    )
    return part.output, part.lse


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("n_q", "n_k", "offset"), [(150, 150, 0), (90, 150, 60), (60, 110, 130), (140, 100, -5)]
)
def test_equals_the_definition_with_gradients(name, is_causal, n_q, n_k, offset):
    config = ALL[name]
    inputs = make_qkv(2, 4, n_q, 8, n_k=n_k, kv_heads=2, value_dim=6, dtype=torch.float64,
                      requires_grad=True, kind="peaked")  # fmt: skip
    grads, results = [], []
    up, up_lse = torch.randn(2, 4, n_q, 6).double(), torch.randn(2, 4, n_q).double()
    for impl in ("reference", "eager"):
        output, lse = run(*inputs, impl, config, is_causal=is_causal, query_offset=offset)
        finite = lse.isfinite()
        loss = (output * up).sum() + (torch.where(finite, lse, 0.0) * up_lse).sum()
        grads.append(torch.autograd.grad(loss, inputs))
        results.append((output, finite, torch.where(finite, lse, 0.0)))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("is_causal", [True, False])
def test_padding_equals_the_shorter_sequence(name, is_causal):
    config = ALL[name]
    q, k, v = make_qkv(3, 2, 120, 8, kind="peaked")
    lengths = torch.tensor([120, 75, 0], dtype=torch.int32)
    padded = {"key_lengths": lengths, "is_causal": is_causal}
    before = run(q, k, v, "eager", config, **padded)
    torch.testing.assert_close(before, run(q, k, v, "reference", config, **padded))
    rows = 75 if is_causal else 120  # the queries beyond are padding of a causal batch
    alone = run(q[1:2, :, :rows], k[1:2, :, :75], v[1:2, :, :75], "eager", config,
                is_causal=is_causal)  # fmt: skip
    torch.testing.assert_close(before[0][1:2, :, :rows], alone[0])
    assert (before[0][2] == 0).all()
    k[1, :, 75:], v[1, :, 75:] = float("nan"), float("inf")
    k[2], v[2] = float("nan"), float("inf")
    after = run(q, k, v, "eager", config, **padded)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


@pytest.mark.parametrize("name", ["pca", "value_norm", "paper"])
def test_gradients_with_padding(name):
    inputs = make_qkv(2, 4, 90, 8, kv_heads=2, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([70, 90], dtype=torch.int32)
    grads = []
    for impl in ("reference", "eager"):
        output, lse = run(*inputs, impl, ALL[name], is_causal=True, key_lengths=lengths)
        grads.append(torch.autograd.grad(output.square().sum() + lse.sin().sum(), inputs))
    torch.testing.assert_close(grads[1], grads[0])
    assert (grads[1][1][0, :, 70:] == 0).all()


@pytest.mark.parametrize("name", CHUNKS)
def test_any_plan_can_be_attended_with(name):
    """The choice is an input: any other one gives what the definition gives for it."""
    config = CHUNKS[name]
    q, k, v = make_qkv(2, 4, 140, 8, kv_heads=2, dtype=torch.float64)
    call, index, chosen = make_plan(q, k, v, config, is_causal=True)
    made = eager_forward(call, config, index)
    assert torch.equal(made[2].sort(-1).values, chosen.sort(-1).values)
    fewer = chosen.clone()
    fewer[..., ::2] = -1
    from longspan.hyper.impl.reference import chunks_reference

    want = chunks_reference(call, config, index, fewer)
    got = eager_forward(call, config, index, fewer)
    torch.testing.assert_close(got[:2], tuple(want))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_queries_count_the_visible_keys(name, dtype):
    """lse = log(visible keys): nothing counts twice, nothing is left out."""
    config = ALL[name]
    if config.residual == "none":
        pytest.skip("drops keys on purpose")
    for length in (1, 31, 97, 200):
        q, k, v = make_qkv(2, 4, length, 8, kv_heads=2, dtype=dtype, kind="zero")
        for is_causal in (True, False):
            lse = run(q, k, v, "eager", config, is_causal=is_causal)[1]
            count = torch.arange(1, length + 1) if is_causal else torch.full((length,), length)
            if config.residual == "centroid":
                want = count.log().expand_as(lse)
                torch.testing.assert_close(lse, want, rtol=1e-5, atol=1e-5)
                continue
            # Sampled: the weights are unbiased, see test_hyper_statistics; here no gross error.
            share = lse.exp() / count
            assert abs(float(share.mean()) - 1) < 0.2
            if is_causal:  # near keys and leaves
                torch.testing.assert_close(share[..., :16], torch.ones_like(share[..., :16]))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_full_budget_is_exact_attention_with_gradients(name, is_causal):
    small = ALL[name]
    settings = {field: getattr(small, field) for field in small.__slots__}
    if small.structure == "chunks":
        settings["num_probes"] = 1000
    else:
        settings["block_size"] = 1000
    inputs = make_qkv(2, 4, 130, 8, kv_heads=2, dtype=torch.float64, requires_grad=True)
    got = run(*inputs, "eager", HyperConfig(**settings), is_causal=is_causal)
    k, v = (t.repeat_interleave(2, 1) for t in inputs[1:])
    want = torch.nn.functional.scaled_dot_product_attention(inputs[0], k, v, is_causal=is_causal)
    torch.testing.assert_close(got[0], want)
    oracle = softmax_oracle(*inputs, is_causal=is_causal)
    torch.testing.assert_close(got[1], oracle.lse)
    up = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got[0], inputs, up), torch.autograd.grad(want, inputs, up)
    )


@pytest.mark.parametrize("name", CHUNKS)
def test_decoding_equals_prefill_at_every_position(name):
    config = CHUNKS[name]
    q, k, v = make_qkv(1, 4, 140, 8, kv_heads=2, dtype=torch.float64, kind="peaked")
    whole = run(q, k, v, "eager", config, is_causal=True)[0]
    for i in (0, 7, 31, 39, 40, 71, 72, 103, 104, 139):
        row = run(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], "eager", config,
                  is_causal=True, query_offset=i)[0]  # fmt: skip
        torch.testing.assert_close(row, whole[:, :, i : i + 1])


@pytest.mark.parametrize("name", CHUNKS)
def test_strictly_causal(name):
    """Not even the index sees the future."""
    config = CHUNKS[name]
    q, k, v = make_qkv(1, 2, 150, 8, kind="peaked")
    before = run(q, k, v, "eager", config, is_causal=True)[0]
    for t in (149, 100, 96, 64, 41):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t:] = 3.0 * torch.randn_like(x[:, :, t:])
        after = run(*changed, "eager", config, is_causal=True)[0]
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert not torch.equal(after[:, :, t:], before[:, :, t:])


@pytest.mark.parametrize("name", ["pca", "uniform", "paper", "paper centroid"])
def test_grouped_heads_equal_expanded_heads(name):
    q, k, v = make_qkv(2, 6, 130, 8, kv_heads=2, dtype=torch.float64)
    config = ALL[name]
    planes = torch.randn(2, 8, config.num_projections) if config.index == "lsh" else None
    grouped = hyper_attention(q, k, v, is_causal=True, enable_gqa=True, config=config,
                              projections=planes)  # fmt: skip
    if config.residual == "uniform":  # samples are drawn for each key/value head
        pairs = [(0, 0), (5, 1)]
    else:
        pairs = [(head, head // 3) for head in range(6)]
    for head, kv_head in pairs[: 1 if config.residual == "uniform" else 6]:
        one = slice(head, head + 1), slice(kv_head, kv_head + 1)
        alone = hyper_attention(
            q[:, one[0]], k[:, one[1]], v[:, one[1]], is_causal=True, config=config,
            projections=None if planes is None else planes[one[1]],
        )  # fmt: skip
        torch.testing.assert_close(grouped[:, one[0]], alone)


@pytest.mark.parametrize("name", ["kmeans", "stratified", "paper"])
def test_packed_equals_separate_with_far_keys(name):
    lengths = [0, 140, 1, 95]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    q, k, v = (torch.randn(sum(lengths), 2, 8) for _ in range(3))
    packed = hyper_attention_varlen(q, k, v, cu, cu, 140, 140, is_causal=True, config=ALL[name])
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        part = [t[start:end].transpose(0, 1)[None] for t in (q, k, v)]
        alone = hyper_attention(*part, is_causal=True, config=ALL[name])
        torch.testing.assert_close(packed[start:end], alone[0].transpose(0, 1))


@pytest.mark.parametrize("name", ["pca", "value_norm", "paper"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_within_budget(name, dtype):
    """Rounding of the inputs aside (the plan is theirs), errors stay at the output's rounding."""
    q, k, v = make_qkv(1, 4, 150, 16, kv_heads=2, dtype=dtype)
    got = run(q, k, v, "eager", ALL[name], is_causal=True)
    want = run(q.float(), k.float(), v.float(), "eager", ALL[name], is_causal=True)
    assert got[0].dtype is dtype
    assert got[1].dtype is torch.float32
    torch.testing.assert_close(got[0].float(), want[0], rtol=2e-2, atol=torch.finfo(dtype).eps)
    torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("name", ["kmeans", "uniform", "paper"])
def test_bits_repeat_forward_and_backward(name):
    inputs = make_qkv(2, 4, 150, 8, kv_heads=2, requires_grad=True)
    config = ALL[name]

    def once(seed):
        out = hyper_attention(*inputs, is_causal=True, enable_gqa=True, config=config, seed=seed)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    first = once(5)
    assert all(torch.equal(a, b) for a, b in zip(first, once(5), strict=True))
    if name != "kmeans":
        assert not torch.equal(first[0], once(6)[0])


def test_non_contiguous_views():
    q, k, v = (torch.randn(1, 150, 2, 24)[..., ::3].transpose(1, 2) for _ in range(3))
    config = CHUNKS["pca"]
    got = hyper_attention(q, k, v, is_causal=True, config=config)
    want = hyper_attention(*(t.contiguous() for t in (q, k, v)), is_causal=True, config=config)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_transposed_heads(name):
    """As a model gives them, one sequence at a time: (1, N, H, D) with heads moved forward."""
    q, k, v = (t.requires_grad_() for t in make_qkv(1, 2, 70, 8, dtype=torch.float64))
    upstream = torch.randn_like(v)
    config = ALL[name]
    wanted = torch.autograd.grad(
        hyper_attention(q, k, v, is_causal=True, config=config), (q, k, v), upstream
    )
    moved = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    found = torch.autograd.grad(
        hyper_attention(*moved, is_causal=True, config=config), (q, k, v), upstream
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["kmeans", "paper"])
def test_memory_is_linear(name):
    """No tensor of the size of the scores is made, forward or backward."""
    length = 2048
    config = ALL[name]
    inputs = make_qkv(1, 1, length, 8, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // 4)
            return result

    from longspan.hyper import ops

    settings = ops.settings_of(config)
    with torch.no_grad(), Watch():
        planes = torch.randn(1, 8, config.num_projections) if config.index == "lsh" else None
        index = ops.hyper_index._init_fn(*inputs, None, planes, True, 0, *settings, 0, "eager")
        output, lse, chosen = ops.hyper_fwd._init_fn(
            *inputs, None, planes, index, None, True, 1.0, 0, *settings, 0, "eager"
        )
        ops.hyper_bwd._init_fn(torch.ones_like(output), None, output, lse, chosen, *inputs, None,
                               planes, index, True, 1.0, 0, *settings, 0, "eager")  # fmt: skip
    assert largest < length * length // 4


def test_choice_does_not_see_where_rotary_positions_begin():
    """Shifting all positions turns queries and keys alike: scores, and so choices, stay."""
    q, k, v = make_qkv(1, 2, 300, 16, dtype=torch.float64)
    k[:, :, ::7] *= 3.0  # clusters of unequal spread

    def turned(x, shift):
        angles = (torch.arange(300) + shift).double()[:, None] * 10.0 ** -torch.arange(8).double()
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    config = HyperConfig(window=8, chunk_size=32, cluster_size=4, num_probes=3)
    assert config.probe_spread > 0
    _, index, chosen = make_plan(turned(q, 0), turned(k, 0), v, config, is_causal=True)
    _, moved, again = make_plan(turned(q, 1234), turned(k, 1234), v, config, is_causal=True)
    assert torch.equal(index.labels, moved.labels)
    assert torch.equal(chosen, again)
    plain = make_plan(turned(q, 0), turned(k, 0), v, replace(config, probe_spread=0.0),
                      is_causal=True)[2]  # fmt: skip
    assert not torch.equal(chosen, plain)
