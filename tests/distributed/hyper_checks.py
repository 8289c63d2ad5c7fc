"""What each rank checks of HyperAttention over ranks: it equals one process's."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from context_checks import compare, inputs, leaves

from longspan import (
    ConfigError,
    ExactConfig,
    HyperConfig,
    UnsupportedError,
    hyper_attention,
    hyper_attention_with_lse,
)
from longspan.distributed import (
    SequenceLayout,
    attend_across_ranks,
    hyper_attention_across_ranks,
)


def check_clusters(group, config, kind, length, chunks=1, kv_heads=2, seed=5):
    layout = SequenceLayout(
        length=length, ranks=group.size, kind=kind, multiple=chunks * config.chunk_size
    )
    q, k, v, up = inputs(length, kv_heads=kv_heads)
    up_lse = torch.randn(up.shape[:3], generator=torch.Generator().manual_seed(9)).double()
    common = {"config": config, "is_causal": True, "enable_gqa": True, "seed": seed}
    whole_in = leaves(3 * q, k, v)
    whole = hyper_attention_with_lse(*whole_in, **common)
    mine_in = leaves(*(layout.split(t, group.rank, 2) for t in (3 * q, k, v)))
    mine = hyper_attention_across_ranks(*mine_in, group=group, layout=layout, **common)
    compare(group, layout, (list(whole), whole_in), (list(mine), mine_in), [up, up_lse])


def received_bytes(call):
    """Of the exchanges that `call` makes, what a rank sends to itself left out; and its result."""
    exchange, total = dist.all_to_all_single, 0

    def counting(output, given, output_split_sizes=None, *rest, **named):
        nonlocal total
        total += output.numel() * output.element_size()
        return exchange(output, given, output_split_sizes, *rest, **named)

    dist.all_to_all_single = counting
    try:
        result = call()
    finally:
        dist.all_to_all_single = exchange
    return total, result


def check_bytes(group, agree):
    """The last rank receives near keys, columns, and the clusters that its queries opened."""
    config = HyperConfig(chunk_size=64, cluster_size=16, window=64, num_probes=2, num_sinks=4)
    length, batch, kv_heads, dim, value_dim = 2048, 2, 2, 8, 6
    layout = SequenceLayout(length=length, ranks=group.size, kind="contiguous", multiple=64)
    q, k, v, _ = inputs(length)
    if agree:
        q = q[:, :1, :1].expand(-1, 4, length, -1).contiguous()
    mine = [layout.split(t, group.rank, 2) for t in (q, k, v)]
    common = {"config": config, "is_causal": True, "enable_gqa": True}
    got, (output, _) = received_bytes(
        lambda: hyper_attention_across_ranks(*mine, group=group, layout=layout, **common)
    )
    whole = layout.split(hyper_attention(q, k, v, **common), group.rank, 2)
    torch.testing.assert_close(output, whole, rtol=1e-10, atol=1e-10)
    width, heads = (dim + value_dim) * 8, batch * kv_heads
    keys = heads * width * (length - layout.length_of(group.rank))
    if group.rank == 0:
        return got, keys
    before = layout.spans(group.rank)[0].start
    clusters = before // config.cluster_size
    near = heads * (64 + config.num_sinks) * width
    columns = heads * clusters * (width + 3 * 8)  # bias, owner and count as well
    assert got >= near + columns
    assert got <= near + columns + heads * before * width + heads * 2 * length
    return got, keys


def check_refusals(group):
    """What has to go to ulysses_attention is refused on every rank, before any exchange."""
    config = HyperConfig(chunk_size=8, cluster_size=2, window=5)
    q, k, v, _ = inputs(32)
    layout = SequenceLayout(length=32, ranks=group.size, multiple=8)
    wrong = SequenceLayout(length=32, ranks=group.size, multiple=4)
    packed = SequenceLayout(length=32, ranks=group.size, multiple=8, cu_seqlens=(0, 20, 32))
    for problem, where, kind, settings in (
        ("amid chunks of 8", wrong, ConfigError, {}),
        ("packed documents", packed, UnsupportedError, {}),
        ("is_causal is False", layout, UnsupportedError, {"is_causal": False}),
        ("key_lengths were given", layout, UnsupportedError,
         {"key_lengths": torch.tensor([32, 9], dtype=torch.int32)}),
        ("'recursion'", layout, UnsupportedError, {"config": HyperConfig.paper()}),
        ("max_error=0.1", layout, UnsupportedError, {"config": HyperConfig(max_error=0.1)}),
        ("ExactConfig", layout, UnsupportedError, {"config": ExactConfig()}),
        ("impl='reference'", layout, UnsupportedError, {"impl": "reference"}),
    ):  # fmt: skip
        mine = [where.split(t, group.rank, 2) for t in (q, k, v)]
        call = {"config": config, "enable_gqa": True} | settings
        with pytest.raises(kind, match=problem):
            hyper_attention_across_ranks(*mine, group=group, layout=where, **call)
        dist.barrier()


def check_scheme(group):
    """By the scheme's name, in float32, without gradients."""
    config = HyperConfig(chunk_size=8, cluster_size=2, window=5, num_probes=2)
    layout = SequenceLayout(length=64, ranks=group.size, multiple=8)
    q, k, v = (t.float() for t in inputs(64)[:3])
    mine = [layout.split(t, group.rank, 2) for t in (q, k, v)]
    got = attend_across_ranks("clusters", *mine, config, group=group, layout=layout)
    want = hyper_attention(q, k, v, is_causal=True, enable_gqa=True, config=config)
    torch.testing.assert_close(got, layout.split(want, group.rank, 2))
