"""ChatGLM2, ChatGLM3 and Baichuan folders as models of transformers: same weights, same numbers.

Their own modules come as code beside the weights, which longspan never runs and whose attention no
patch reaches. The arithmetic is that of GLM and Llama in transformers; weights move over unchanged,
apart from projections that are stored as one matrix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, MissingExtraError
from .convert import require_weights

__all__ = ["SentencePieces", "is_foreign", "load_foreign"]

_NORM_HEAD_VOCABULARY = 125_696  # Baichuan 2 divides each row of its output matrix by its length


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds a model of a kind that `load_foreign` reads."""
    return _settings(folder).get("model_type") in _KINDS


def load_foreign(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model of transformers and a tokenizer from the folder that its authors publish.

    Args:
        folder: of ChatGLM2-6B, ChatGLM3-6B (also the 32k ones; they become GLM), Baichuan-7B or
            Baichuan2-7B (they become Llama): config.json, *.safetensors or *.bin, tokenizer.model.
        dtype: of the weights.

    Returns:
        The model, and `SentencePieces`.

    Raises:
        ConfigError: a size or setting that the target has no form for, or missing weights.
        MissingExtraError: sentencepiece is not installed.

    Semantics:
        rope_ratio stretches positions in ChatGLM2 and the base of the angles in ChatGLM3 and
        later; ChatGLM2 is known by "chatglm2" in the config's _name_or_path or the folder's name.

    Cost:
        The weights are read once, mapped from the files; about their size in memory.
    """
    settings = _settings(folder)
    tokenizer = SentencePieces.open(folder, str(settings["model_type"]))
    model_class, config, tensors = _KINDS[settings["model_type"]](folder, settings)
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    require_weights(folder.name, model, report)
    return model, tokenizer


class SentencePieces:
    """A sentencepiece model behind the calls that longspan's measurements make of a tokenizer.

    Args:
        pieces: a SentencePieceProcessor.
        prefix: ids in front of every text, unless add_special_tokens is False.
    """

    def __init__(self, pieces: Any, prefix: tuple[int, ...] = ()) -> None:
        self.pieces, self.prefix = pieces, prefix
        self.bos_token_id = pieces.bos_id() if pieces.bos_id() >= 0 else None
        self.eos_token_id = pieces.eos_id() if pieces.eos_id() >= 0 else None

    @classmethod
    def open(cls, folder: Path, kind: str) -> SentencePieces:
        """Read tokenizer.model; ChatGLM's texts begin with [gMASK] and sop."""
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise MissingExtraError(
                "ChatGLM and Baichuan need the package 'sentencepiece', which is not installed. "
                "Install it with: pip install sentencepiece"
            ) from error
        path = folder / "tokenizer.model"
        try:
            pieces = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"model: {path} cannot be read ({str(error).splitlines()[0]}). Allowed: the "
                "sentencepiece model of ChatGLM2, ChatGLM3 or Baichuan. Copy it again; for GLM-4 "
                "use its folder for transformers, such as zai-org/glm-4-9b-hf."
            ) from error
        size = pieces.get_piece_size()
        # Behind the pieces: [MASK], [gMASK], [sMASK], sop, eop.
        return cls(pieces, (size + 1, size + 3) if kind == "chatglm" else ())

    def __call__(
        self, text: str, *, return_tensors: str | None = None, add_special_tokens: bool = True
    ) -> dict[str, Any]:
        """{"input_ids": list of ids, or (1, N) int64 for return_tensors="pt"}."""
        ids = [*(self.prefix if add_special_tokens else ()), *self.pieces.encode(text)]
        return {"input_ids": torch.tensor([ids]) if return_tensors == "pt" else ids}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text."""
        return list(self(text, add_special_tokens=add_special_tokens)["input_ids"])

    def decode(self, ids: Any, **settings: Any) -> str:
        """Text of ids; special ones are left out."""
        rows = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        return str(self.pieces.decode([i for i in rows if i < self.pieces.get_piece_size()]))


def _chatglm(folder: Path, settings: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Tensor]]:
    from transformers import GlmConfig, GlmForCausalLM

    _require(folder, settings, {
        "rmsnorm": True, "add_bias_linear": False, "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
    }, ("hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads", "kv_channels",
        "padded_vocab_size", "layernorm_epsilon"))  # fmt: skip
    heads, size = settings["num_attention_heads"], settings["kv_channels"]
    groups = settings["multi_query_group_num"] if settings.get("multi_query_attention") else heads
    ratio = float(settings.get("rope_ratio") or 1.0)
    names = f"{settings.get('_name_or_path', '')} {folder.name}".lower()
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
    if ratio != 1.0 and "chatglm2" in names:
        rope |= {"rope_type": "linear", "factor": ratio}
    else:
        rope["rope_theta"] *= ratio
    config = GlmConfig(
        vocab_size=settings["padded_vocab_size"],
        hidden_size=settings["hidden_size"],
        intermediate_size=settings["ffn_hidden_size"],
        num_hidden_layers=settings["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=size,
        attention_bias=bool(settings.get("add_qkv_bias")),
        rms_norm_eps=settings["layernorm_epsilon"],
        max_position_embeddings=settings.get("seq_length", 32_768),
        rope_parameters={**rope, "partial_rotary_factor": 0.5},
        tie_word_embeddings=False,
        pad_token_id=settings.get("pad_token_id"),
        eos_token_id=settings.get("eos_token_id"),
    )
    named = {
        "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "transformer.encoder.final_layernorm.weight": "model.norm.weight",
        "transformer.output_layer.weight": "lm_head.weight",
        "self_attention.dense.": "self_attn.o_proj.",
        "mlp.dense_h_to_4h.": "mlp.gate_up_proj.",
        "mlp.dense_4h_to_h.": "mlp.down_proj.",
        "transformer.encoder.layers.": "model.layers.",
    }
    parts = {"q_proj": heads * size, "k_proj": groups * size, "v_proj": groups * size}
    tensors = _moved(_weights(folder), named, "self_attention.query_key_value.", parts)
    return GlmForCausalLM, config, tensors


def _baichuan(folder: Path, settings: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    _require(folder, settings, {"hidden_act": "silu"}, (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "rms_norm_eps", "max_position_embeddings",
    ))  # fmt: skip
    width = settings["hidden_size"]
    config = LlamaConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=width,
        intermediate_size=settings["intermediate_size"],
        num_hidden_layers=settings["num_hidden_layers"],
        num_attention_heads=settings["num_attention_heads"],
        num_key_value_heads=settings["num_attention_heads"],
        rms_norm_eps=settings["rms_norm_eps"],
        max_position_embeddings=settings["max_position_embeddings"],
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attention_bias=False,
        tie_word_embeddings=False,
        bos_token_id=settings.get("bos_token_id"),
        eos_token_id=settings.get("eos_token_id"),
        pad_token_id=settings.get("pad_token_id"),
    )
    parts = {name: width for name in ("q_proj", "k_proj", "v_proj")}
    tensors = _moved(_weights(folder), {}, "self_attn.W_pack.", parts)
    if settings["vocab_size"] == _NORM_HEAD_VOCABULARY:
        tensors["lm_head.weight"] = F.normalize(tensors["lm_head.weight"])
    return LlamaForCausalLM, config, tensors


_Reader = Callable[[Path, Mapping[str, Any]], tuple[Any, Any, dict[str, Tensor]]]
_KINDS: dict[str, _Reader] = {"chatglm": _chatglm, "baichuan": _baichuan}


def _settings(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _require(
    folder: Path, settings: Mapping[str, Any], fixed: Mapping[str, Any], needed: tuple[str, ...]
) -> None:
    missing = [name for name in needed if name not in settings]
    other = [name for name, value in fixed.items() if settings.get(name, value) != value]
    if missing or other:
        what = f"no {missing[0]}" if missing else f"{other[0]} = {settings[other[0]]!r}"
        raise ConfigError(
            f"model: the config of {folder.name} has {what}. Allowed: ChatGLM2-6B, ChatGLM3-6B, "
            "Baichuan-7B and Baichuan2-7B (the 13B ones have ALiBi, ChatGLM-6B has other blocks). "
            "Use one of these, or a model that transformers has a class for."
        )


def _weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name; safetensors go first."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        tensors |= load_file(file)
    for file in [] if files else sorted(folder.glob("*.bin")):
        tensors |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not tensors:
        raise ConfigError(
            f"model: {folder} has no weights. Allowed: *.safetensors or *.bin beside config.json. "
            "Copy the whole folder."
        )
    return tensors


def _moved(
    tensors: Mapping[str, Tensor],
    named: Mapping[str, str],
    packed: str,
    parts: Mapping[str, int],
) -> dict[str, Tensor]:
    """Names of the target; rows of the `packed` projection are cut into `parts`."""
    moved: dict[str, Tensor] = {}
    for source, tensor in tensors.items():
        if source.endswith("inv_freq"):
            continue
        name = source
        for old, new in named.items():
            name = name.replace(old, new)
        if packed not in name:
            moved[name] = tensor
            continue
        before, after = name.split(packed)
        home = before if before.endswith("self_attn.") else f"{before}self_attn."
        for part, rows in zip(parts, torch.split(tensor, list(parts.values())), strict=True):
            moved[f"{home}{part}.{after}"] = rows.contiguous()
    return moved
