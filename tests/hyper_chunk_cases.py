"""Cases of the default mode's kernels, shared by the interpreter's and the GPU's tests."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from longspan import HyperConfig
from longspan._validation import Call, validate
from longspan.hyper.geometry import far_before
from longspan.hyper.impl.common import choice_scores, chunk_index
from longspan.hyper.impl.eager import eager_backward, eager_forward
from longspan.hyper.impl.reference import chunks_reference
from longspan.hyper.impl.triton.chunks_backward import triton_chunks_backward
from longspan.hyper.impl.triton.chunks_forward import triton_chunks_forward
from longspan.hyper.impl.triton.chunks_index import triton_chunk_index
from longspan.hyper.index.chunks import build_chunk_index, shared_in_pairs
from longspan.hyper.index.lsh import draw_projections
from longspan.hyper.plan import ChunkIndex
from longspan.testing import make_qkv

TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}
SMALL = {"window": 20, "num_sinks": 3, "chunk_size": 32, "cluster_size": 8, "num_probes": 3}
LARGE = {"window": 100, "num_sinks": 4, "chunk_size": 256, "cluster_size": 16, "num_probes": 12}


@dataclass(frozen=True)
class ChunkCase:
    """One causal call; `settings` over those of `base`."""

    n_q: int
    n_k: int
    heads: int = 2
    kv_heads: int = 1
    batch: int = 1
    dim: int = 16
    value_dim: int = 16
    offset: int | None = None
    transposed: bool = False
    spread: float = 1.0
    scale: float | None = None
    base: str = "small"
    settings: dict[str, object] = field(default_factory=dict)

    @property
    def id(self) -> str:
        extra = "-".join(f"{k}={v}" for k, v in self.settings.items())
        return f"{self.n_q}x{self.n_k}-h{self.heads}-d{self.dim}-{self.value_dim}-{extra}"

    @property
    def config(self) -> HyperConfig:
        start = SMALL if self.base == "small" else LARGE
        return HyperConfig(**{**start, **self.settings})  # type: ignore[arg-type]


CASES = [
    ChunkCase(75, 75),
    ChunkCase(70, 110, offset=40, value_dim=5, dim=20, transposed=True),
    ChunkCase(69, 69, heads=3, kv_heads=3, settings={"num_probes": 20}),
    ChunkCase(66, 66, settings={"num_probes": 0}),
    ChunkCase(66, 66, batch=2, settings={"residual": "none", "num_sinks": 0}),
    ChunkCase(80, 80, settings={"index": "kmeans"}, spread=3.0),
    ChunkCase(80, 80, settings={"index": "lsh", "num_projections": 4, "window": 1}),
    ChunkCase(12, 64, offset=70),
    ChunkCase(20, 20),
    ChunkCase(64, 64, settings={"num_probes": 2, "chunk_size": 16, "cluster_size": 16}),
    ChunkCase(64, 64, scale=-0.4),
    ChunkCase(90, 90, settings={"probe_spread": 0.0}),
]
LARGE_CASES = [
    ChunkCase(1999, 1999, heads=4, kv_heads=2, dim=64, value_dim=64, base="large"),
    ChunkCase(1100, 1777, offset=677, heads=2, kv_heads=2, dim=128, value_dim=128, base="large",
              transposed=True, batch=2),
    ChunkCase(1300, 1300, dim=80, value_dim=96, base="large", spread=3.0),
    ChunkCase(1500, 1500, dim=20, value_dim=5, base="large", transposed=True),
    ChunkCase(1100, 1100, dim=192, value_dim=256, base="large"),
    ChunkCase(1536, 1536, dim=64, value_dim=64, base="large", settings={"index": "kmeans"}),
    ChunkCase(1280, 1280, dim=64, value_dim=128, base="large", settings={"residual": "none"}),
    ChunkCase(2048, 2048, dim=64, value_dim=64, base="large",
              settings={"window": 256, "chunk_size": 512, "num_probes": 16}),
]  # fmt: skip


def make_case(case: ChunkCase, dtype: torch.dtype, device: str = "cpu") -> tuple[Call, ChunkIndex]:
    """The call and the index of its keys."""
    q, k, v = make_qkv(case.batch, case.heads, case.n_q, case.dim, n_k=case.n_k,
                       kv_heads=case.kv_heads, value_dim=case.value_dim, dtype=dtype,
                       device=device, transposed=case.transposed)  # fmt: skip
    if case.spread != 1.0:
        k = k * case.spread
    config = case.config
    offset = case.n_k - case.n_q if case.offset is None else case.offset
    call = validate("test", q, k, v, is_causal=True, enable_gqa=True, scale=case.scale,
                    query_offset=offset)  # fmt: skip
    planes = None
    if config.index == "lsh":
        planes = draw_projections(3, case.kv_heads, case.dim, config.num_projections, q.device)
    return call, chunk_index(call, config, planes, 0)


def widened(call: Call, index: ChunkIndex) -> tuple[Call, ChunkIndex]:
    """The same in float64."""
    wide = call._replace(query=call.query.double(), key=call.key.double(),
                         value=call.value.double())  # fmt: skip
    return wide, index._replace(mean_key=index.mean_key.double(), variance=index.variance.double())


def assert_choice_is_best(case: ChunkCase, call: Call, index: ChunkIndex, chosen: torch.Tensor,
                          tolerance: float) -> None:  # fmt: skip
    """Distinct far clusters, as many as there are, and none left out that scores clearly more."""
    wide, index = widened(call, index)
    config, group = case.config, case.heads // case.kv_heads
    means, variances = (t.repeat_interleave(group, 1).flatten(0, 1)
                        for t in (index.mean_key, index.variance))  # fmt: skip
    scores = choice_scores((call.scale * wide.query).flatten(0, 1), means, variances,
                           config.probe_spread)  # fmt: skip
    scores = scores.unflatten(0, (case.batch, case.heads))
    scores = scores + torch.log(index.counts.double()).repeat_interleave(group, 1)[:, :, None]
    clusters = scores.shape[-1]
    if clusters == 0 or chosen.shape[-1] == 0:
        assert chosen.shape[-1] == min(config.num_probes, clusters)
        return
    positions = torch.arange(case.n_q, device=scores.device) + call.query_offset
    before = far_before(positions, config, clusters // config.clusters_per_chunk)
    far = torch.arange(clusters, device=scores.device) // config.clusters_per_chunk
    scores = scores.masked_fill(far >= before[:, None], float("-inf"))
    picked = torch.zeros((*scores.shape[:3], clusters + 1), dtype=torch.int64, device=scores.device)
    picked.scatter_add_(3, torch.where(chosen < 0, clusters, chosen).long(),
                        torch.ones_like(chosen, dtype=torch.int64))  # fmt: skip
    picked = picked[..., :-1]
    assert int(picked.max()) <= 1, "a cluster was chosen twice"
    possible = (scores > float("-inf")).sum(-1)
    assert torch.equal(picked.sum(-1), possible.clamp(max=chosen.shape[-1]))
    worst = scores.masked_fill(picked == 0, float("inf")).amin(-1)
    missed = scores.masked_fill(picked == 1, float("-inf")).amax(-1)
    assert bool((worst > float("-inf")).all()), "a cluster that is not far was chosen"
    assert bool((missed <= worst + tolerance * (1 + missed.abs())).all())


def assert_forward_matches(case: ChunkCase, dtype: torch.dtype, device: str = "cpu") -> None:
    """Choice, output and lse against the dense definition in float64."""
    call, index = make_case(case, dtype, device)
    output, lse, chosen = triton_chunks_forward(call, case.config, index)
    limit = TOLERANCE[dtype]
    assert_choice_is_best(case, call, index, chosen, max(limit, 1e-4))
    wide, wide_index = widened(call, index)
    want = chunks_reference(wide, case.config, wide_index, chosen.long())
    assert output.dtype == dtype
    assert output.shape == want.output.shape
    torch.testing.assert_close(output.double(), want.output.double(), rtol=limit, atol=limit)
    torch.testing.assert_close(lse.double(), want.lse.double(), rtol=limit, atol=limit)


def assert_backward_matches(case: ChunkCase, dtype: torch.dtype, device: str = "cpu") -> None:
    """dq, dk and dv, through output and lse, against plain torch in float64, norm by norm."""
    call, index = make_case(case, dtype, device)
    output, lse, chosen = triton_chunks_forward(call, case.config, index)
    generator = torch.Generator(device="cpu").manual_seed(7)
    up = torch.randn(output.shape, generator=generator).to(device, dtype)
    up_lse = torch.randn(lse.shape, generator=generator).to(device)
    grads = triton_chunks_backward(call, case.config, index, chosen, up, up_lse, output, lse)
    wide, wide_index = widened(call, index)
    want, want_lse, _ = eager_forward(wide, case.config, wide_index, chosen)
    exact = eager_backward(wide, case.config, wide_index, chosen, up.double(), up_lse.double(),
                           want, want_lse)  # fmt: skip
    limit = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for name, got, expected in zip(("dq", "dk", "dv"), grads, exact, strict=True):
        assert got.dtype == dtype
        assert got.is_contiguous()
        error = float(torch.dist(got.double(), expected) / expected.norm())
        assert error <= limit, f"{name}: relative error {error:.2e}"


def assert_index_is_balanced(key: torch.Tensor, config: HyperConfig, first_chunk: int = 0) -> None:
    """The kernels' tree: all that an index promises, and nearly the clusters of plain torch."""
    got = triton_chunk_index(key, config, first_chunk)
    plain = build_chunk_index(key.cpu(), key.cpu(), config, None, 0, first_chunk)
    for name, a, b in zip(got._fields, got, plain, strict=True):
        assert a.shape == b.shape, name
        assert a.dtype == b.dtype, name
    for name in ("starts", "counts"):
        assert torch.equal(getattr(got, name).cpu(), getattr(plain, name)), name
    assert torch.equal(got.order.sort(-1).values.cpu(), plain.order.sort(-1).values)
    sinks = got.labels < 0
    assert torch.equal(sinks.cpu(), plain.labels < 0)
    # labels, order, starts and counts say the same
    rank = torch.arange(got.order.shape[-1], device=key.device)
    of_place = got.labels.gather(2, got.order.long())
    start = got.starts.gather(2, of_place.clamp(min=0).long())
    inside = (rank >= start) & (rank < start + got.counts.gather(2, of_place.clamp(min=0).long()))
    assert bool((inside | (of_place < 0)).all())
    # statistics of the kernels' own clusters
    for c in range(0, got.counts.shape[-1], 3):
        a, n = int(got.starts[0, 0, c]), int(got.counts[0, 0, c])
        rows = key[0, 0, got.order[0, 0, a : a + n].long()].double()
        mean = got.mean_key[0, 0, c].double()
        torch.testing.assert_close(mean, rows.mean(0), rtol=1e-4, atol=1e-5)
        if config.probe_spread:
            want = shared_in_pairs(rows.var(0, correction=0)[None])[0]
            torch.testing.assert_close(got.variance[0, 0, c].double(), want, rtol=1e-3, atol=1e-5)
    # within a cluster keys are as close as in plain torch
    assert spread_inside(key, got) <= 1.02 * spread_inside(key.cpu(), plain) + 1e-9


def spread_inside(key: torch.Tensor, index: ChunkIndex) -> float:
    """Mean squared distance of clustered keys from their cluster's mean."""
    labels = index.labels.long()
    keys = key[:, :, : labels.shape[-1]].double()
    at = labels.clamp(min=0).unsqueeze(-1).expand_as(keys)
    apart = (keys - index.mean_key.double().gather(2, at)).square().sum(-1)
    return float(apart[labels >= 0].mean())
