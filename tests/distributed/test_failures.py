"""Ranks that disagree or die: found, named, and in time."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from datetime import timedelta

import failure_checks
import pytest
import stick_checks
import torch


def test_ranks_that_differ_are_found(two_ranks):
    two_ranks.run(failure_checks.check_ranks_differ)
    two_ranks.run(failure_checks.check_seeds_differ)


def test_refusals(two_ranks):
    two_ranks.run(failure_checks.check_refusals)


def test_context_parallel_of_torch_is_refused(two_ranks):
    two_ranks.run(failure_checks.check_torch_context_parallel)


def test_group_from_a_mesh(ranks):
    ranks.run(failure_checks.check_mesh)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_early_stop(ranks, kind):
    ranks.run(stick_checks.check_early_stop, kind=kind)
    ranks.run(stick_checks.check_early_stop, kind=kind, rows=4)
    ranks.run(stick_checks.check_early_stop, kind=kind, rows=4, recompute=False)
    ranks.run(stick_checks.check_early_stop_that_never_stops, kind=kind)
    ranks.run(stick_checks.check_batch_neighbours, kind=kind)


def lose_a_rank(rank, port, outbox, exit_when_stopped):
    import torch.distributed as dist

    from longspan import RankError
    from longspan.distributed import ContextGroup, SequenceLayout, ring_attention

    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
        timeout=timedelta(seconds=30),
    )  # fmt: skip
    group = ContextGroup(timeout=1.0, exit_when_stopped=exit_when_stopped)
    layout = SequenceLayout(length=8, ranks=2)
    q = torch.randn(1, 1, 4, 4)
    ring_attention(q, q, q, group=group, layout=layout, is_causal=True)
    dist.barrier()
    if rank == 1:
        os._exit(3)
    start = time.monotonic()
    try:
        if exit_when_stopped:
            time.sleep(20)  # stands for a kernel that waits for ever
        ring_attention(q, q, q, group=group, layout=layout, is_causal=True)
        outbox.put(("returned", 0.0))
    except RankError as error:
        outbox.put((str(error), time.monotonic() - start))


def start_two(exit_when_stopped):
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outbox = context.Queue()
    processes = [
        context.Process(target=lose_a_rank, args=(rank, port, outbox, exit_when_stopped))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    return processes, outbox


def test_a_rank_that_dies_is_named(capfd):
    from longspan.distributed.watch import EXIT_CODE

    raising, outbox = start_two(False)
    ending, _ = start_two(True)
    message, seconds = outbox.get(timeout=60)
    assert "ring_attention: an exchange between ranks failed on rank 0" in message
    assert "No sign of life from rank 1 for 1 s" in message
    assert seconds < 5
    for process in (*raising, *ending):
        process.join(30)
    assert ending[0].exitcode == EXIT_CODE
    assert "rank 0 ends: rank 1 gave no sign of life for 1 s" in capfd.readouterr().err
