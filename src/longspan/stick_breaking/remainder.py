"""Give what is left of the stick to the value at the query's own position."""

from __future__ import annotations

import torch
from torch import Tensor

from .._validation import Call, VarlenCall

__all__ = ["give_to_own_value", "give_to_own_value_packed"]


def give_to_own_value(output: Tensor, log_rest: Tensor, call: Call) -> Tensor:
    """output + exp(log_rest) * v_p, where p = i + query_offset is the position of query i.

    Queries that are padding themselves (p >= key_length) get nothing.
    """
    n_q, offset = call.query.shape[2], call.query_offset
    own = call.value[:, :, offset : offset + n_q]
    if call.key_lengths is not None:
        position = torch.arange(offset, offset + n_q, device=own.device)
        padding = position >= call.key_lengths.unsqueeze(-1)  # (B, N_q)
        own = own.masked_fill(padding[:, None, :, None], 0.0)
    batch, heads = output.shape[:2]
    kv_heads = own.shape[1]
    grouped = (batch, kv_heads, heads // max(kv_heads, 1), n_q)
    rest = torch.exp(log_rest).reshape(*grouped, 1)
    wide = output.to(rest.dtype).reshape(*grouped, output.shape[-1])
    return (wide + rest * own.unsqueeze(2)).reshape(output.shape).to(output.dtype)


def give_to_own_value_packed(output: Tensor, log_rest: Tensor, call: VarlenCall) -> Tensor:
    """The same for packed sequences: query t's own key is aligned at the end of its sequence.

    A query without a key of its own (more queries than keys) gets nothing.
    """
    total_q, heads = log_rest.shape
    if call.key.shape[0] == 0:
        return output
    token = torch.arange(total_q, device=output.device)
    ends = call.cu_seqlens_q[1:].long()
    sequence = torch.searchsorted(ends, token, right=True).clamp(max=ends.shape[0] - 1)
    own_index = token + call.cu_seqlens_k[1:].long()[sequence] - ends[sequence]
    has_key = own_index >= call.cu_seqlens_k[:-1].long()[sequence]
    own = call.value[torch.where(has_key, own_index, 0)]  # (total_q, H_kv, D_v)
    own = own.masked_fill(~has_key[:, None, None], 0.0)
    kv_heads = own.shape[1]
    rest = torch.exp(log_rest).reshape(total_q, kv_heads, heads // kv_heads, 1)
    wide = output.to(rest.dtype).reshape(total_q, kv_heads, heads // kv_heads, output.shape[-1])
    return (wide + rest * own.unsqueeze(2)).reshape(output.shape).to(output.dtype)
