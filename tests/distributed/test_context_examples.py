"""The examples run, on several processes as on one, and go on with another number of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--length", "120", "--width", "32", "--layers", "2", "--heads", "4", "--kv-heads", "2",
        "--mlp-chunk", "64", "--batch", "2"]  # fmt: skip


def start(ranks, script, *options):
    """`ranks` processes of an example, as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks),
              "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, options)]
    return [
        subprocess.Popen(
            command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip


def rows_of(processes):
    """What rank 0 printed."""
    outputs = [process.communicate(timeout=240) for process in processes]
    for process, (_, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error[-3000:]
    return [json.loads(line) for line in outputs[0][0].splitlines() if line.startswith("{")]


def losses(processes):
    return {row["step"]: row["loss"] for row in rows_of(processes)}


def assert_alike(got, want):
    assert got.keys() <= want.keys()
    for step, loss in got.items():
        assert loss == pytest.approx(want[step], abs=2e-5), (got, want)


def test_training_resumes_on_another_number_of_ranks(tmp_path):
    straight = start(1, "train_long_context.py", *TINY, "--steps", 4)
    two = start(2, "train_long_context.py", *TINY, "--cp", 2, "--steps", 2, "--folder", tmp_path)
    want, first = losses(straight), losses(two)
    assert sorted(want) == [0, 1, 2, 3]
    assert want[3] < want[0]
    assert_alike(first, want)
    one = start(1, "train_long_context.py", *TINY, "--steps", 4, "--folder", tmp_path, "--resume")
    rest = losses(one)
    assert sorted(rest) == [2, 3]
    assert_alike(rest, want)


@pytest.mark.slow
def test_training_resumes_on_four_ranks_with_other_schemes(tmp_path):
    want = losses(start(1, "train_long_context.py", *TINY, "--steps", 4, "--folder", tmp_path,
                        "--save-every", 2))  # fmt: skip
    for folder in tmp_path.glob("step-00000004"):
        for file in folder.iterdir():
            file.unlink()  # as if the run had been cut off there
    got = losses(start(4, "train_long_context.py", *TINY, "--steps", 4, "--cp", 2, "--scheme",
                       "ulysses", "--folder", tmp_path, "--resume"))  # fmt: skip
    assert sorted(got) == [2, 3]
    assert_alike(got, want)
    infini = ["--mechanism", "infini", "--settings", '{"segment_length": 16}']
    infini += ["--scheme", "state_passing", "--layout", "contiguous", "--multiple", 16]
    want = losses(start(1, "train_long_context.py", *TINY, "--steps", 2, *infini))
    got = losses(start(2, "train_long_context.py", *TINY, "--steps", 2, *infini, "--cp", 2))
    assert_alike(got, want)


@pytest.mark.slow
def test_perplexity_is_that_of_one_rank(tmp_path):
    from longspan.testing.models import save_tiny_model

    save_tiny_model(tmp_path, layers=3)
    options = ["--model", tmp_path, "--length", 333, "--config", "window:window=16", "--layers",
               "last:2"]  # fmt: skip
    both = [start(ranks, "perplexity_across_ranks.py", *options) for ranks in (1, 2)]
    (one,), (two,) = (rows_of(processes) for processes in both)
    assert (one["ranks"], two["ranks"], one["tokens"], two["tokens"]) == (1, 2, 333, 333)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
