"""Continue token sequences with the reference transformer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from .transformer import Transformer

__all__ = ["choose", "generate"]


@torch.no_grad()
def generate(
    model: Transformer,
    token_ids: Tensor,
    num_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Append `num_tokens` tokens to each prompt.

    Args:
        model: keeps its state between tokens: a window, or all keys and values.
        token_ids: (B, N), int64, N >= 1: prompts of one length.
        num_tokens: how many to append.
        temperature: 0 takes the likeliest token; else logits are divided by it and one is drawn.
        top_k: draw among the k likeliest tokens only.
        seed: needed for drawing. Row b draws with seed + b, whatever its neighbours are.
        chunk_size: read the prompt in chunks of so many tokens, for less memory.

    Returns:
        (B, N + num_tokens), int64: prompts and their continuations.

    Raises:
        ConfigError: an empty prompt, a temperature below 0, drawing without a seed, or
            `top_k` below 1.
    """
    if token_ids.ndim != 2 or token_ids.shape[1] == 0:
        raise ConfigError(
            f"generate: token_ids has shape {tuple(token_ids.shape)}; it must be (B, N) with at "
            "least one token. Start with a token that begins a text, e.g. <bos>."
        )
    check_drawing(temperature, top_k, seed)
    generators = [torch.Generator().manual_seed((seed or 0) + b) for b in range(len(token_ids))]
    state, logits = None, None
    for chunk in torch.split(token_ids, chunk_size or token_ids.shape[1], dim=1):
        logits, state = model.forward_chunk(chunk, state, num_logits=1)
    tokens = [token_ids]
    for step in range(num_tokens):
        assert logits is not None, "the prompt has a token"
        tokens.append(choose(logits[:, -1], temperature, top_k, generators))
        if step + 1 < num_tokens:
            logits, state = model.forward_chunk(tokens[-1], state)
    return torch.cat(tokens, dim=1)


def choose(
    logits: Tensor, temperature: float, top_k: int | None, generators: list[torch.Generator]
) -> Tensor:
    """(B, 1) token ids from logits (B, vocab_size).

    Drawn in float64 on the CPU, so that a seed means the same everywhere.
    """
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True)
    scores = logits.double().cpu() / temperature
    if top_k is not None:
        least = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    rows = zip(scores.softmax(-1), generators, strict=True)
    drawn = torch.stack([torch.multinomial(row, 1, generator=g) for row, g in rows])
    return drawn.to(logits.device)


def check_drawing(temperature: float, top_k: int | None, seed: int | None) -> None:
    """Refuse settings that no token can be chosen by."""
    if temperature < 0:
        raise ConfigError(f"generate: temperature is {temperature}; it must be at least 0.0.")
    if temperature > 0 and seed is None:
        raise ConfigError(
            f"generate: temperature is {temperature} but seed is None; drawing needs a seed, so "
            "that it can be repeated. Pass seed=0, or temperature=0.0 for the likeliest token."
        )
    if top_k is not None and top_k < 1:
        raise ConfigError(f"generate: top_k is {top_k}; it must be at least 1, or None for all.")
