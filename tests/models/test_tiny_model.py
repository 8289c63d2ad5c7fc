"""Tiny random models and the byte-level tokenizer."""

import pytest
import torch

from longspan.errors import ConfigError
from longspan.testing.models import (
    TINY_ARCHITECTURES,
    byte_tokenizer,
    save_tiny_model,
    tiny_model,
)

transformers = pytest.importorskip("transformers")


def test_tokenizer_ids_are_bytes():
    text = "Plain words,\n\ttabs and  spaces; ünïcödé 中文 🙂"
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert byte_tokenizer(add_bos=True)(text)["input_ids"] == [256, *ids]


def test_every_byte_has_its_id():
    ids = byte_tokenizer()("".join(map(chr, range(256))))["input_ids"]
    assert ids == list("".join(map(chr, range(256))).encode())


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_same_seed_same_weights_and_folder_round_trip(arch, tmp_path):
    before = torch.get_rng_state()
    model, tokenizer = tiny_model(arch, seed=3, add_bos=True)
    assert torch.equal(before, torch.get_rng_state())
    folder = save_tiny_model(tmp_path / arch, arch, seed=3, add_bos=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("a few bytes of text", return_tensors="pt")
    assert inputs["input_ids"][0, 0] == tokenizer.bos_token_id
    assert again("a few bytes of text")["input_ids"] == inputs["input_ids"][0].tolist()
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(loaded.eval()(**inputs).logits, expected)
        other = tiny_model(arch, seed=4).model(**inputs).logits
    assert expected.shape[-1] == len(tokenizer)
    assert not torch.allclose(expected, other)


def test_attention_is_not_flat():
    model, tokenizer = tiny_model("llama")
    model.set_attn_implementation("eager")
    inputs = tokenizer("the quick brown fox jumps over the lazy dog", return_tensors="pt")
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions[-1]
    assert weights[..., -1, :].max() > 3 / inputs["input_ids"].shape[1]


def test_unknown_architecture_names_the_nearest():
    with pytest.raises(ConfigError, match=r"arch is 'lama'\. Did you mean 'llama'\?"):
        tiny_model("lama")
