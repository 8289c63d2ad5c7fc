"""From a language model to losses per token, without a length x vocabulary tensor.

The model is run in two parts: the body (embeddings to last hidden states, where attention is) and
the head (hidden states to logits), the latter in chunks of positions. Losses are natural logs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError

__all__ = ["Agreement", "SplitModel", "agreement", "as_input_ids", "token_losses"]

Progress = Callable[[float], None]  # called with the share of the work that was just done


def as_input_ids(token_ids: Sequence[int] | Tensor, device: torch.device | str) -> Tensor:
    """Token ids as a (1, N) int64 tensor on `device`."""
    ids = torch.as_tensor(token_ids, dtype=torch.int64, device=device)
    return ids.reshape(1, -1)


class SplitModel:
    """A causal language model of transformers as body and head.

    The split is checked once against the whole model, because some models transform their logits
    in ways that only the whole knows.

    Args:
        model: a causal language model with `base_model` and output embeddings.
        chunk_size: positions per head call; 256 x 49,152 float32 logits are 50 MB.

    Raises:
        UnsupportedError: the model has no such split, or body and head do not give its logits.
    """

    def __init__(self, model: Any, *, chunk_size: int = 256) -> None:
        self.model = model
        self.chunk_size = chunk_size
        self.body = getattr(model, "base_model", None)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if self.body is None or self.body is model or head is None:
            raise UnsupportedError(
                f"model: {type(model).__name__} has no separate body and output embeddings. "
                "Allowed: causal language models of transformers (AutoModelForCausalLM). "
                "Load the model with its language-model head."
            )
        self._head = head
        config = model.config.get_text_config() if hasattr(model, "config") else None
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
        self._factor = getattr(config, "logit_scale", None) or 1.0  # Cohere
        self._check()

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    @property
    def vocabulary(self) -> int:
        """Number of token ids the model can read."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, *, progress: Progress | None = None) -> Tensor:
        """Last hidden states (N, width) of one sequence of token ids (1, N)."""
        assert self.body is not None
        handles = self._watch(progress) if progress else []
        try:
            result = self.body(input_ids=input_ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return result.last_hidden_state[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (M, vocabulary) in float32 (float64 for float64 models) for hidden states."""
        logits: Tensor = self._head(hidden)
        logits = logits.float() if logits.dtype != torch.float64 else logits
        logits = logits * (self._factor / self._divisor)
        if self._softcap:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def chunks(self, length: int) -> Iterator[slice]:
        """Slices of `chunk_size` positions that cover 0 .. length - 1."""
        for start in range(0, length, self.chunk_size):
            yield slice(start, min(start + self.chunk_size, length))

    def _watch(self, progress: Progress) -> list[Any]:
        """Report progress after each layer, where the layers can be found."""
        from torch.nn import ModuleList

        lists = [m for m in self.body.modules() if isinstance(m, ModuleList)] if self.body else []
        layers = max(lists, key=len, default=None)
        if layers is None or not len(layers):
            return []
        share = 1.0 / len(layers)
        return [
            layer.register_forward_hook(lambda *_: progress(share))
            for layer in layers  # the hooks of nested calls do not matter: layers are not nested
        ]

    def _check(self) -> None:
        ids = torch.arange(1, 9, device=self.device).remainder(self.vocabulary).reshape(1, -1)
        with torch.no_grad():
            whole = self.model(input_ids=ids, use_cache=False).logits[0].float()
        split = self.logits(self.hidden(ids)).float()
        size = whole.abs().max().clamp(min=1e-6)
        if split.shape != whole.shape or ((split - whole).abs().max() / size) > 0.02:
            raise UnsupportedError(
                f"model: the logits of {type(self.model).__name__} are not its output embeddings "
                "times its last hidden states. Allowed: models without a further transform. "
                "Evaluate this model with its own code."
            )


def check_token_ids(input_ids: Tensor, vocabulary: int) -> None:
    """Refuse ids that the model has no embedding for (a tokenizer of another model)."""
    highest = int(input_ids.max())
    if highest >= vocabulary:
        raise ConfigError(
            f"tokens: id {highest} came, but the model reads ids 0 .. {vocabulary - 1}. "
            "Allowed: ids of the model's own tokenizer. Load model and tokenizer together."
        )


@torch.no_grad()
def token_losses(
    split: SplitModel,
    input_ids: Tensor,
    *,
    hidden: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Negative log-likelihood, in nats, of tokens 1 .. N-1 given all before them: (N-1,) on CPU.

    Args:
        split: the model.
        input_ids: (1, N).
        hidden: last hidden states (N, width) if they are there already. Default: run the body.
        progress: called with shares of the work, which add up to 1.
    """
    check_token_ids(input_ids, split.vocabulary)
    count = input_ids.shape[1] - 1
    report = progress or (lambda share: None)
    if hidden is None:
        hidden = split.hidden(input_ids, progress=lambda share: report(0.8 * share))
        report_rest = 0.2
    else:
        report_rest = 1.0
    losses = torch.empty(count, dtype=torch.float64)
    for part in split.chunks(count):
        logits = split.logits(hidden[part])
        targets = input_ids[0, part.start + 1 : part.stop + 1]
        losses[part] = torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu()
        report(report_rest * (part.stop - part.start) / count)
    return losses


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How the predictions of a changed model compare with those of the exact one.

    losses: (N-1,) nats per token of the changed model, float64 on CPU.
    kl: mean over positions of KL(exact || changed) of the next-token distributions, nats.
    top1: share of positions where both rank the same token first.
    kl_by_position: (N-1,) the KL divergence of each position.
    """

    losses: Tensor
    kl: float
    top1: float
    kl_by_position: Tensor


@torch.no_grad()
def agreement(
    split: SplitModel,
    input_ids: Tensor,
    exact_hidden: Tensor,
    hidden: Tensor,
    *,
    progress: Progress | None = None,
) -> Agreement:
    """Compare two sets of last hidden states of the same tokens, position by position.

    Logits are recomputed chunk by chunk from both, so that memory stays at one chunk whatever the
    length: keeping hidden states instead of log-probabilities is smaller by vocabulary / width.

    Args:
        split: the model whose head turns hidden states into logits.
        input_ids: (1, N).
        exact_hidden: (N, width) under exact attention.
        hidden: (N, width) under the mechanism.
        progress: called with shares of the work, which add up to 1.
    """
    count = input_ids.shape[1] - 1
    losses = torch.empty(count, dtype=torch.float64)
    divergence = torch.empty(count, dtype=torch.float64)
    same = 0
    for part in split.chunks(count):
        log_p = torch.log_softmax(split.logits(exact_hidden[part]), dim=-1)
        log_q = torch.log_softmax(split.logits(hidden[part]), dim=-1)
        targets = input_ids[0, part.start + 1 : part.stop + 1]
        losses[part] = -log_q.gather(1, targets[:, None])[:, 0].cpu().double()
        same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        # Rounding can give -1e-7 where both agree; a divergence is not negative.
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).cpu().double()
        divergence[part] = kl.clamp(min=0.0)
        if progress:
            progress((part.stop - part.start) / count)
    return Agreement(
        losses=losses,
        kl=float(divergence.mean()),
        top1=same / count,
        kl_by_position=divergence,
    )
