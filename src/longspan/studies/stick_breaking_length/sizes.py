"""How large the study is: models, lengths, texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...models.transformer_config import TransformerConfig
from ...train.config import TrainConfig
from .recall import VOCABULARY
from .variants import VARIANTS

__all__ = ["FULL", "SMALL", "Sizes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Everything that `--small` changes; the number of steps follows the budget.

    model, sibling: sizes of the compared models and of the small ones that are kept. length: of
    training. batch_size: sequences per step. learning_rate, sibling_rate: peaks; not tuned per
    variant. sibling_factor: steps of the small models, over those of the compared ones. lengths:
    evaluated. windows_per_book: of the longest length. training_share: of the budget, for the
    compared models. calibration_steps: that measure a step.
    recall_model, recall_pairs (trained), recall_tests (evaluated), recall_batch, recall_steps (per
    minute of budget), recall_sequences (per test), recall_rate.
    speed_lengths: of the early-stop measurement. span_length: of the span statistics.
    """

    model: dict[str, int]
    sibling: dict[str, int]
    length: int
    batch_size: int
    learning_rate: float
    sibling_rate: float
    sibling_factor: int
    lengths: tuple[int, ...]
    windows_per_book: int
    training_share: float
    calibration_steps: int
    log_every: int
    recall_model: dict[str, int]
    recall_pairs: tuple[int, ...]
    recall_tests: tuple[int, ...]
    recall_batch: int
    recall_steps: int
    recall_sequences: int
    recall_rate: float
    speed_lengths: tuple[int, ...]
    span_length: int

    def train_config(
        self, variant: str, vocab_size: int, *, steps: int, dtype: str, compile: bool
    ) -> TrainConfig:
        """Of a compared model."""
        model = self._model(self.model, variant, vocab_size)
        return self._train_config(model, self.learning_rate, steps, dtype, compile)

    def sibling_config(
        self, variant: str, vocab_size: int, *, steps: int, dtype: str, compile: bool
    ) -> TrainConfig:
        """Of a small model that is kept."""
        model = self._model(self.sibling, variant, vocab_size)
        return self._train_config(model, self.sibling_rate, steps, dtype, compile)

    def recall_config(self, variant: str, *, steps: int, dtype: str) -> TrainConfig:
        """Of a model that learns recall. Not compiled: its lengths change from step to step."""
        model = self._model(self.recall_model, variant, VOCABULARY)
        every = max(1, steps // 20)
        return TrainConfig(
            model=model,
            steps=steps,
            length=2 * self.recall_pairs[-1],
            batch_size=self.recall_batch,
            learning_rate=self.recall_rate,
            warmup_steps=max(1, steps // 10),
            dtype=dtype,
            log_every=every,
            checkpoint_every=every * 10,
        )

    def _train_config(
        self, model: TransformerConfig, rate: float, steps: int, dtype: str, compile: bool
    ) -> TrainConfig:
        return TrainConfig(
            model=model,
            steps=steps,
            length=self.length,
            batch_size=self.batch_size,
            learning_rate=rate,
            warmup_steps=max(1, steps // 10),
            dtype=dtype,
            compile=compile,
            log_every=self.log_every,
            checkpoint_every=20 * self.log_every,
        )

    def _model(self, sizes: dict[str, Any], variant: str, vocab_size: int) -> TransformerConfig:
        return TransformerConfig(vocab_size=vocab_size, **sizes, **VARIANTS[variant].settings)


FULL = Sizes(
    model={"width": 512, "layers": 6, "heads": 8, "mlp_width": 1408},
    sibling={"width": 192, "layers": 5, "heads": 3, "mlp_width": 512},
    length=2048,
    batch_size=32,
    learning_rate=2e-3,
    sibling_rate=4e-3,
    sibling_factor=2,
    lengths=(2048, 4096, 8192, 16384, 32768),
    windows_per_book=2,
    training_share=0.55,
    calibration_steps=20,
    log_every=10,
    recall_model={"width": 128, "layers": 2, "heads": 1},
    recall_pairs=(8, 16, 32, 64, 96, 128, 192),
    recall_tests=(32, 64, 128, 192, 256, 384, 512),
    recall_batch=256,
    recall_steps=200,
    recall_sequences=64,
    recall_rate=4e-3,
    speed_lengths=(2048, 8192, 32768, 131072),
    span_length=8192,
)

SMALL = Sizes(
    model={"width": 64, "layers": 2, "heads": 2},
    sibling={"width": 32, "layers": 2, "heads": 2},
    length=128,
    batch_size=4,
    learning_rate=4e-3,
    sibling_rate=4e-3,
    sibling_factor=1,
    lengths=(128, 256, 512),
    windows_per_book=1,
    training_share=0.4,
    calibration_steps=4,
    log_every=2,
    recall_model={"width": 32, "layers": 2, "heads": 1},
    recall_pairs=(4, 8),
    recall_tests=(4, 8, 16),
    recall_batch=8,
    recall_steps=40,
    recall_sequences=8,
    recall_rate=2e-3,
    speed_lengths=(128, 512),
    span_length=256,
)
