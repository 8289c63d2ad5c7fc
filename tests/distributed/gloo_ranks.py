"""Processes that live as long as the test session: starting one costs seconds, a check does not."""

from __future__ import annotations

import importlib
import itertools
import socket
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch

HERE = str(Path(__file__).parent)


def serve(rank, size, port, inbox, outbox):
    """What a process does: set up gloo, then run the checks that come, one by one."""
    import torch.distributed as dist

    sys.path.insert(0, HERE)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    from longspan.distributed import ContextGroup

    group = ContextGroup(timeout=30.0)
    while (task := inbox.get()) is not None:
        module, name, arguments = task
        try:
            torch.manual_seed(0)
            result = getattr(importlib.import_module(module), name)(group, **arguments)
            outbox.put((rank, None, result))
        except BaseException as error:
            outbox.put((rank, f"rank {rank}: {error!r}\n{traceback.format_exc()}", None))
    group.close()
    dist.destroy_process_group()


class Ranks:
    """`size` processes; `run` calls a function on each of them."""

    def __init__(self, size):
        context = torch.multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.size = size
        self.outbox = context.Queue()
        self.inboxes = [context.Queue() for _ in range(size)]
        self.processes = [
            context.Process(target=serve, args=(r, size, port, self.inboxes[r], self.outbox))
            for r in range(size)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, **arguments):
        """`function(group, **arguments)` on every rank; its results, in order of rank."""
        for inbox in self.inboxes:
            inbox.put((function.__module__, function.__name__, arguments))
        done = [self.outbox.get(timeout=120) for _ in range(self.size)]
        problems = [problem for _, problem, _ in done if problem]
        assert not problems, "\n".join(problems)
        return [result for _, _, result in sorted(done, key=lambda item: item[0])]

    def close(self):
        for inbox in self.inboxes:
            inbox.put(None)
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()


_OPEN: dict[int, Ranks] = {}


def ranks_of(size):
    if size not in _OPEN:
        _OPEN[size] = Ranks(size)
    return _OPEN[size]


def close_all():
    for ranks in _OPEN.values():
        ranks.close()


def product(**axes):
    """All combinations as a list of dicts."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
