"""Training learns; killed and started again it gives the same losses, to the bit."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from longspan import StickBreakingConfig
from longspan.errors import ConfigError
from longspan.models import Transformer, TransformerConfig
from longspan.train import Batches, TrainConfig, train
from longspan.train.checkpoint import Progress as Place
from longspan.train.checkpoint import load_checkpoint, save_checkpoint
from longspan.train.flops import model_flops_per_token
from longspan.train.loss import LossModel


def source(corpus, config):
    return Batches(corpus, length=config.length, batch_size=config.batch_size, seed=config.seed)


def curve(rows):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def test_it_learns(corpus, tiny, tmp_path):
    config = tiny(steps=60)
    rows = []
    result = train(config, source(corpus, config), tmp_path, device="cpu", listener=rows.append)
    assert result.is_finished
    assert result.rows == rows
    assert rows[-1]["loss"] < rows[0]["loss"] - 1.0
    assert rows[-1]["tokens"] == 60 * 4 * 32
    assert rows[0]["learning_rate"] < rows[3]["learning_rate"] > rows[-1]["learning_rate"]
    loaded = Transformer.load(tmp_path / "model")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(loaded(ids), result.model(ids), rtol=0, atol=0)


def test_stopped_by_the_clock_goes_on(corpus, tiny, tmp_path):
    config = tiny()
    whole = train(config, source(corpus, config), tmp_path / "whole", device="cpu")
    calls = 0
    while True:
        calls += 1
        part = train(
            config, source(corpus, config), tmp_path / "parts", device="cpu", time_limit=0.0
        )
        if part.is_finished:
            break
    assert calls > 5
    assert curve(part.rows) == curve(whole.rows)


_CHILD = """
import sys, numpy as np
from pathlib import Path
from longspan.train import Batches, TokenFile, TrainConfig, train
corpus = TokenFile.open(sys.argv[2])
config = TrainConfig.from_json(Path(sys.argv[3]).read_text())
source = Batches(corpus, length=config.length, batch_size=config.batch_size, seed=config.seed)
train(config, source, sys.argv[1], device="cpu")
"""


def test_killed_it_gives_the_same_curve(corpus, tiny, tmp_path):
    """A real SIGKILL in the middle of training, several times, then the same command again."""
    config = tiny(steps=400, checkpoint_every=4)
    corpus.pack(tmp_path / "corpus.npy")
    (tmp_path / "train.json").write_text(config.to_json())
    command = [
        sys.executable, "-c", _CHILD, str(tmp_path / "killed"), str(tmp_path / "corpus.npy"),
        str(tmp_path / "train.json"),
    ]  # fmt: skip
    log = tmp_path / "killed" / "log.jsonl"
    seen = 0
    for _ in range(2):
        child = subprocess.Popen(command)
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") > seen + 20):
            assert child.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        seen = log.read_text().count("\n")
        assert not (tmp_path / "killed" / "model").exists()
    subprocess.run(command, check=True)
    whole = train(config, source(corpus, config), tmp_path / "whole", device="cpu")
    found = [json.loads(line) for line in log.read_text().splitlines()]
    assert curve(found) == curve(whole.rows)
    assert len(found) == 200
    again = Transformer.load(tmp_path / "killed" / "model")
    for a, b in zip(again.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_half_written_checkpoint_is_not_taken(corpus, tiny, tmp_path):
    config = tiny()
    train(config, source(corpus, config), tmp_path, device="cpu", time_limit=0.0)
    left = tmp_path / "checkpoints" / ".step-000099.77.part"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"cut off")
    assert train(config, source(corpus, config), tmp_path, device="cpu").is_finished
    assert not left.exists()


def test_checkpoint_keeps_every_bit(tmp_path):
    model = Transformer(TransformerConfig(vocab_size=16, width=16, layers=1, heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(12)[None]
    for _ in range(3):
        model(ids).square().mean().backward()
        optimizer.step()
    save_checkpoint(tmp_path, model, optimizer, Place(3, 1.5))
    other = Transformer(model.config, seed=9)
    second = torch.optim.AdamW(other.parameters(), lr=1e-2)
    assert load_checkpoint(tmp_path, other, second) == Place(3, 1.5)
    for net, steps in ((model, optimizer), (other, second)):
        net.zero_grad()
        net(ids).square().mean().backward()
        steps.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_no_pickle_is_written(corpus, tiny, tmp_path):
    config = tiny(steps=6)
    train(config, source(corpus, config), tmp_path, device="cpu")
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds == {".json", ".jsonl", ".safetensors"}


def test_another_run_in_the_folder_is_refused(corpus, tiny, tmp_path):
    config = tiny(steps=6)
    train(config, source(corpus, config), tmp_path, device="cpu")
    other = tiny(steps=8)
    with pytest.raises(ConfigError, match="other settings"):
        train(other, source(corpus, other), tmp_path, device="cpu")


def test_damaged_checkpoint(corpus, tiny, tmp_path):
    config = tiny()
    train(config, source(corpus, config), tmp_path, device="cpu", time_limit=0.0)
    (path,) = (tmp_path / "checkpoints").glob("step-*/model.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="cannot be read"):
        train(config, source(corpus, config), tmp_path, device="cpu")


def test_micro_batches_add_up(corpus, tiny, tmp_path):
    config = tiny(steps=6)
    whole = train(config, source(corpus, config), tmp_path / "whole", device="cpu")
    small = tiny(steps=6, micro_batch=1)
    parts = train(small, source(corpus, small), tmp_path / "parts", device="cpu")
    for a, b in zip(whole.rows, parts.rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_bfloat16(corpus, tiny, tmp_path):
    config = tiny(steps=6, dtype="bfloat16")
    half = train(config, source(corpus, config), tmp_path / "half", device="cpu")
    full = tiny(steps=6)
    wide = train(full, source(corpus, full), tmp_path / "wide", device="cpu")
    assert half.rows[-1]["loss"] == pytest.approx(wide.rows[-1]["loss"], abs=0.05)
    assert half.rows[-1]["loss"] != wide.rows[-1]["loss"]
    assert all(p.dtype is torch.float32 for p in half.model.parameters())


@pytest.mark.parametrize(
    "variant",
    [{}, {"positions": "alibi"}, {"positions": "forget"},
     {"positions": "none", "attention": StickBreakingConfig()}],
    ids=["rope", "alibi", "forget", "stick"],
)  # fmt: skip
def test_blocks_share_one_compilation(variant):
    """Each block compiled for itself would cost minutes per model."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = Transformer(TransformerConfig(vocab_size=32, width=32, layers=5, heads=2, **variant))
    loss_model = LossModel(model, torch.bfloat16)
    ids = torch.arange(24)[None] % 32
    wanted = loss_model(ids, ids)
    for block in model.blocks:
        block.compile(backend=backend, dynamic=False)
    found = loss_model(ids, ids)
    found.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert len(graphs) <= 2
    loss_model.uncompile()
    torch.compiler.reset()


def test_flops_follow_the_sizes():
    config = TransformerConfig(vocab_size=100, width=64, layers=3, heads=2)
    model = Transformer(config)
    short = model_flops_per_token(config, model.num_parameters, 128)
    assert short == 6 * model.num_parameters + 6 * 128 * 64 * 3
    assert model_flops_per_token(config, model.num_parameters, 256) - short == 6 * 128 * 64 * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"checkpoint_every": 7}, "Nearest valid: 8"),
        ({"micro_batch": 9}, "micro_batch is 9"),
        ({"dtype": "bf16"}, "bfloat16"),
        ({"learning_rate": 0.0}, "above 0"),
    ],
)
def test_settings_are_checked(tiny, settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**settings)


def test_settings_as_json(tiny):
    config = tiny(micro_batch=2)
    assert TrainConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="cannot be read"):
        TrainConfig.from_json("{}")


@pytest.mark.parametrize("changes", [{"mlp_width": 64}, {"layers": 1}, {"layers": 3}])
def test_a_start_of_other_sizes_is_refused(corpus, tiny, tmp_path, changes):
    config = tiny()
    Transformer(dataclasses.replace(config.model, **changes)).save(tmp_path / "other")
    with pytest.raises(ConfigError, match="do not have the same"):
        train(config, source(corpus, config), tmp_path / "run", device="cpu",
              start=tmp_path / "other")  # fmt: skip
