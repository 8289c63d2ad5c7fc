"""One factory for test inputs: shapes, memory layouts, and values that find faults."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, nearest_name

__all__ = ["INPUT_KINDS", "QKV", "make_qkv"]

INPUT_KINDS = ("normal", "peaked", "flat", "shifted", "large", "zero")


class QKV(NamedTuple):
    """query (B, H, N_q, D), key (B, H_kv, N_k, D), value (B, H_kv, N_k, D_v)."""

    query: Tensor
    key: Tensor
    value: Tensor


def make_qkv(
    batch: int = 1,
    heads: int = 2,
    n_q: int = 64,
    head_dim: int = 16,
    *,
    n_k: int | None = None,
    kv_heads: int | None = None,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kind: str = "normal",
    transposed: bool = False,
    requires_grad: bool = False,
    seed: int = 0,
) -> QKV:
    """Random query, key and value.

    Args:
        batch, heads, n_q, head_dim: shape of query.
        n_k: keys; default n_q.
        kv_heads: heads of key and value; default heads.
        value_dim: last axis of value; default head_dim.
        kind: "normal"; "peaked" (each query aligned with a few keys); "flat" (tiny scores);
            "shifted" (keys share a large common direction); "large" (scores far outside
            [-80, 80]); "zero" (all queries zero: lse is the log of the number of visible keys).
        transposed: tensors are (B, N, H, D) in memory, as models hand them over.
        requires_grad: leaves of an autograd graph.
        seed: same seed, same values, on every device.

    Raises:
        ConfigError: unknown kind.
    """
    n_k = n_q if n_k is None else n_k
    kv_heads = heads if kv_heads is None else kv_heads
    value_dim = head_dim if value_dim is None else value_dim
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, length: int, dim: int) -> Tensor:
        return torch.randn(batch, length, count, dim, generator=generator, dtype=torch.float64)

    query, key = draw(heads, n_q, head_dim), draw(kv_heads, n_k, head_dim)
    value = draw(kv_heads, n_k, value_dim)
    if kind == "peaked":
        picks = torch.randint(max(n_k, 1), (n_q,), generator=generator)
        aligned = key.repeat_interleave(heads // kv_heads, 2)
        query = 0.3 * query + 1.5 * (aligned[:, picks] if n_k else query)
    elif kind == "flat":
        query = 0.01 * query
    elif kind == "shifted":
        key = key + 3.0 * draw(kv_heads, 1, head_dim)
    elif kind == "large":
        query, key = 12.0 * query, 12.0 * key
    elif kind == "zero":
        query = torch.zeros_like(query)
    elif kind != "normal":
        raise ConfigError(f"make_qkv: kind is {kind!r}. {nearest_name(kind, INPUT_KINDS)}")

    def finish(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device=device, dtype=dtype).transpose(1, 2)
        tensor = tensor if transposed else tensor.contiguous()
        return tensor.detach().requires_grad_(requires_grad)

    return QKV(finish(query), finish(key), finish(value))
