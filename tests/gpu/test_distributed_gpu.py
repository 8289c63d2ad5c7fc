"""Context parallelism on CUDA: the parts on one GPU, and the exchanges where there are two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longspan import ExactConfig, HyperConfig, InfiniConfig, StickBreakingConfig, WindowConfig
from longspan.distributed import ContextGroup, SequenceLayout, attend_across_ranks
from longspan.mechanisms import mechanism_of_config
from longspan.testing import assert_within_budget, make_qkv

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "exact": ("ring", ExactConfig(), {"cu_seqlens": (0, 300, 700, 1024)}),
    "window": ("ring", WindowConfig(window=100, num_sinks=3), {}),
    "stick_breaking": ("ring", StickBreakingConfig(), {}),
    "stick_breaking kept": ("ring", StickBreakingConfig(early_stop=2.0**-14), {}),
    "infini": ("state_passing", InfiniConfig(segment_length=128), {"kind": "contiguous"}),
    "infini delta": ("state_passing", InfiniConfig(segment_length=128, update="delta"),
                     {"kind": "contiguous"}),
    "hyper": ("clusters", HyperConfig(chunk_size=128, window=100, num_probes=64),
              {"multiple": 128}),
}  # fmt: skip


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield ContextGroup()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_parts_of_one_rank_equal_one_call(group, name):
    scheme, config, fields = CASES[name]
    layout = SequenceLayout(length=1024, ranks=1, **fields)
    q, k, v = make_qkv(1, 4, 1024, 64, kv_heads=2, dtype=torch.bfloat16, device="cuda")
    extra = {"recompute": False} if name.endswith("kept") else {}
    mechanism = mechanism_of_config(config)
    upstream = torch.randn(1, 4, 1024, 64, device="cuda", dtype=torch.float64)

    def one(*tensors):
        call = {"is_causal": True, "enable_gqa": True, "config": config}
        if layout.cu_seqlens is None:
            result = mechanism.function(*tensors, **call)
            return result if isinstance(result, torch.Tensor) else result.output
        cu = torch.tensor(layout.cu_seqlens, dtype=torch.int32, device="cuda")
        packed = (t[0].transpose(0, 1) for t in tensors)
        joined = mechanism.function_varlen(*packed, cu, cu, 1024, 1024, **call)
        return joined.transpose(0, 1)[None]

    def across(*tensors):
        return attend_across_ranks(scheme, *tensors, config, group=group, layout=layout, **extra)

    def run(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))

    oracle = run(one, torch.float64)
    plain, got = run(one, torch.bfloat16), run(across, torch.bfloat16)
    labels = ("output", "dq", "dk", "dv")
    for label, g, w, p in zip(labels, got, oracle, plain, strict=True):
        assert_within_budget(g, w, p, label=f"{name}: {label}")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_exchanges_on_two_gpus(tmp_path):
    """The benchmark compares every scheme with one GPU before it times it."""
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               str(ROOT / "benchmarks" / "distributed.py"), "--out", str(rows), "--lengths",
               "16384", "--check", "8192", "--repeats", "2"]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    across = [row for row in found if row.get("received_bytes") is not None]
    assert {row["impl"] for row in across} >= {
        "exact ring", "infini state passing", "hyper clusters"
    }  # fmt: skip
    assert all(row["verified"] for row in across)
