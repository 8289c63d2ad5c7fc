from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from longspan import LongspanWarning
from longspan.hf.positions import without_positions
from longspan.testing.models import tiny_model

IDS = torch.randint(0, 255, (1, 12), generator=torch.Generator().manual_seed(0))


def logits(model, shift):
    with torch.no_grad():
        return model(IDS, position_ids=torch.arange(12)[None] * (1 + shift)).logits


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "qwen3"])
def test_positions_are_gone_inside_and_back_outside(arch):
    model = tiny_model(arch).model
    before = logits(model, 0)
    assert not torch.allclose(before, logits(model, 3), atol=1e-5)
    with without_positions(model) as report:
        inside = logits(model, 0)
        assert torch.equal(inside, logits(model, 3))
        assert not torch.allclose(inside, before, atol=1e-5)
    assert report.rotary or report.learned
    assert torch.equal(logits(model, 0), before)


def test_undone_after_an_error():
    model = tiny_model("llama").model
    before = logits(model, 0)
    with pytest.raises(KeyError), without_positions(model):
        raise KeyError
    assert torch.equal(logits(model, 0), before)


def test_a_model_without_known_positions_warns():
    with (
        pytest.warns(LongspanWarning, match="no rotary and no learned"),
        without_positions(torch.nn.Linear(2, 2)),
    ):
        pass
