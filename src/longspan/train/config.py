"""Settings of a training run, checked when built, kept as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from ..errors import ConfigError, nearest_name
from ..models.transformer_config import TransformerConfig

__all__ = ["DTYPES", "TrainConfig"]

DTYPES = ("float32", "bfloat16")
_FORMAT = "longspan-train-1"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How a model is trained.

    model: what is trained. steps: optimizer steps. length: tokens per sequence. batch_size:
    sequences per step, over all processes. micro_batch: sequences at a time in one process
    (gradients add up); default: all of them.
    learning_rate: its peak, after `warmup_steps` of linear growth; then it falls linearly to
    `final_fraction` of the peak at the last step. weight_decay: of matrices. clip_norm: of the
    gradient. AdamW with betas 0.9 and 0.95.
    seed: of weights and order of batches. dtype: "bfloat16" computes matrix products in it (weights
    stay float32). compile: use torch.compile on each block and on the loss.
    log_every, checkpoint_every: in steps; the second is a multiple of the first.
    """

    model: TransformerConfig
    steps: int
    length: int = 2048
    batch_size: int = 32
    micro_batch: int | None = None
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    final_fraction: float = 0.0
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    compile: bool = False
    log_every: int = 10
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "length", "batch_size", "log_every", "checkpoint_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"TrainConfig: {name} is {value!r}; it must be an int of at least 1."
                )
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch_size:
            raise ConfigError(
                f"TrainConfig: micro_batch is {self.micro_batch!r}; it must lie between 1 and "
                f"batch_size = {self.batch_size}, or be None for all sequences at once."
            )
        if self.checkpoint_every % self.log_every:
            nearest = -(-self.checkpoint_every // self.log_every) * self.log_every
            raise ConfigError(
                f"TrainConfig: checkpoint_every is {self.checkpoint_every}; it must be a multiple "
                f"of log_every = {self.log_every}, so that a resumed log has the same rows. "
                f"Nearest valid: {nearest}."
            )
        if not self.learning_rate > 0:
            raise ConfigError(
                f"TrainConfig: learning_rate is {self.learning_rate!r}; it must be above 0. Use "
                "for example 2e-3 for a model of 20 million parameters."
            )
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"TrainConfig: dtype is {self.dtype!r}. {nearest_name(str(self.dtype), DTYPES)}"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads."""
        return self.length * self.batch_size

    def learning_rate_at(self, step: int) -> float:
        """Of a step, counted from 0."""
        warmup = min(self.warmup_steps, self.steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        left = (self.steps - step) / max(self.steps - warmup, 1)
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * left)

    def to_json(self) -> str:
        """All settings; `from_json` reads them back."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        settings["model"] = json.loads(self.model.to_json())
        return json.dumps({"format": _FORMAT, **settings}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Read what `to_json` wrote; ConfigError if it is something else."""
        try:
            settings = json.loads(text)
            if settings.pop("format", None) != _FORMAT:
                raise ValueError("another format")
            settings["model"] = TransformerConfig.from_json(json.dumps(settings["model"]))
            return cls(**settings)
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"TrainConfig: the JSON cannot be read ({error}). Allowed: a train.json that a "
                "run of this version wrote. Start in an empty folder."
            ) from error
