"""Sizes of the study: the model, the curriculum, and what is asked."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL", "SMALL", "PasskeySizes", "Stage"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stretch of the training: its share of the steps, segment length and sequence length."""

    share: float
    segment: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PasskeySizes:
    """model: of the transformer. stages: of training; all but the last have short segments, so
    that a step sees many keys. tokens_per_step: sequences per step follow from the length.

    learning_rate: its peak. gate_rate: of the gates, constant. warmup: steps. copy_weight: of the
    loss on the second mention of the key in the needle; text_weight: of the loss on text_places
    drawn places of each sequence. book_share: of sequences whose filler is natural text.
    steps: where no budget is given; step_share: share of a budget for training.

    trials: prompts per cell, by length; its lengths are those that are asked. book_lengths: of
    them, those with natural text. full_lengths: those that full attention is asked at.
    control_lengths: those for forced-local gates and detached memories after the first seed.
    chunk_tokens: tokens of all rows of a stream at a time.
    """

    model: dict[str, int]
    stages: tuple[Stage, ...]
    tokens_per_step: int
    learning_rate: float
    gate_rate: float
    warmup: int
    copy_weight: float
    text_weight: float
    text_places: int
    book_share: float
    steps: int
    step_share: float
    trials: dict[int, int]
    book_lengths: tuple[int, ...]
    full_lengths: tuple[int, ...]
    control_lengths: tuple[int, ...]
    seeds: tuple[int, ...]
    chunk_tokens: int
    log_every: int
    checkpoint_every: int

    @property
    def train_length(self) -> int:
        """Longest sequence of training."""
        return max(stage.length for stage in self.stages)

    @property
    def segment(self) -> int:
        """Of the last stage, and of everything that is asked."""
        return self.stages[-1].segment

    def stage_at(self, step: int, steps: int) -> Stage:
        """The stage of a step, counted from 0."""
        done = 0.0
        for stage in self.stages:
            done += stage.share
            if step < round(done * steps):
                return stage
        return self.stages[-1]


FULL = PasskeySizes(
    model={"width": 128, "layers": 3, "heads": 4, "head_dim": 64},
    stages=(
        Stage(share=0.25, segment=32, length=192),
        Stage(share=0.15, segment=64, length=512),
        Stage(share=0.15, segment=128, length=1280),
        Stage(share=0.15, segment=256, length=2560),
        Stage(share=0.30, segment=512, length=5120),
    ),
    tokens_per_step=40_960,
    learning_rate=3e-3,
    gate_rate=3e-3,
    warmup=100,
    copy_weight=0.2,
    text_weight=0.1,
    text_places=16,
    book_share=0.5,
    steps=2000,
    step_share=0.55,
    trials={5_120: 100, 32_768: 50, 131_072: 25, 524_288: 10, 1_048_576: 10},
    book_lengths=(5_120, 32_768, 131_072, 524_288, 1_048_576),
    full_lengths=(5_120, 32_768),
    control_lengths=(5_120, 32_768, 1_048_576),
    seeds=(0, 1, 2),
    chunk_tokens=1 << 18,
    log_every=20,
    checkpoint_every=200,
)

SMALL = PasskeySizes(
    model={"width": 64, "layers": 3, "heads": 2, "head_dim": 32},
    stages=(
        Stage(share=0.6, segment=32, length=192),
        Stage(share=0.4, segment=32, length=320),
    ),
    tokens_per_step=4096,
    learning_rate=3e-3,
    gate_rate=3e-3,
    warmup=100,
    copy_weight=0.2,
    text_weight=0.1,
    text_places=16,
    book_share=0.25,
    steps=600,
    step_share=0.6,
    trials={320: 50, 2048: 50, 8192: 20, 65_536: 10},
    book_lengths=(320, 2048),
    full_lengths=(320, 2048),
    control_lengths=(320, 2048),
    seeds=(0, 1, 2),
    chunk_tokens=1 << 14,
    log_every=20,
    checkpoint_every=60,
)
