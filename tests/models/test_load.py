"""Loading by name, folder and hub name."""

import subprocess
import sys

import pytest
import torch

from longspan.errors import ConfigError, MissingExtraError
from longspan.models import DownloadError, convert, fetch, list_models, load
from longspan.testing.models import save_tiny_model, tiny_model

transformers = pytest.importorskip("transformers")


def test_by_name(shelf, capsys):
    assert [row.here for row in list_models() if row.name == "tiny"] == ["no"]
    seen = []
    loaded = load("tiny", progress=lambda *news: seen.append(news))
    assert "Tiny asks you to be nice." in capsys.readouterr().err
    assert (loaded.name, loaded.source, loaded.max_length) == ("tiny", "registry", 128)
    assert loaded.notice == "Tiny asks you to be nice."
    assert loaded.revision.startswith("tiny-part0 1.0 gguf ")
    assert [row.here for row in list_models() if row.name == "tiny"] == ["yes"]
    assert {news[0].split()[0] for news in seen} == {"downloading", "unpacking", "converting"}
    assert all(0 <= done <= total for _, done, total in seen)
    assert (shelf.info.folder / "LICENSE").read_text() == "free"
    assert [p.name for p in shelf.info.folder.parent.iterdir() if "download" in p.name] == []
    again = load("tiny", dtype=torch.bfloat16)
    assert shelf.downloads() == 2
    assert again.model.dtype == torch.bfloat16
    assert again.sha256 == loaded.sha256
    assert not loaded.model.training


def test_weights_and_tokens_are_those_of_the_gguf_file(shelf, gguf_file):
    loaded = load("tiny")
    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    text = "hello there,\n the shed"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert torch.equal(loaded.tokenizer(text, return_tensors="pt")["input_ids"], ids)
    assert 256 in ids  # the merge "he"
    wanted = model.state_dict()
    found = loaded.model.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)


def test_gguf_without_a_tensor_is_refused(tmp_path, damaged_gguf):
    with pytest.raises(ConfigError, match=r"has no values for model\.layers\.0\.mlp\.up_proj"):
        convert.convert_gguf(damaged_gguf, tmp_path, name="bad")


def test_folder(tmp_path):
    folder = save_tiny_model(tmp_path / "mine", "qwen3", seed=2)
    loaded = load(folder)
    assert (loaded.name, loaded.source, loaded.revision) == ("mine", "folder", None)
    assert loaded.max_length == 4096
    assert len(loaded.sha256) == 64
    wanted = tiny_model("qwen3", seed=2).model.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in loaded.model.state_dict().items())
    other = save_tiny_model(tmp_path / "other", "qwen3", seed=3)
    assert load(str(other)).sha256 != loaded.sha256


def test_folder_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_model("smollm2-135m")
    assert load("smollm2-135m").source == "folder"


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json.*Give that folder"):
        load(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "no weights", "no tokenizer", "bad config"])
def test_damaged_folder(tmp_path, damage):
    folder = save_tiny_model(tmp_path / "mine")
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"transformers cannot load .*mine \(.*copy it whole"):
        load(folder)


def test_folder_without_some_weights(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_tiny_model(tmp_path / "mine", layers=2)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    kept = {key: value for key, value in weights.items() if key != name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"no values for {name} \(1 in all\)"):
        load(folder)
    weights[name] = weights[name][:, :5].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"transformers cannot load .*mismatch"):
        load(folder)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_tied_heads_are_no_missing_weights(tmp_path, arch):
    assert load(save_tiny_model(tmp_path, arch)).model.config.vocab_size == 259


def test_pickled_weights_are_refused(tmp_path):
    folder = save_tiny_model(tmp_path / "mine")
    model = tiny_model().model
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="transformers cannot load"):
        load(folder)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"'smolm2-135m' is neither.*mean 'smollm2-135m'"):
        load("smolm2-135m")


def test_hub_name_that_cannot_be_had(monkeypatch):
    def refuse(name, **settings):
        assert name == "owner/model"
        raise OSError("We couldn't connect to the hub.\nMore lines.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(DownloadError, match=r"as a hub name it cannot be had \(We couldn't") as e:
        load("owner/model")
    assert "gemma3-270m, smollm2-135m" in str(e.value)
    assert "More lines" not in str(e.value)


def test_hub_name(monkeypatch, tmp_path):
    folder = save_tiny_model(tmp_path / "mine")
    original = transformers.AutoModelForCausalLM.from_pretrained
    tokenizer = transformers.AutoTokenizer.from_pretrained

    def serve(name, **settings):
        model, report = original(folder, **settings)
        model.config._commit_hash = "abc123"
        return model, report

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", serve)
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda name, **s: tokenizer(folder, **s)
    )
    loaded = load("owner/model")
    assert loaded[2:6] == ("owner/model", "hub", "abc123", None)


@pytest.mark.parametrize("module", ["transformers", "gguf"])
def test_missing_extra(shelf, monkeypatch, module):
    find_spec = convert.importlib.util.find_spec
    monkeypatch.setattr(
        convert.importlib.util,
        "find_spec",
        lambda name: None if name == module else find_spec(name),
    )
    with pytest.raises(MissingExtraError, match=r"longspan\[hf\]"):
        fetch("tiny")
    assert shelf.downloads() == 0


def test_table_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import longspan;"
        "print([row.name for row in longspan.models.list_models()])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['smollm2-135m', 'gemma3-270m']"
