"""A reference transformer as a model of transformers, so that every tool of longspan reads it.

Norms, SwiGLU and rotary pairs are those of Llama, so weights move over unchanged. Mechanisms other
than softmax stay on the model as its own attention, and positions that it never had are taken out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..exact.config import ExactConfig
from .shipped import tokenizer_of
from .transformer import Transformer

__all__ = ["load_as_llama", "to_llama"]

_PARTS = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_ROPE_LENGTH = 2048  # shown as max_position_embeddings; nothing is cut off there


def load_as_llama(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer of transformers from a folder of `longspan train` or of the package.

    Raises:
        ConfigError: no tokenizer.
        UnsupportedError: a model that Llama has no form for.
    """
    from transformers import PreTrainedTokenizerFast

    path = tokenizer_of(folder)
    if path is None:
        raise ConfigError(
            f"model: {folder} has no tokenizer.json. Allowed: a model folder of longspan train, "
            "which has one. Copy it from the run."
        )
    model = to_llama(Transformer.load(folder).to(dtype))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    return model, tokenizer


def to_llama(model: Transformer) -> Any:
    """A LlamaForCausalLM that computes the same logits.

    Raises:
        UnsupportedError: positions "alibi" or "forget", scaled rotary frequencies, norms of
            queries and keys, or a gated-delta memory, whose rates are projections of their own.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    attention = config.attention
    if (
        config.positions not in ("rope", "none")
        or config.rope_scaling is not None
        or config.qk_norm
        or isinstance(attention, tuple)
        or getattr(attention, "update", None) == "gated_delta"
    ):
        raise UnsupportedError(
            f"model: positions={config.positions!r}, rope_scaling={config.rope_scaling!r}, "
            f"qk_norm={config.qk_norm}, attention={attention} came. Llama has a form for "
            "positions 'rope' and 'none' without scaling and norms of queries, and one attention "
            "for all layers, not with update='gated_delta'. Use longspan.models.Transformer.load "
            "for this model."
        )
    settings = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_size,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=_ROPE_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=0,
        eos_token_id=0,
    )
    llama = LlamaForCausalLM(settings).to(model.embedding.weight.dtype)
    llama.load_state_dict(_rename(model.state_dict()), strict=True)
    llama.eval()
    if config.positions == "none" or not isinstance(attention, ExactConfig):
        from ..hf.native import NativeAttention

        learned = {
            f"model.layers.{name.split('.')[1]}.self_attn.{name.rpartition('.')[2]}": tensor
            for name, tensor in model.state_dict().items()
            if _is_learned(name)
        }
        NativeAttention(llama, attention, no_positions=config.positions == "none", learned=learned)
    return llama


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {
        "model.embed_tokens.weight": state["embedding.weight"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["head.weight"],
    }
    for name, tensor in state.items():
        if name.startswith("blocks.") and not _is_learned(name):
            _, layer, part = name.split(".", 2)
            part = part.removesuffix(".weight")
            renamed[f"model.layers.{layer}.{_PARTS[part]}.weight"] = tensor
    return renamed


def _is_learned(name: str) -> bool:
    """Whether a parameter belongs to a mechanism: a gate."""
    return name.rpartition(".")[2].startswith("longspan_")
