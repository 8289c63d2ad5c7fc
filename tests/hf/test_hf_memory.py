"""No tensor with N x N elements, whatever the padding: watched at every operator."""

from __future__ import annotations

import pytest
import torch
from tiny_models import padded, positions, tiny, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from longspan import ExactConfig, WindowConfig
from longspan.hf import patch
from longspan.hf.masks import layout_of_documents, layout_of_mask, longspan_mask

LENGTH = 1024


class Largest(TorchDispatchMode):
    """The largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, torch.Tensor):
                self.elements = max(self.elements, part.untyped_storage().size() // 4)
        return result


def largest(model, **inputs):
    with torch.no_grad(), Largest() as watch:
        model(**inputs, use_cache=False, logits_to_keep=1)
    return watch.elements


@pytest.mark.parametrize("config", [ExactConfig(), WindowConfig(window=32)], ids=str)
@pytest.mark.parametrize("side", ["none", "left", "both"])
def test_forward_is_linear_in_memory(config, side):
    model = tiny("gemma3", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    mask = padded(side, batch=2, length=LENGTH)
    inputs = {
        "input_ids": tokens(2, LENGTH), "attention_mask": mask, "position_ids": positions(mask)
    }  # fmt: skip
    with patch(model, config):
        assert largest(model, **inputs) < LENGTH * LENGTH // 4
    assert largest(model, **inputs) >= LENGTH * LENGTH  # the watch sees what eager makes


def test_the_mask_of_a_long_batch_is_two_dimensional():
    length = 131_072
    given = torch.ones(2, length, dtype=torch.bool)
    assert longspan_mask(2, length, length, attention_mask=given) is None
    given[0, :7] = False
    with Largest() as watch:
        mask = longspan_mask(2, length, length, attention_mask=given)
        layout = layout_of_mask(mask, length)
    assert mask.shape == (2, length)
    assert watch.elements <= 8 * length
    assert layout.lengths == ((length - 7, length - 7), (length, length))


def test_layouts_are_made_once_per_batch():
    mask = padded("both").bool()
    assert layout_of_mask(mask, 14) is layout_of_mask(mask, 14)
    assert layout_of_mask(mask, 1) is not layout_of_mask(mask, 14)
    ids = torch.tensor([[0, 1, 0, 1, 2]])
    first = layout_of_documents(ids, 1)
    assert layout_of_documents(ids, 1) is first
    ids[0, 2] = 2  # changed in place: one document that skips a position
    assert layout_of_documents(ids, 1) is not first
    assert layout_of_documents(torch.arange(5)[None], 3) is None


def test_layout_of_a_padded_batch():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
    layout = layout_of_mask(mask, 2)
    assert layout.query_index.tolist() == [0, 1, 2]
    assert layout.key_index.tolist() == [2, 3, 4, 5, 6]
    assert layout.cu_seqlens_q.tolist() == [0, 2, 3]
    assert layout.cu_seqlens_k.tolist() == [0, 2, 5]
    assert (layout.max_seqlen_q, layout.max_seqlen_k) == (2, 3)
    assert layout.cu_seqlens_q.dtype is torch.int32


def test_mask_of_a_static_cache_ends_at_the_last_query():
    offset = torch.tensor(5)
    assert longspan_mask(1, 2, 16, q_offset=offset).tolist() == [[True] * 7]
    given = torch.ones(1, 16, dtype=torch.bool)
    given[0, 0] = False
    mask = longspan_mask(1, 2, 16, q_offset=offset, attention_mask=given)
    assert mask.tolist() == [[False] + [True] * 6]


def test_mask_of_a_sliding_cache_starts_at_its_first_key():
    given = torch.ones(1, 9, dtype=torch.bool)
    given[0, :2] = False
    seen = {"q_offset": 8, "attention_mask": given}
    assert longspan_mask(1, 1, 5, kv_offset=4, **seen) is None
    assert longspan_mask(1, 1, 8, kv_offset=1, **seen).tolist() == [[False] + [True] * 7]
