"""Train the reference transformer on long sequences: FSDP2 and context parallelism together.

    torchrun --nproc_per_node 8 examples/train_long_context.py --cp 8 --length 131072

Every group of --cp ranks shares each sequence; all ranks share the parameters (FSDP2). The batch of
a step depends on the step alone, and checkpoints are sharded by torch's own writer: a run goes on
with another number of ranks, or another --cp, where it stopped. Tokens are the bytes of a text.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from longspan.distributed import (
    IGNORED,
    ContextGroup,
    SequenceLayout,
    global_mean,
    shard_batch,
    spread_transformer,
)
from longspan.eval.data import load_text
from longspan.mechanisms import get_mechanism
from longspan.models import Transformer, TransformerConfig
from longspan.nn import ChunkedMLP


def main() -> None:
    """One rank."""
    options = parse()
    on_gpu = torch.cuda.is_available()
    kind = "cuda" if on_gpu else "cpu"
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    ranks = dist.get_world_size()
    mesh = init_device_mesh(kind, (ranks // options.cp, options.cp), mesh_dim_names=("dp", "cp"))
    config = get_mechanism(options.mechanism).config_class(**options.settings)
    layout = SequenceLayout(
        length=options.length, ranks=options.cp, kind=options.layout, multiple=options.multiple
    )
    model = build(options, config, init_device_mesh(kind, (ranks,)), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    first = load(options.folder, model, optimizer) if options.resume else 0
    tokens = torch.frombuffer(bytearray(load_text(options.text).text, "utf-8"), dtype=torch.uint8)
    per_group = options.batch // mesh["dp"].size()
    with ContextGroup(mesh["cp"], exit_when_stopped=on_gpu) as group:
        for step in range(first, options.steps):
            start = time.perf_counter()
            mine = range(mesh["dp"].get_local_rank() * per_group, options.batch)[:per_group]
            ids = torch.stack([sequence(tokens, options, step, index) for index in mine])
            batch = shard_batch(ids.to(device), layout, group.rank)
            with spread_transformer(model, group=group, layout=layout, scheme=options.scheme):
                logits = model(batch.input_ids)
                total = F.cross_entropy(
                    logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED,
                    reduction="sum",
                )  # fmt: skip
                count = (batch.targets != IGNORED).sum()
                loss = global_mean(total, count, None, reduction="mean")  # FSDP averages
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if dist.get_rank() == 0:
                row = {"step": step, "loss": round(loss.item(), 6),
                       "seconds": round(time.perf_counter() - start, 3)}  # fmt: skip
                print(json.dumps(row), flush=True)
            if options.folder and (
                step + 1 == options.steps or (step + 1) % options.save_every == 0
            ):
                save(options.folder, model, optimizer, step + 1)
    dist.destroy_process_group()


def build(options, config, mesh, device):
    """The model, every feed-forward layer in chunks, every layer sharded."""
    model = Transformer(
        TransformerConfig(
            vocab_size=256, width=options.width, layers=options.layers, heads=options.heads,
            kv_heads=options.kv_heads, attention=config,
        ),
        gradient_checkpointing=True,
    ).to(device)  # fmt: skip
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = {"mp_policy": half} if device.type == "cuda" else {}
    for block in model.blocks:
        block.mlp = ChunkedMLP(block.mlp, options.mlp_chunk)
        fully_shard(block, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


def sequence(tokens, options, step, index):
    """Which bytes sequence `index` of a step is: the same for any number of ranks."""
    generator = torch.Generator().manual_seed(1_000_003 * step + index)
    start = int(torch.randint(len(tokens) - options.length, (), generator=generator))
    return tokens[start : start + options.length].long()


def save(folder, model, optimizer, step):
    """Every rank writes its shards; the folder of a step counts once torch has put .metadata in."""
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": step}
    dcp.save(state, checkpoint_id=folder / f"step-{step:08d}")


def load(folder, model, optimizer):
    """The step to go on with; any number of ranks reads what any other wrote."""
    whole = sorted(path.parent for path in folder.glob("step-*/.metadata"))
    if not whole:
        raise SystemExit(f"--folder: {folder} has no whole checkpoint. Start without --resume.")
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": 0}
    dcp.load(state, checkpoint_id=whole[-1])
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return state["step"]


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=131_072, help="tokens of a sequence")
    parser.add_argument("--cp", type=int, default=1, help="ranks that share a sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a step, in all")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--mechanism", default="exact")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON of the mechanism")
    parser.add_argument("--scheme", default="ring", help="ring, ulysses or state_passing")
    parser.add_argument("--layout", default="zigzag", help="zigzag or contiguous")
    parser.add_argument("--multiple", type=int, default=1, help="cut at multiples of this")
    parser.add_argument("--text", default=None, help="a text file; default: the bundled book")
    parser.add_argument("--folder", type=Path, default=None, help="of checkpoints")
    parser.add_argument("--save-every", type=int, default=1000, help="steps; the last one, too")
    parser.add_argument("--resume", action="store_true", help="go on from --folder")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    for name, value in (("width", 1024), ("layers", 12), ("heads", 16), ("kv-heads", 8),
                        ("mlp-chunk", 4096)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


if __name__ == "__main__":
    main()
