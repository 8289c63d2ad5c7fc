"""Perplexity of a pretrained model under a mechanism, over a book that ranks share.

    torchrun --nproc_per_node 4 examples/perplexity_across_ranks.py --model smollm2-135m \\
        --config window:window=4096 --length 131072

Each rank holds its part of the sequence; attention exchanges what it needs.
"""

from __future__ import annotations

import argparse
import json
import math
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F

from longspan.distributed import (
    IGNORED,
    ContextGroup,
    SequenceLayout,
    global_mean,
    shard_batch,
)
from longspan.eval.data import load_text, take_tokens
from longspan.hf import context_parallel
from longspan.models import load

CHUNK = 4096  # tokens whose logits exist at a time


@torch.no_grad()
def main() -> None:
    """One rank."""
    options = parse()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)
    loaded = load(options.model, device=device, dtype=getattr(torch, options.dtype))
    tokens = take_tokens(load_text(options.text), loaded.tokenizer, options.length)
    ids = torch.tensor(tokens, device=device)[None]
    with ContextGroup(exit_when_stopped=on_gpu) as group:
        layout = SequenceLayout(length=ids.shape[1], ranks=group.size, kind=options.layout)
        batch = shard_batch(ids, layout, group.rank)
        with context_parallel(
            loaded.model, options.config, options.layers, group=group, layout=layout,
            scheme=options.scheme,
        ):  # fmt: skip
            hidden = loaded.model.base_model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).last_hidden_state
        total = torch.zeros((), dtype=torch.float64, device=device)
        for h, t in zip(hidden.split(CHUNK, 1), batch.targets.split(CHUNK, 1), strict=True):
            logits = loaded.model.get_output_embeddings()(h).float()
            total += F.cross_entropy(
                logits.flatten(0, 1), t.flatten(), ignore_index=IGNORED, reduction="sum"
            )
        loss = global_mean(total, (batch.targets != IGNORED).sum(), group)
        if group.rank == 0:
            row = {
                "model": options.model, "config": options.config, "layers": options.layers,
                "tokens": ids.shape[1], "ranks": group.size, "loss": loss.item(),
                "perplexity": math.exp(loss.item()),
            }  # fmt: skip
            print(json.dumps(row), flush=True)
    dist.destroy_process_group()


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a name of `longspan models`, or a folder")
    parser.add_argument("--config", default="exact", help="e.g. window:window=4096,num_sinks=4")
    parser.add_argument("--layers", default="all")
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--scheme", default="ring", help="ring or ulysses")
    parser.add_argument("--layout", default="zigzag", help="zigzag or contiguous")
    parser.add_argument("--text", default=None, help="a text file; default: the bundled book")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
