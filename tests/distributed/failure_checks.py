"""What each rank checks of refusals: found before anything is exchanged, and on every rank."""

from __future__ import annotations

import pytest
import torch
from context_checks import inputs

from longspan import (
    ConfigError,
    ExactConfig,
    RankError,
    ShapeError,
    StickBreakingConfig,
    UnsupportedError,
    WindowConfig,
)
from longspan.distributed import (
    ContextGroup,
    SequenceLayout,
    ring_attention,
    ring_attention_with_lse,
    ring_attention_with_remainder,
    ulysses_attention,
)


def parts(group, length=16, **kwargs):
    layout = SequenceLayout(length=length, ranks=group.size)
    q, k, v, _ = inputs(length, **kwargs)
    return layout, [layout.split(t, group.rank, 2) for t in (q, k, v)]


def check_ranks_differ(group):
    layout, (q, k, v) = parts(group)
    odd = group.rank == 1
    call = {"group": group, "layout": layout, "is_causal": True, "enable_gqa": True}
    config = WindowConfig(window=5 if odd else 6)
    with pytest.raises(RankError, match=r"config is WindowConfig\(window=[56].*rank"):
        ring_attention(q, k, v, config, **call)
    with pytest.raises(RankError, match=r"key is .*float(32|64).*value is"):
        ring_attention(*(t.float() if odd else t for t in (q, k, v)), **call)
    with pytest.raises(RankError, match="query is"):
        ring_attention(q[:1] if odd else q, k[:1] if odd else k, v[:1] if odd else v, **call)
    with pytest.raises(RankError, match="layout is"):
        other = SequenceLayout(length=16, ranks=group.size, kind="contiguous")
        ring_attention(q, k, v, **(call | {"layout": other if odd else layout}))
    with pytest.raises(RankError, match="needs a gradient is"):
        ring_attention(q.detach().requires_grad_(odd), k, v, **call)
    with pytest.raises(RankError, match="is in ulysses_attention instead|is in ring_attention"):
        (ulysses_attention if odd else ring_attention)(q, k, v, ExactConfig(), **call)
    # one rank's own mistake reaches the others
    wrong = (ShapeError if odd else RankError, "of 16 tokens in a zigzag")
    with pytest.raises(wrong[0], match=wrong[1]):
        ring_attention(q[:, :, 1:] if odd else q, k, v, scale=0.3, **call)
    # and all goes on
    assert ring_attention(q, k, v, **call).shape == (2, 4, 8, 6)


def check_seeds_differ(group):
    """`verify` itself, as any mechanism with a seed uses it."""
    with pytest.raises(RankError, match="seed is .* here"):
        group.verify("hyper", {"seed": group.rank})
    group.verify("hyper", {"seed": 3})
    group.verify("hyper", {"seed": 3})


def check_refusals(group):
    layout, (q, k, v) = parts(group)
    call = {"group": group, "layout": layout, "is_causal": True, "enable_gqa": True}
    with pytest.raises(ShapeError, match="4 heads|3 heads for 2 ranks.*group of"):
        ulysses_attention(q[:, :3], k[:, :3], v[:, :3], ExactConfig(), **call)
    q3, k3 = q.repeat(1, 3, 1, 1)[:, :12], k.repeat(1, 2, 1, 1)[:, :3]
    with pytest.raises(ShapeError, match="key has 3 heads for 2 ranks.*Repeat key"):
        ulysses_attention(q3, k3, k3, ExactConfig(), **call)
    with pytest.raises(UnsupportedError, match="logit_bias has shape.*cut by heads"):
        ulysses_attention(q, k, v, StickBreakingConfig(), logit_bias=torch.zeros(7), **call)
    with pytest.raises(UnsupportedError, match="stick-breaking has no log-sum-exp"):
        ring_attention_with_lse(q, k, v, StickBreakingConfig(), **call)
    with pytest.raises(UnsupportedError, match="only StickBreakingConfig"):
        ring_attention_with_remainder(q, k, v, ExactConfig(), **call)
    with pytest.raises(UnsupportedError, match="causal by definition"):
        ring_attention(q, k, v, StickBreakingConfig(), **(call | {"is_causal": False}))
    with pytest.raises(UnsupportedError, match="logit_bias was given"):
        ring_attention(q, k, v, logit_bias=torch.zeros(4), **call)
    with pytest.raises(UnsupportedError, match="returns no lse"):
        ring_attention(q, k, v, ExactConfig(backend="efficient"), **call)
    packed = SequenceLayout(length=16, ranks=group.size, cu_seqlens=(0, 4, 16))
    for function in (ring_attention, ulysses_attention):
        with pytest.raises(UnsupportedError, match="has no documents.*_varlen"):
            function(q, k, v, ExactConfig(), **(call | {"layout": packed}))
    with pytest.raises(ShapeError, match="layout is for 3 ranks"):
        three = SequenceLayout(length=16, ranks=3)
        ring_attention(q, k, v, **(call | {"layout": three}))
    with pytest.raises(ConfigError, match="a dict belongs to no mechanism"):
        ring_attention(q, k, v, {}, **call)
    with pytest.raises(ShapeError, match=r"query is \(4, 8, 8\).*must be \(B, H, 8, D\)"):
        ring_attention(q[0], k[0], v[0], **call)
    with pytest.raises(ConfigError, match="timeout is 0"):
        ContextGroup(timeout=0)


def check_torch_context_parallel(group):
    """torch's manager patches SDPA; ours would see a shard of a shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    layout, (q, k, v) = parts(group)
    mesh = init_device_mesh("cpu", (group.size,))
    buffer = torch.zeros(1, 8 * group.size)
    call = {"group": group, "layout": layout, "is_causal": True, "enable_gqa": True}
    ring_attention(q, k, v, **call)  # compared before: must be refused all the same
    with context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[1]):
        for function in (ring_attention, ulysses_attention):
            with pytest.raises(UnsupportedError, match="torch's context_parallel is active"):
                function(q, k, v, ExactConfig(), **call)


def check_mesh(group):
    """A group from a dimension of a mesh; two groups of the same ranks do not meet."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, group.size), mesh_dim_names=("dp", "cp"))
    with ContextGroup(mesh["cp"], timeout=20.0) as second:
        assert (second.rank, second.size) == (group.rank, group.size)
        layout, (q, k, v) = parts(second)
        call = {"layout": layout, "is_causal": True, "enable_gqa": True}
        torch.testing.assert_close(
            ring_attention(q, k, v, group=second, **call),
            ring_attention(q, k, v, group=group, **call),
        )
        with pytest.raises(ConfigError, match="mesh of 2 dimensions"):
            ContextGroup(mesh)
