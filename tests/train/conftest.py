"""A small corpus and a run that trains on it in seconds."""

import numpy as np
import pytest

from longspan.models import TransformerConfig
from longspan.train import TokenFile, TrainConfig


@pytest.fixture
def corpus():
    """Tokens with something to learn: each is the one before plus a slowly changing number."""
    draw = np.random.Generator(np.random.Philox(key=[5, 0]))
    steps = np.repeat(draw.integers(1, 4, size=400), 20)
    ids = (np.cumsum(steps) % 31 + 1).astype(np.uint16)
    return TokenFile(
        ids=ids, starts=(0,), names=("drawn",), num_bytes=(len(ids),), vocab_size=32,
        tokenizer_sha256="", sha256="",
    )  # fmt: skip


@pytest.fixture
def tiny():
    def make(**settings):
        model = TransformerConfig(vocab_size=32, width=32, layers=2, heads=2)
        defaults = {
            "model": model, "steps": 24, "length": 32, "batch_size": 4, "log_every": 2,
            "checkpoint_every": 6, "warmup_steps": 4, "learning_rate": 3e-3,
        }  # fmt: skip
        return TrainConfig(**{**defaults, **settings})

    return make
