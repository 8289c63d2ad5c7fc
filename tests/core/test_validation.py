"""Texts of the errors at the border: argument, what came, what is allowed, what to do."""

from __future__ import annotations

import pytest
import torch

from longspan import LongspanError, ShapeError, UnsupportedError
from longspan._validation import validate, validate_varlen

Q = torch.zeros(2, 4, 6, 8)


def call(**changes):
    arguments = {"query": Q, "key": Q, "value": Q, **changes}
    tensors = [arguments.pop(name) for name in ("query", "key", "value")]
    return validate("some_attention", *tensors, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"query": "x"}, ShapeError, ("query is a str", "torch.Tensor")),
        ({"query": Q[0]}, ShapeError, ("query has 3 dimensions", "(4, 6, 8)", "unsqueeze")),
        ({"key": Q[:1]}, ShapeError, ("query 2, key 1", "must be equal")),
        ({"value": Q[:, :, :3]}, ShapeError, ("value has shape (2, 4, 3, 8)", "length of key")),
        ({"key": Q[..., :4]}, ShapeError, ("head dim 4", "has 8")),
        ({"query": Q.long()}, ShapeError, ("torch.int64", "float16, bfloat16", "Cast it")),
        ({"key": Q.half()}, ShapeError, ("key is torch.float16", "query is torch.float32")),
        ({"key": Q[:, :2], "value": Q[:, :2]}, ShapeError, ("4 heads", "has 2", "enable_gqa=True")),
        ({"key": Q[:, :3], "value": Q[:, :3], "enable_gqa": True}, ShapeError, ("multiple",)),
        ({"dropout_p": 0.5}, UnsupportedError, ("dropout_p is 0.5", "only 0.0", "exact_attention")),
        ({"scale": float("nan")}, ShapeError, ("scale is nan", "finite number", "Leave it out")),
        ({"scale": "1"}, ShapeError, ("scale is '1'", "finite number")),
        ({"scale": torch.ones(2)}, ShapeError, ("scale is tensor", "finite number")),
        ({"query_offset": 1.5}, ShapeError, ("query_offset is float 1.5", "N_k - N_q")),
        ({"key_lengths": torch.ones(3, dtype=torch.int32)}, ShapeError, ("(3,)", "shape (2,)")),
        ({"key_lengths": torch.ones(2)}, ShapeError, ("torch.float32", "torch.int32")),
        ({"attn_mask": torch.zeros(6, 6)}, UnsupportedError, ("torch.float32", "key_lengths")),
        ({"attn_mask": torch.ones(6, 6, dtype=torch.bool)}, UnsupportedError,
         ("shape (6, 6)", "varlen", "exact_attention")),
        ({"attn_mask": torch.tensor([True, False, True, True, True, True]).view(1, 1, 1, 6)},
         UnsupportedError, ("not right padding",)),
        ({"attn_mask": torch.ones(1, 1, 1, 6, dtype=torch.bool),
          "key_lengths": torch.ones(2, dtype=torch.int32)}, UnsupportedError, ("both given",)),
        ({"query": torch.zeros(1, 1, 1, 300), "key": torch.zeros(1, 1, 1, 300),
          "value": torch.zeros(1, 1, 1, 8)}, ShapeError, ("head dim 300", "1 to 256")),
    ],
)  # fmt: skip
def test_message(changes, error, parts):
    with pytest.raises(error) as caught:
        call(**changes)
    assert isinstance(caught.value, LongspanError)
    text = str(caught.value)
    assert text.startswith("some_attention: ")
    for part in parts:
        assert part in text


def test_right_padding_mask_becomes_key_lengths():
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    assert call(attn_mask=mask[:, None, None]).key_lengths.tolist() == [4, 6]
    assert call(attn_mask=mask[:1, None, None]).key_lengths.tolist() == [4, 4]


def test_defaults():
    made = call()
    assert made.scale == 8**-0.5
    assert made.key_lengths is None
    assert call(scale=2).scale == 2.0


X = torch.zeros(6, 4, 8)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"cu_seqlens_q": CU.long()}, "cu_seqlens_q has dtype torch.int64"),
        ({"cu_seqlens_k": CU[:2]}, "names 1"),
        ({"cu_seqlens_k": CU[:1]}, "shape (S + 1,)"),
        ({"cu_seqlens_k": [0, 6]}, "cu_seqlens_k is list"),
        ({"max_seqlen_q": torch.tensor(4)}, "max_seqlen_q is a Tensor"),
        ({"query": X[None]}, "query has 4 dimensions"),
        ({"value": X[:5]}, "value has shape (5, 4, 8)"),
        ({"key": X[:, :2], "value": X[:, :2]}, "enable_gqa=True"),
    ],
)
def test_varlen_message(changes, part):
    arguments = {"query": X, "key": X, "value": X, "cu_seqlens_q": CU, "cu_seqlens_k": CU,
                 "max_seqlen_q": 4, "max_seqlen_k": 4, **changes}  # fmt: skip
    with pytest.raises(ShapeError) as caught:
        validate_varlen("some_varlen", *arguments.values())
    assert part in str(caught.value)
