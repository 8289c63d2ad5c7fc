import math

import pytest
import torch

from longspan.errors import ConfigError, UnsupportedError
from longspan.eval.scoring import SplitModel, agreement, as_input_ids, token_losses
from longspan.testing.models import TINY_ARCHITECTURES, tiny_model


def whole_losses(model, ids):
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
@pytest.mark.parametrize("chunk_size", [7, 256])
def test_losses_equal_those_of_the_whole_model(arch, chunk_size, tokens):
    model = tiny_model(arch).model
    ids = as_input_ids(tokens[:101], "cpu")
    split = SplitModel(model, chunk_size=chunk_size)
    shares = []
    losses = token_losses(split, ids, progress=shares.append)
    torch.testing.assert_close(losses, whole_losses(model, ids), atol=1e-4, rtol=1e-5)
    assert sum(shares) == pytest.approx(1.0)
    assert len(shares) > 2


def test_softcapped_and_scaled_logits(tiny, tokens):
    from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    sizes = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.4,
    }
    torch.manual_seed(0)
    for model in [
        Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=2.0)),
        GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=3.0)),
    ]:
        ids = as_input_ids(tokens[:50], "cpu")
        losses = token_losses(SplitModel(model.eval()), ids)
        torch.testing.assert_close(losses, whole_losses(model, ids), atol=1e-4, rtol=1e-5)


def test_a_model_whose_logits_are_transformed_is_refused():
    model = tiny_model("llama").model
    forward = model.forward

    def doubled(*args, **kwargs):
        result = forward(*args, **kwargs)
        result.logits = 2 * result.logits
        return result

    model.forward = doubled
    with pytest.raises(UnsupportedError, match=r"logits of LlamaForCausalLM are not .* own code"):
        SplitModel(model)


def test_a_model_without_a_head_is_refused(tiny):
    with pytest.raises(UnsupportedError, match=r"LlamaModel has no separate body .* head"):
        SplitModel(tiny.model.model)


def test_ids_of_another_tokenizer_are_refused(tiny):
    with pytest.raises(ConfigError, match=r"id 5000 came, but the model reads ids 0 \.\. 258"):
        token_losses(SplitModel(tiny.model), as_input_ids([1, 5000, 2], "cpu"))


def test_agreement_with_itself_and_with_another(tiny, tokens):
    split = SplitModel(tiny.model, chunk_size=30)
    ids = as_input_ids(tokens[:100], "cpu")
    hidden = split.hidden(ids)
    same = agreement(split, ids, hidden, hidden)
    assert same.kl == 0.0
    assert same.top1 == 1.0
    torch.testing.assert_close(same.losses, token_losses(split, ids), atol=1e-6, rtol=1e-6)

    other = hidden + 0.5 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    got = agreement(split, ids, hidden, other)
    p = torch.log_softmax(split.logits(hidden[:-1]).double(), -1)
    q = torch.log_softmax(split.logits(other[:-1]).double(), -1)
    kl = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(got.kl_by_position, kl, atol=1e-5, rtol=1e-4)
    assert got.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert got.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert 0 < got.top1 < 1
    assert math.isfinite(got.kl)
