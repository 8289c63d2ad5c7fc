"""The kernels inside context parallelism, on one rank, in the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from longspan import (
    InfiniConfig,
    StickBreakingConfig,
    WindowConfig,
    infini_attention,
    stick_breaking_attention,
    window_attention,
)
from longspan.distributed import (
    ContextGroup,
    SequenceLayout,
    infini_attention_across_ranks,
    ring_attention,
)


@pytest.fixture
def group(tmp_path):
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield ContextGroup()
    dist.destroy_process_group()


def compare(one, across, tensors):
    leaves = [[t.clone().requires_grad_() for t in tensors] for _ in range(2)]
    want, got = one(*leaves[0]), across(*leaves[1])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    up = torch.randn_like(want)
    wanted, gradients = (
        torch.autograd.grad(out, ins, up) for out, ins in ((want, leaves[0]), (got, leaves[1]))
    )
    for g, w in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_parts_run_in_the_kernels(group):
    tensors = [torch.randn(1, heads, 40, 16) for heads in (2, 1, 1)]
    layout = SequenceLayout(length=40, ranks=1)  # zigzag: two chunks, three parts
    call = {"enable_gqa": True, "is_causal": True, "impl": "triton"}
    across = {**call, "group": group, "layout": layout}
    stick, window = StickBreakingConfig(), WindowConfig(window=9, num_sinks=2)
    infini = InfiniConfig(segment_length=16, local="sliding")
    compare(
        lambda *t: stick_breaking_attention(*t, config=stick, **call),
        lambda *t: ring_attention(*t, stick, **across),
        tensors,
    )
    compare(
        lambda *t: window_attention(*t, config=window, **call),
        lambda *t: ring_attention(*t, window, **across),
        tensors,
    )
    compare(
        lambda *t: infini_attention(*t, config=infini, **call).output,
        lambda *t: infini_attention_across_ranks(*t, config=infini, **across).output,
        tensors,
    )
