"""Adapters: plan, settings and added parameters, saved and loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from tiny_models import distance, tiny, tokens

from longspan import ConfigError, ExactConfig, PatchError, WindowConfig
from longspan.exact.api import exact_attention, exact_attention_varlen, visited_fraction
from longspan.hf import load_adapter, patch, save_adapter
from longspan.mechanisms import MECHANISMS, Mechanism

pytestmark = pytest.mark.filterwarnings("ignore:patch. gated is not an approximation")
SMALL = WindowConfig(window=3, num_sinks=1)


@dataclass(frozen=True, kw_only=True)
class GatedConfig:
    start: float = 0.5


def gated(query, key, value, *args, gate, config, **rest):
    return exact_attention(query, key, value, *args, **rest) * gate[:, None, None].to(query.dtype)


class Gated(Mechanism):
    """Exact attention times a learned gate for each head, as a mechanism with parameters is."""

    config_class = GatedConfig
    function = staticmethod(gated)
    function_varlen = staticmethod(exact_attention_varlen)
    visited_fraction = staticmethod(visited_fraction)

    @staticmethod
    def initial_parameters(config, *, heads, kv_heads, head_dim):
        return {"gate": torch.full((heads,), config.start, dtype=torch.float64)}


@pytest.fixture
def gate_mechanism(monkeypatch):
    entry = Gated(
        name="gated", summary="", paper="", package="exact", config_name="GatedConfig",
        has_parameters=True, on_pretrained=False,
    )  # fmt: skip
    monkeypatch.setitem(MECHANISMS, "gated", entry)


@pytest.fixture
def model():
    return tiny()


def test_plan_and_settings_come_back(model, tmp_path):
    with patch(model, layers={0: SMALL, 1: ExactConfig()}, impl="reference") as report:
        expected = model(tokens()).logits
        save_adapter(model, tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "longspan_adapter.json"
    ]
    with load_adapter(model, tmp_path / "new" / "folder") as loaded:
        assert (loaded.plan, loaded.settings) == (report.plan, {"impl": "reference"})
        assert torch.equal(model(tokens()).logits, expected)
    assert model.config._attn_implementation == "eager"


def test_parameters_are_trained_saved_and_taken_away(model, tmp_path, gate_mechanism):
    names = [name for name, _ in model.named_parameters()]
    with patch(model, GatedConfig(), layers=1) as report:
        gate = model.model.layers[1].self_attn.longspan_gate
        assert (gate.dtype, gate.shape, gate.requires_grad) == (torch.float32, (4,), True)
        assert [n for n, _ in model.named_parameters() if n not in names] == [
            "model.layers.1.self_attn.longspan_gate"
        ]
        ids = tokens()
        model(ids, labels=ids).loss.backward()
        assert gate.grad.abs().min() > 0
        with torch.no_grad():
            gate -= gate.grad
        expected = model(tokens()).logits
        assert report.layers[1].approximate_calls == 2
        save_adapter(model, tmp_path)
    assert [name for name, _ in model.named_parameters()] == names
    with load_adapter(model, tmp_path):
        assert torch.equal(model(tokens()).logits, expected)
    with patch(model, GatedConfig(), layers=1):
        assert distance(model(tokens()).logits, expected) > 1e-4


def test_wrapped_by_peft(model, tmp_path, gate_mechanism):
    peft = pytest.importorskip("peft")
    with patch(model, GatedConfig(start=0.25)):
        expected = model(tokens()).logits
        save_adapter(model, tmp_path)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).eval()
    with load_adapter(wrapped, tmp_path):
        assert distance(wrapped(tokens()).logits, expected) < 1e-6


def test_saving_again_replaces(model, tmp_path, gate_mechanism):
    with patch(model, GatedConfig()):
        save_adapter(model, tmp_path)
    with patch(model, SMALL):
        save_adapter(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["longspan_adapter.json"]
    with load_adapter(model, tmp_path) as loaded:
        assert loaded.plan.configs == {0: SMALL, 1: SMALL}


def test_other_models_are_refused(model, tmp_path, gate_mechanism):
    with patch(model, GatedConfig()):
        save_adapter(model, tmp_path)
    with pytest.raises(ConfigError, match=r"model_type: .* has 'llama', this model has 'qwen3'"):
        load_adapter(tiny("qwen3"), tmp_path)
    longer = tiny(num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"num_attention_layers: .* has 2, this model has 3"):
        load_adapter(longer, tmp_path)
    wider = tiny(num_attention_heads=8)
    with pytest.raises(ConfigError, match=r"layers.0.gate: .* has \(4,\), this model has \(8,\)"):
        load_adapter(wider, tmp_path)
    for other in (longer, wider):
        assert other.config._attn_implementation == "eager"
    (tmp_path / "longspan_adapter.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"layers.0.gate: .* has None"):
        load_adapter(model, tmp_path)


def test_broken_folders(model, tmp_path, gate_mechanism):
    with pytest.raises(FileNotFoundError, match=r"longspan_adapter\.json does not exist"):
        load_adapter(model, tmp_path)
    with patch(model, GatedConfig()):
        save_adapter(model, tmp_path)
    tensors = tmp_path / "longspan_adapter.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:40])
    with pytest.raises(ConfigError, match=r"not a readable safetensors file.*Save the adapter"):
        load_adapter(model, tmp_path)
    header = tmp_path / "longspan_adapter.json"
    data = json.loads(header.read_text())
    data["layers"]["0"]["settings"] = {"stat": 1.0}
    header.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"'gated' has no setting 'stat'. Did you mean 'start'"):
        load_adapter(model, tmp_path)
    for text in ("{", "{}", "[]"):
        header.write_text(text)
        with pytest.raises(ConfigError, match=r"longspan_adapter\.json"):
            load_adapter(model, tmp_path)


def test_what_cannot_be_saved(model, tmp_path):
    with pytest.raises(PatchError, match="not patched; there is no adapter"):
        save_adapter(model, tmp_path)
    report = patch(model, SMALL, verify=False, projections=torch.zeros(2))
    with report, pytest.raises(ConfigError, match=r"'projections'.*pass seeds instead"):
        save_adapter(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_taken_parameter_names_are_refused(model, gate_mechanism):
    model.model.layers[1].self_attn.longspan_gate = 3
    with pytest.raises(PatchError, match="has an attribute 'longspan_gate' already"):
        patch(model, GatedConfig())
    assert model.model.layers[1].self_attn.longspan_gate == 3
    assert not hasattr(model.model.layers[0].self_attn, "longspan_gate")
