"""What each rank checks of HyperAttention over ranks: it equals one process's."""

from __future__ import annotations

import torch
from context_checks import compare, inputs, leaves

from longspan import hyper_attention_with_lse
from longspan.distributed import SequenceLayout, hyper_attention_across_ranks


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
