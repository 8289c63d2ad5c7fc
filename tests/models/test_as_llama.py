"""A reference transformer as a Llama: the same logits, its own attention, patched and back."""

import json

import pytest
import torch

from longspan import InfiniConfig, StickBreakingConfig
from longspan.errors import ConfigError, UnsupportedError
from longspan.eval.compare_plan import Candidate, default_attentions, plan_candidates
from longspan.eval.jobs import patched_model
from longspan.hf.native import native_attention
from longspan.models import Transformer, TransformerConfig, load
from longspan.models.as_llama import to_llama
from longspan.models.shipped import is_longspan_model, native_mechanism, shipped_models
from longspan.train import train_tokenizer, with_settings

pytest.importorskip("transformers")

STICK = {"positions": "none", "attention": StickBreakingConfig()}
VARIANTS = {
    "rope": {},
    "gqa": {"kv_heads": 2, "tie_embeddings": False},
    "nope": {"positions": "none"},
    "stick": STICK,
    "infini": {"attention": InfiniConfig(segment_length=9, update="delta"), "kv_heads": 2},
    "infini-nope": {"attention": InfiniConfig(segment_length=9), "positions": "none"},
}


def make(vocab_size=50, **settings):
    config = TransformerConfig(
        vocab_size=vocab_size, **{"width": 32, "layers": 2, "heads": 4, **settings}
    )
    model = Transformer(config, seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim == 2 else 1.3)
    return model


@pytest.fixture
def ids():
    return torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_same_logits(variant, ids):
    model = make(**VARIANTS[variant])
    llama = to_llama(model)
    with torch.no_grad():
        torch.testing.assert_close(llama(ids).logits, model(ids), rtol=1e-4, atol=1e-4)


def test_gates_come_back_after_a_replacement(ids):
    model = make(**VARIANTS["infini"])
    with torch.no_grad():
        for block in model.blocks:  # others than a fresh patch draws
            block.attention.longspan_gate.normal_()
        llama, want = to_llama(model), model(ids)
        with native_attention(llama).replaced(InfiniConfig(segment_length=20)):
            assert not torch.allclose(llama(ids).logits, want, atol=1e-3)
        torch.testing.assert_close(llama(ids).logits, want, rtol=1e-4, atol=1e-4)
    gated = make(attention=InfiniConfig(segment_length=9, update="gated_delta"))
    with pytest.raises(UnsupportedError, match="gated_delta"):
        to_llama(gated)


def test_same_continuation(ids):
    from longspan.models import generate

    model = make(**STICK)
    wanted = generate(model, ids, 6)
    found = to_llama(model).generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=1)
    assert torch.equal(found, wanted[:, : found.shape[1]])


def test_replaced_and_back(ids):
    model = make(**STICK)
    llama = to_llama(model)
    other = StickBreakingConfig(window=3)
    windowed = with_settings(model, attention=other)
    candidate = Candidate(label="w", mechanism="stick_breaking", config=other)
    with torch.no_grad():
        with patched_model(llama, candidate, "all") as report:
            torch.testing.assert_close(llama(ids).logits, windowed(ids), rtol=1e-4, atol=1e-4)
            assert report.approximate_calls == 2
        torch.testing.assert_close(llama(ids).logits, model(ids), rtol=1e-4, atol=1e-4)
        with patched_model(llama, candidate, "last:1"):
            half = llama(ids).logits
        mixed = with_settings(model, attention=(StickBreakingConfig(), other))
        torch.testing.assert_close(half, mixed(ids), rtol=1e-4, atol=1e-4)
        with pytest.raises(ZeroDivisionError), patched_model(llama, candidate, "all"):
            _ = 1 / 0
        torch.testing.assert_close(llama(ids).logits, model(ids), rtol=1e-4, atol=1e-4)


@pytest.fixture
def folder(tmp_path):
    tokenizer = train_tokenizer(["a cat sat on a mat"], tmp_path / "tokenizer.json", vocab_size=300)
    model = make(vocab_size=tokenizer.get_vocab_size(), **STICK)
    model.save(tmp_path)
    return tmp_path


def test_load_a_trained_folder(folder):
    loaded = load(folder)
    assert loaded.source == "folder"
    assert loaded.sha256
    read = loaded.tokenizer("a cat sat")["input_ids"]
    assert loaded.tokenizer.decode(read) == "a cat sat"
    assert loaded.tokenizer.bos_token_id == 0
    ids = torch.tensor([[0, *read]])
    with torch.no_grad():
        wanted = Transformer.load(folder)(ids)
        torch.testing.assert_close(loaded.model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert is_longspan_model(folder)
    assert native_mechanism(folder) == "stick_breaking"
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        load(folder)


def test_only_own_variants_are_compared():
    specs = default_attentions(4096, native="stick_breaking")
    names = {c.mechanism for c in plan_candidates(specs, native="stick_breaking")[1:]}
    assert names == {"stick_breaking"}
    with pytest.raises(ConfigError, match="trained with stick_breaking"):
        plan_candidates(["window:window=8"], native="stick_breaking")
    with pytest.raises(ConfigError, match="means nothing on a pretrained model"):
        plan_candidates(["stick_breaking"])


def test_softmax_models_have_no_native_mechanism(tmp_path):
    make().save(tmp_path)
    assert native_mechanism(tmp_path) is None
    assert native_mechanism("smollm2-135m") is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert not is_longspan_model(tmp_path)


@pytest.mark.parametrize("settings", [{"positions": "alibi"}, {"qk_norm": True}])
def test_what_llama_has_no_form_for(settings):
    with pytest.raises(UnsupportedError, match="Llama has a form"):
        to_llama(make(**settings))


def test_shipped_models_are_small_and_load():
    for name, path in shipped_models().items():
        assert (path / "model.safetensors").stat().st_size <= 8e6
        loaded = load(name)
        assert loaded.source == "package"
        assert loaded.tokenizer.vocab_size == loaded.model.config.vocab_size
