"""Checks shared by every public function: done once at the border, inner code trusts its input."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import ConfigError, ShapeError, UnsupportedError

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256


class Call(NamedTuple):
    """A validated call: what every implementation receives."""

    query: Tensor  # (B, H, N_q, D)
    key: Tensor  # (B, H_kv, N_k, D)
    value: Tensor  # (B, H_kv, N_k, D_v)
    key_lengths: Tensor | None  # (B,) int32 on the device of query
    is_causal: bool
    scale: float
    query_offset: int


class VarlenCall(NamedTuple):
    """A validated packed call."""

    query: Tensor  # (total_q, H, D)
    key: Tensor  # (total_k, H_kv, D)
    value: Tensor  # (total_k, H_kv, D_v)
    cu_seqlens_q: Tensor  # (S + 1,) int32
    cu_seqlens_k: Tensor  # (S + 1,) int32
    max_seqlen_q: int
    max_seqlen_k: int
    is_causal: bool
    scale: float


def validate(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    query_offset: int = 0,
    key_lengths: Tensor | None = None,
) -> Call:
    """Check the arguments that all mechanisms share and bring them into one form.

    `attn_mask` is accepted when it says nothing but right padding: boolean, (B or 1, 1, 1, N_k),
    True first, then False; it becomes `key_lengths` (reading it costs one device synchronisation).
    Under autocast the inputs are cast as torch's SDPA would cast them.
    """
    query, key, value = _autocast(query, key, value)
    _check_tensors(name, query, key, value, ndim=4, layout="(B, H, N, D)")
    batch, heads, _, head_dim = query.shape
    kv_heads, n_k = key.shape[1], key.shape[2]
    if key.shape[0] != batch or value.shape[0] != batch:
        raise ShapeError(
            f"{name}: batch sizes differ: query {batch}, key {key.shape[0]}, value "
            f"{value.shape[0]}. They must be equal; expand the smaller one."
        )
    if value.shape[1] != kv_heads or value.shape[2] != n_k:
        raise ShapeError(
            f"{name}: value has shape {tuple(value.shape)} but key has {tuple(key.shape)}. "
            "value must be (B, H_kv, N_k, D_v) with the heads and length of key."
        )
    _check_heads(name, heads, kv_heads, enable_gqa)
    _check_dropout(name, dropout_p)
    if attn_mask is not None:
        if key_lengths is not None:
            raise UnsupportedError(
                f"{name}: attn_mask and key_lengths were both given; only one of them may say "
                "which keys are valid. Drop attn_mask."
            )
        key_lengths = lengths_from_mask(name, attn_mask, batch, n_k)
    if key_lengths is not None:
        key_lengths = _check_key_lengths(name, key_lengths, batch, query.device)
    if isinstance(query_offset, bool) or not isinstance(query_offset, (int, torch.SymInt)):
        raise ShapeError(
            f"{name}: query_offset is {type(query_offset).__name__} {query_offset!r}; it must be "
            "an int: the index among the keys of the first query (0 as in torch, "
            "N_k - N_q for decoding)."
        )
    return Call(
        query, key, value, key_lengths, bool(is_causal), _scale(name, scale, head_dim), query_offset
    )


def validate_varlen(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> VarlenCall:
    """Check a packed call. Values in cu_seqlens are trusted (reading them would synchronise)."""
    query, key, value = _autocast(query, key, value)
    _check_tensors(name, query, key, value, ndim=3, layout="(total, H, D)")
    heads, head_dim = query.shape[1], query.shape[2]
    kv_heads = key.shape[1]
    if value.shape[:2] != key.shape[:2]:
        raise ShapeError(
            f"{name}: value has shape {tuple(value.shape)} but key has {tuple(key.shape)}. "
            "value must be (total_k, H_kv, D_v) with the length and heads of key."
        )
    _check_heads(name, heads, kv_heads, enable_gqa)
    for label, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(cu, Tensor) or cu.ndim != 1 or cu.shape[0] < 2:
            shape = tuple(cu.shape) if isinstance(cu, Tensor) else type(cu).__name__
            raise ShapeError(
                f"{name}: {label} is {shape}; it must be an int32 tensor of shape (S + 1,) that "
                "starts with 0 and holds the running total of the sequence lengths."
            )
        if cu.dtype is not torch.int32:
            raise ShapeError(
                f"{name}: {label} has dtype {cu.dtype}; it must be torch.int32. "
                f"Use {label}.to(torch.int32)."
            )
        if cu.device != query.device:
            raise ShapeError(
                f"{name}: {label} is on {cu.device} but query is on {query.device}. Move it there."
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ShapeError(
            f"{name}: cu_seqlens_q names {cu_seqlens_q.shape[0] - 1} sequences but cu_seqlens_k "
            f"names {cu_seqlens_k.shape[0] - 1}. They must name the same number."
        )
    for label, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(longest, (Tensor, bool)) or not isinstance(longest, (int, torch.SymInt)):
            raise ShapeError(
                f"{name}: {label} is a {type(longest).__name__}; it must be a Python int that is "
                "at least the longest sequence (an upper bound is enough)."
            )
    return VarlenCall(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        bool(is_causal),
        _scale(name, scale, head_dim),
    )


def check_config(name: str, config: Any, allowed: type) -> None:
    """Refuse settings of another mechanism, a dict, None, or the class instead of an instance."""
    if not isinstance(config, allowed):
        kind = type(config).__name__
        got = f"the class {config.__name__}" if isinstance(config, type) else f"of type {kind}"
        raise ConfigError(
            f"{name}: config is {got}; it must be a {allowed.__name__}. "
            f"Pass {allowed.__name__}(...), or leave it out for the default settings."
        )


def lengths_from_mask(name: str, attn_mask: Tensor, batch: int, n_k: int) -> Tensor:
    """Turn a boolean right-padding mask (B or 1, 1, 1, N_k) into key lengths, or raise."""
    advice = (
        "Pass key_lengths for right padding, use the varlen form for packed or left-padded "
        "batches, or longspan.exact_attention, which takes any mask."
    )
    if attn_mask.dtype is not torch.bool:
        raise UnsupportedError(
            f"{name}: attn_mask has dtype {attn_mask.dtype}; only boolean right-padding masks "
            f"of shape (B or 1, 1, 1, N_k) are accepted. {advice}"
        )
    shape = tuple(attn_mask.shape)
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[1:3] != (1, 1) or shape[3] != n_k:
        raise UnsupportedError(
            f"{name}: attn_mask has shape {shape}; only boolean right-padding masks of shape "
            f"({batch} or 1, 1, 1, {n_k}) are accepted. {advice}"
        )
    rows = attn_mask.reshape(shape[0], n_k)
    lengths = rows.sum(-1, dtype=torch.int32)
    prefix = torch.arange(n_k, device=rows.device)[None, :] < lengths[:, None]
    if not bool((rows == prefix).all()):
        raise UnsupportedError(
            f"{name}: attn_mask is not right padding (a False comes before a True). {advice}"
        )
    return lengths.expand(batch)


def _check_tensors(
    name: str, query: Tensor, key: Tensor, value: Tensor, ndim: int, layout: str
) -> None:
    for label, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise ShapeError(
                f"{name}: {label} is a {type(tensor).__name__}; it must be a torch.Tensor {layout}."
            )
        if tensor.ndim != ndim:
            fix = "Add the missing axes with unsqueeze." if tensor.ndim < ndim else "Reshape it."
            raise ShapeError(
                f"{name}: {label} has {tensor.ndim} dimensions, shape {tuple(tensor.shape)}; "
                f"it must have {ndim}: {layout}. {fix}"
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise ShapeError(
                f"{name}: {label} has dtype {tensor.dtype}; allowed are float16, bfloat16, "
                "float32 and float64. Cast it."
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ShapeError(
                f"{name}: {label} is {tensor.dtype} on {tensor.device} but query is "
                f"{query.dtype} on {query.device}. All three must agree; cast or move {label}."
            )
    head_dim, key_dim, value_dim = query.shape[-1], key.shape[-1], value.shape[-1]
    if key_dim != head_dim:
        raise ShapeError(
            f"{name}: key has head dim {key_dim} but query has {head_dim}. They must be equal."
        )
    for label, size in (("query", head_dim), ("value", value_dim)):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ShapeError(
                f"{name}: {label} has head dim {size}; allowed is 1 to {MAX_HEAD_DIM}. "
                "Split the head or use torch's scaled_dot_product_attention."
            )


def _check_heads(name: str, heads: int, kv_heads: int, enable_gqa: bool) -> None:
    if heads == kv_heads:
        return
    if kv_heads == 0 or heads % kv_heads:
        raise ShapeError(
            f"{name}: query has {heads} heads and key has {kv_heads}; the heads of query must be "
            "a multiple of the heads of key. Repeat or drop heads."
        )
    if not enable_gqa:
        raise ShapeError(
            f"{name}: query has {heads} heads and key has {kv_heads}, but enable_gqa is False. "
            f"Pass enable_gqa=True to share each key head among {heads // kv_heads} query heads."
        )


def _check_dropout(name: str, dropout_p: float) -> None:
    if dropout_p != 0.0:
        raise UnsupportedError(
            f"{name}: dropout_p is {dropout_p}; only 0.0 is supported, because dropped weights "
            "would depend on hidden random state. Apply dropout to the output instead, or use "
            "longspan.exact_attention."
        )


def _check_key_lengths(name: str, key_lengths: Tensor, batch: int, device: torch.device) -> Tensor:
    if not isinstance(key_lengths, Tensor) or tuple(key_lengths.shape) != (batch,):
        got = tuple(key_lengths.shape) if isinstance(key_lengths, Tensor) else key_lengths
        raise ShapeError(
            f"{name}: key_lengths is {got}; it must be an int32 tensor of shape ({batch},): the "
            "number of valid keys of each batch entry."
        )
    if key_lengths.dtype not in (torch.int32, torch.int64):
        raise ShapeError(
            f"{name}: key_lengths has dtype {key_lengths.dtype}; it must be torch.int32. Cast it."
        )
    return key_lengths.to(device=device, dtype=torch.int32)


def _scale(name: str, scale: float | None, head_dim: int) -> float:
    number: float
    if scale is None:
        number = float(head_dim) ** -0.5
        return number
    try:
        number = math.nan if isinstance(scale, (str, bytes)) else float(scale)
    except (TypeError, ValueError, RuntimeError):  # float() of a list, of a tensor of many numbers
        number = math.nan
    if not math.isfinite(number):
        raise ShapeError(
            f"{name}: scale is {scale!r}; it must be a finite number that multiplies the scores. "
            "Leave it out for head_dim ** -0.5."
        )
    return number


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(query, Tensor) or query.is_meta:  # autocast does not know the meta device
        return query, key, value
    if not torch.is_autocast_enabled(query.device.type):
        return query, key, value
    dtype = torch.get_autocast_dtype(query.device.type)

    def cast(tensor: Tensor) -> Tensor:
        fits = isinstance(tensor, Tensor) and tensor.is_floating_point()
        return tensor.to(dtype) if fits and tensor.dtype is not torch.float64 else tensor

    return cast(query), cast(key), cast(value)
