"""How much arithmetic a training step is, and what share of the device's peak that makes."""

from __future__ import annotations

import torch

from ..models.transformer_config import TransformerConfig

__all__ = ["model_flops_per_token", "peak_flops"]

# Dense bfloat16 products per second, from the vendor's data sheets (without sparsity).
_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def model_flops_per_token(config: TransformerConfig, num_parameters: int, length: int) -> float:
    """Floating-point operations per trained token, forward and backward, without recomputation.

    6 per parameter that is multiplied (an untied embedding is only looked up), and 6 N H D per
    layer for causal scores and weighted values over N / 2 keys on average. The same count for all
    mechanisms: what a kernel computes beyond it is its own affair.
    """
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.width
    attention = 6 * length * config.heads * config.head_size * config.layers
    return 6.0 * (num_parameters - looked_up) + attention


def peak_flops(device: torch.device) -> float | None:
    """Peak of the device in bfloat16, or None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAKS.items() if key in name), None)
