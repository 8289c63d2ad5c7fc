"""Tiny random models whose attention matters: large weights, two to four layers, width 32."""

from __future__ import annotations

import torch
import transformers

COMMON = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
KINDS = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_sliding": ("Mistral", {"sliding_window": 5}),
    "gemma3": ("Gemma3Text", {
        "head_dim": 8, "num_hidden_layers": 4, "layer_types": ALTERNATING, "sliding_window": 5,
        "query_pre_attn_scalar": 8,
    }),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": None}),
    "phi": ("Phi", {}),
    "glm4": ("Glm4", {"head_dim": 8}),
}  # fmt: skip


def tiny(kind="llama", *, attention="eager", **changes):
    """A model in eval mode; same kind and changes, same weights."""
    name, own = KINDS[kind]
    settings = {**COMMON, **own, **changes}
    settings = {key: value for key, value in settings.items() if value is not None or key in own}
    if kind == "gpt_neox":
        settings.pop("num_key_value_heads")
    config = getattr(transformers, f"{name}Config")(**settings, attn_implementation=attention)
    model_name = name.removesuffix("Text")
    torch.manual_seed(7)
    return getattr(transformers, f"{model_name}ForCausalLM")(config).eval()


def tokens(batch=2, length=14, seed=3):
    """Token ids without the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 60, (batch, length), generator=generator)


def padded(kind, batch=3, length=14):
    """Attention masks: left padding, right padding, both; the last row is never padded."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    if kind in ("left", "both"):
        mask[0, :5] = 0
        mask[1, :1] = 0
    if kind in ("right", "both"):
        mask[0, length - 3 :] = 0
        mask[1, length - 6 :] = 0
    return mask


def positions(mask):
    """Position ids that count real tokens, as generate() makes them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def distance(actual, expected, mask=None):
    """Largest difference over the real tokens."""
    difference = (actual - expected).abs().amax(-1)
    return float((difference if mask is None else difference[mask.bool()]).max().detach())
