"""What the estimators promise: unbiased samples, error falling with the budget, honest numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hyper_cases import ALL, CHUNKS, SMALL, make_plan

from longspan import HyperConfig, hyper_attention, hyper_attention_with_lse
from longspan._dense import causal_visible
from longspan._validation import validate
from longspan.hyper import hardness
from longspan.hyper.fallback import error_of_heads
from longspan.hyper.geometry import recursion
from longspan.hyper.impl.reference import chunks_visible, near_visible
from longspan.hyper.index.lsh import draw_projections, gray_rank, sign_codes
from longspan.hyper.visited import visited_fraction
from longspan.mechanisms import get_mechanism
from longspan.testing import make_qkv, relative_error, softmax_oracle


@pytest.mark.parametrize("name", ["uniform", "stratified", "value_norm", "paper",
                                  "paper stratified", "paper value_norm"])  # fmt: skip
def test_sampled_row_sums_are_unbiased(name):
    """The mean of exp(lse) and of exp(lse) * output over seeds is that of exact attention."""
    q, k, v = make_qkv(1, 2, 100, 8, dtype=torch.float64)
    exact = softmax_oracle(q, k, v, is_causal=True)
    sums, products, seeds = 0.0, 0.0, 300
    planes = torch.randn(2, 8, ALL[name].num_projections) if ALL[name].index == "lsh" else None
    for seed in range(seeds):
        part = hyper_attention_with_lse(q, k, v, is_causal=True, config=ALL[name], seed=seed,
                                        projections=planes)  # fmt: skip
        share = torch.exp(part.lse - exact.lse)
        sums, products = sums + share, products + share.unsqueeze(-1) * part.output
    mean = (sums / seeds)[..., 48:]
    assert (mean.mean() - 1).abs() < 0.01
    assert (mean - 1).abs().max() < 0.15
    assert relative_error(products / seeds, exact.output) < 0.08


@pytest.mark.parametrize("index", ["kmeans", "pca", "lsh"])
def test_error_falls_with_the_budget(index):
    q, k, v = make_qkv(1, 2, 260, 16, dtype=torch.float64, kind="peaked")
    exact = softmax_oracle(q, k, v, is_causal=True).output
    errors = []
    for probes in (0, 2, 8, 24, 64):
        config = HyperConfig(index=index, **{**SMALL, "num_probes": probes})
        out = hyper_attention(q, k, v, is_causal=True, config=config)
        errors.append(relative_error(out, exact))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.2
    assert errors[-1] < 1e-12


def test_centring_keys_repairs_lsh():
    """A mean shared by all keys spoils sign hashes, and nothing else."""
    q, k, v = make_qkv(1, 4, 400, 4, dtype=torch.float64)
    q, k = 4.0 * q, k + 20.0
    exact = softmax_oracle(q, k, v, is_causal=True).output
    settings = {**SMALL, "residual": "none", "index": "lsh", "num_probes": 6}
    errors = [
        relative_error(
            hyper_attention(q, k, v, is_causal=True,
                            config=HyperConfig(center_keys=center, **settings)), exact
        )
        for center in (False, True)
    ]  # fmt: skip
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("kind", ["normal", "peaked"])
@pytest.mark.parametrize("name", list(CHUNKS))
def test_clusters_partition_every_chunk(name, kind):
    config = CHUNKS[name]
    q, k, v = make_qkv(2, 4, 150, 8, kv_heads=2, kind=kind)
    _, index, chosen = make_plan(q, k, v, config, is_causal=True)
    chunks, size = 150 // config.chunk_size, config.chunk_size
    assert index.order.shape == (2, 2, chunks * size)
    by_chunk = index.order.view(2, 2, chunks, size).sort(-1).values
    assert torch.equal(by_chunk.flatten(2), torch.arange(chunks * size).expand(2, 2, -1).int())
    free = (index.labels == -1).view(2, 2, chunks, size).sum(-1)
    sinks = torch.tensor([config.num_sinks] + [0] * (chunks - 1))
    assert torch.equal(free, (sinks + config.num_globals).expand(2, 2, -1))
    for b, h, g in [(0, 0, 0), (1, 1, 5), (0, 1, index.counts.shape[2] - 1)]:
        start, count = int(index.starts[b, h, g]), int(index.counts[b, h, g])
        members = index.order[b, h, start : start + count].long()
        assert (index.labels[b, h, members] == g).all()
        if count:
            torch.testing.assert_close(index.mean_key[b, h, g], k[b, h, members].mean(0))
    for row in chosen.flatten(0, 2)[::37].tolist():
        opened = [c for c in row if c >= 0]
        assert len(opened) == len(set(opened))


def test_visited_fraction_counts_what_is_visited():
    config = HyperConfig(index="pca", **{**SMALL, "num_sinks": 0})
    for is_causal in (True, False):
        q, k, v = make_qkv(1, 1, 170, 8)
        call, index, chosen = make_plan(q, k, v, config, is_causal=is_causal)
        keys = chunks_visible(call, config, index, chosen)[0].sum()
        far = causal_visible(call)[:, 0] & ~near_visible(call, config)
        columns = far.sum() // config.cluster_size
        want = float(keys + columns) / float(causal_visible(call).sum())
        got = visited_fraction(config, 170, 170, is_causal=is_causal)
        assert got == pytest.approx(want, rel=1e-12)
    assert visited_fraction(HyperConfig(), 512, 512, is_causal=True) == 1.0
    assert visited_fraction(HyperConfig(), 0, 0, is_causal=True) == 1.0
    assert visited_fraction(HyperConfig(), 1, 131072, is_causal=True, query_offset=131071) < 0.1
    assert get_mechanism("hyper").visited_fraction is visited_fraction
    paper = HyperConfig.paper()
    assert visited_fraction(paper, 2**17, 2**17, is_causal=True) == pytest.approx(
        (2**17 * 2049 / 2 + 6 * 2**16 * 512) / (2**17 * (2**17 + 1) / 2)
    )


@pytest.mark.parametrize(("n_q", "n_k", "offset"), [(100, 100, 0), (33, 90, 57), (50, 40, 20),
                                                    (60, 70, -9), (1, 64, 63)])  # fmt: skip
def test_nodes_and_leaves_cover_each_pair_once(n_q, n_k, offset):
    geometry = recursion(n_q, n_k, True, offset, 8, 16)
    count = torch.zeros(n_q, n_k, dtype=torch.int64)
    causal = torch.arange(n_k) <= torch.arange(n_q)[:, None] + offset
    for leaf in geometry.leaves:
        area = (slice(leaf.q_start, leaf.q_end), slice(leaf.k_start, leaf.k_end))
        count[area] += causal[area]
    for node in geometry.nodes:
        count[node.q_start : node.q_end, node.k_start : node.k_end] += 1
    assert torch.equal(count, causal.long())


def test_gray_order_changes_one_bit_at_a_time():
    codes = torch.arange(256)
    in_order = codes[gray_rank(codes, 8).argsort()]
    flips = in_order[1:] ^ in_order[:-1]
    assert ((flips & (flips - 1)) == 0).all()
    assert sorted(gray_rank(codes, 8).tolist()) == codes.tolist()


def test_near_vectors_collide_as_the_angle_says():
    planes = draw_projections(0, 1, 16, 1, "cpu").repeat(1, 1, 1)
    many = torch.cat([draw_projections(s, 1, 16, 16, "cpu") for s in range(200)], -1)
    x, y = torch.zeros(1, 1, 2, 16), torch.zeros(1)
    angle = 0.6
    x[0, 0, 0, 0] = 1.0
    x[0, 0, 1, 0], x[0, 0, 1, 1] = math.cos(angle), math.sin(angle)
    bits = (x @ many) > 0
    share = float((bits[0, 0, 0] == bits[0, 0, 1]).float().mean())
    assert abs(share - (1 - angle / math.pi)) < 0.03
    assert sign_codes(x, planes).shape == (1, 1, 2)
    assert y.numel() == 1


def test_hardness_measures_alpha_kappa_and_mass():
    zero = torch.zeros(1, 2, 200, 8)
    flat = hardness(zero, zero, zero, config=CHUNKS["pca"])
    torch.testing.assert_close(flat.alpha, torch.ones(1, 2), rtol=1e-4, atol=1e-4)
    q, k, v = make_qkv(1, 2, 200, 8, kind="peaked")
    sink = k.clone()
    sink[:, :, 0] = 40.0 * torch.nn.functional.normalize(q.mean(2), dim=-1)
    q = q + 5.0 * torch.nn.functional.normalize(q.mean(2, keepdim=True), dim=-1)
    config = CHUNKS["pca"]
    with_sink = hardness(q, sink, v, is_causal=True, config=config)
    assert (with_sink.alpha > 100).all()
    assert (with_sink.captured_mass > 0.99).all()
    full = hardness(q, k, v, is_causal=True, config=replace(config, num_probes=1000))
    torch.testing.assert_close(full.captured_mass, torch.ones(1, 2))
    torch.testing.assert_close(full.kappa, torch.ones(1, 2))
    assert (full.error < 1e-5).all()
    paper = hardness(q, k, v, is_causal=True, config=ALL["paper"])
    assert (paper.captured_mass < 0.9).all()
    assert (paper.kappa > 1).all()


@pytest.mark.parametrize("name", ["pca", "paper"])
def test_max_error_makes_bad_heads_exact(name):
    """Head 0 is flat, head 1 is peaked and far beyond the budget: only head 1 falls back."""
    q, k, v = make_qkv(1, 2, 200, 8, dtype=torch.float64, kind="peaked", requires_grad=True)
    with torch.no_grad():
        q[:, 0] = 0.0
        q[:, 1] *= 2.0
        v += 3.0
    config = replace(ALL[name], num_samples=64) if name == "paper" else ALL[name]
    plain = hyper_attention_with_lse(q, k, v, is_causal=True, config=config)
    exact = softmax_oracle(q, k, v, is_causal=True)
    call = validate("test", q, k, v, is_causal=True)
    errors = error_of_heads(call, plain.output.detach())[0].tolist()
    limit = 0.5 * (errors[0] + errors[1])
    assert errors[0] < limit < errors[1]
    kept = hyper_attention_with_lse(
        q, k, v, is_causal=True, config=replace(config, max_error=limit)
    )
    assert torch.equal(kept.output[:, 0], plain.output[:, 0])
    torch.testing.assert_close(kept.output[:, 1], exact.output[:, 1])
    torch.testing.assert_close(kept.lse[:, 1], exact.lse[:, 1])
    up = torch.randn_like(kept.output)
    got = torch.autograd.grad(kept.output[:, 1], (q, k, v), up[:, 1])
    want = torch.autograd.grad(exact.output[:, 1], (q, k, v), up[:, 1])
    torch.testing.assert_close([g[:, 1] for g in got], [w[:, 1] for w in want])
