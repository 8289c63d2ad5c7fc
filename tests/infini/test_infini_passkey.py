"""A toy passkey: two digits hidden in an earlier segment, asked for at the end.

With gradients through the memory a model of 40,000 parameters learns it in seconds; with the same
model, data and steps, but states detached between segments, it does not.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longspan import InfiniConfig
from longspan.nn import InfiniAttention, gate_parameter_groups, gate_statistics

SEGMENT, DIGITS, STEPS = 16, 2, 250
MARKER, QUESTION, FILLER, VOCABULARY = 10, 11, 12, 20


def prompts(count, segments, generator):
    """Tokens (count, segments * SEGMENT), which end in the question and its digits; the digits."""
    length = segments * SEGMENT
    tokens = (FILLER + torch.arange(length) % 8).repeat(count, 1)
    digits = torch.randint(0, 10, (count, DIGITS), generator=generator)
    last = length - SEGMENT - DIGITS - 1
    start = torch.randint(0, last, (count,), generator=generator)  # not in the last segment
    rows = torch.arange(count)
    tokens[rows, start] = MARKER
    for j in range(DIGITS):
        tokens[rows, start + 1 + j] = digits[:, j]
    tokens[:, length - DIGITS - 1] = QUESTION
    tokens[:, length - DIGITS :] = digits
    return tokens, digits


class Block(nn.Module):
    def __init__(self, width, update, bptt_segments):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.attention = InfiniAttention(
            width, 2, config=InfiniConfig(segment_length=SEGMENT, update=update), rope_base=100.0,
            gate_start="zero", bptt_segments=bptt_segments,
        )  # fmt: skip
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Toy(nn.Sequential):
    def __init__(self, update, bptt_segments, width=48):
        super().__init__(
            nn.Embedding(VOCABULARY, width),
            *(Block(width, update, bptt_segments) for _ in range(2)),
            nn.RMSNorm(width),
            nn.Linear(width, VOCABULARY),
        )


def train(update, bptt_segments):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Toy(update, bptt_segments)
    optimizer = torch.optim.AdamW(
        gate_parameter_groups(model, lr=3e-3, gate_lr=3e-3), betas=(0.9, 0.98)
    )
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 50))
    for _ in range(STEPS):
        segments = 2 + int(torch.randint(0, 3, (1,), generator=generator))
        tokens, digits = prompts(32, segments, generator)
        logits = model(tokens[:, :-1])
        answer = F.cross_entropy(logits[:, -DIGITS:].flatten(0, 1), digits.flatten())
        text = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        (answer + 0.1 * text).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm.step()
    return model


@torch.no_grad()
def exact_match(model, segments):
    tokens, digits = prompts(200, segments, torch.Generator().manual_seed(9))
    guess = model(tokens[:, :-1])[:, -DIGITS:].argmax(-1)
    return float((guess == digits).all(1).float().mean())


@pytest.mark.parametrize("update", ["linear", pytest.param("delta", marks=pytest.mark.slow)])
def test_memory_retrieves_and_the_detached_control_does_not(update):
    model = train(update, None)
    assert exact_match(model, 4) >= 0.85
    assert exact_match(model, 8) >= 0.6  # twice the longest training prompt
    shares = gate_statistics(model)
    assert any(abs(layer["max"] - 0.5) > 0.02 for layer in shares.values())  # gates have moved
    with torch.no_grad():  # without the memory nothing outside of the last segment is known
        for block in (model[1], model[2]):
            block.attention.gate.fill_(-1e9)
    assert exact_match(model, 4) <= 0.1
    assert exact_match(train(update, 1), 4) <= 0.25
