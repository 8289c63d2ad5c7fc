"""Tiny random transformers models and a byte-level tokenizer: no download, same weights by seed.

transformers and tokenizers (`pip install 'longspan[hf]'`) are imported when a model is asked for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import ConfigError, MissingExtraError, nearest_name

__all__ = ["TINY_ARCHITECTURES", "TinyModel", "byte_tokenizer", "save_tiny_model", "tiny_model"]

TINY_ARCHITECTURES = ("gemma3", "gpt2", "llama", "mistral", "qwen2", "qwen3")
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"  # ids 256, 257, 258: byte b has id b


class TinyModel(NamedTuple):
    """A transformers causal language model in eval mode, and its tokenizer."""

    model: Any
    tokenizer: Any


def byte_tokenizer(*, add_bos: bool = False) -> Any:
    """A PreTrainedTokenizerFast whose ids 0..255 are the bytes of UTF-8, without merges.

    Args:
        add_bos: `tokenizer(text)` starts with <bos> (id 256), as Gemma's does.

    Returns:
        The tokenizer; `save_pretrained(folder)` and `AutoTokenizer.from_pretrained(folder)` work.
    """
    transformers = _transformers()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([BOS, EOS, PAD])
    if add_bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, len(vocabulary))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def tiny_model(
    arch: str = "llama",
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    width: int = 32,
    max_length: int = 4096,
    window: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    add_bos: bool = False,
    seed: int = 0,
) -> TinyModel:
    """A random model of a few thousand parameters with a byte-level tokenizer.

    Args:
        arch: one of TINY_ARCHITECTURES.
        layers, heads, kv_heads, head_dim, width: sizes. gpt2 has no kv_heads, and its head_dim
            is width / heads.
        max_length: context written into the config.
        window: sliding window of mistral, and of the local layers of gemma3 (every layer but each
            second one); the others attend to everything.
        dtype, device: of the weights; drawn in float32 on the CPU, so equal up to rounding.
        add_bos: the tokenizer puts <bos> in front.
        seed: same seed, same weights; the global random state is left as it was.

    Returns:
        TinyModel(model, tokenizer).

    Raises:
        ConfigError: unknown `arch`.
        MissingExtraError: transformers is not installed.

    Example:
        >>> model, tokenizer = tiny_model("qwen3", seed=1)
        >>> model(**tokenizer("hello", return_tensors="pt")).logits.shape
        torch.Size([1, 5, 259])
    """
    if arch not in TINY_ARCHITECTURES:
        raise ConfigError(f"tiny_model: arch is {arch!r}. {nearest_name(arch, TINY_ARCHITECTURES)}")
    transformers = _transformers()
    tokenizer = byte_tokenizer(add_bos=add_bos)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_length,
        "initializer_range": 0.2,  # the usual 0.02 leaves so small a model with flat attention
        **special,
    }
    if arch == "llama":
        config = transformers.LlamaConfig(**common)
    elif arch == "mistral":
        config = transformers.MistralConfig(**common, sliding_window=window)
    elif arch == "qwen2":
        config = transformers.Qwen2Config(**common)
    elif arch == "qwen3":
        config = transformers.Qwen3Config(**common)
    elif arch == "gemma3":
        kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
        config = transformers.Gemma3TextConfig(
            **common, sliding_window=window, layer_types=kinds, query_pre_attn_scalar=head_dim
        )
    else:
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            n_positions=max_length,
            initializer_range=0.2,
            **special,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return TinyModel(model.to(device=device, dtype=dtype).eval(), tokenizer)


def save_tiny_model(folder: str | os.PathLike[str], arch: str = "llama", **settings: Any) -> Path:
    """Write `tiny_model(arch, **settings)` as a folder that `from_pretrained` reads.

    Args:
        folder: made if missing; holds config.json, model.safetensors and the tokenizer files.
        arch, **settings: as for `tiny_model`.

    Returns:
        The folder.
    """
    target = Path(folder)
    model, tokenizer = tiny_model(arch, **settings)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def _byte_symbols() -> list[str]:
    """The printable character by which byte-level tokenizers spell each byte, in byte order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtraError.for_module("longspan.testing", "transformers", "hf") from None
    return transformers
