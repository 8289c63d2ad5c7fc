"""Training: gradients equal eager's, checkpointing recomputes the same, LoRA trains."""

from __future__ import annotations

import pytest
import torch
from tiny_models import padded, positions, tiny, tokens

from longspan import ExactConfig, WindowConfig
from longspan.hf import patch

SMALL = WindowConfig(window=3, num_sinks=1)


def gradients(model, **inputs):
    model.zero_grad()
    ids = inputs.pop("input_ids", tokens(3))
    loss = model(ids, labels=ids, **inputs).loss
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, tolerance=1e-5):
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        scale = float(grad.abs().max()) + 1e-3
        assert float((actual[name] - grad).abs().max()) < tolerance * scale * 10, name


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("config", [ExactConfig(), WindowConfig(window=64)], ids=str)
@pytest.mark.parametrize("side", ["none", "left", "both"])
def test_gradients_equal_eager(kind, config, side):
    model = tiny(kind).train()
    mask = padded(side)
    inputs = {"attention_mask": mask, "position_ids": positions(mask)}
    ids = tokens(3)
    real = mask.bool()
    real[:, 1:] &= real[:, :-1]  # what padding predicts differs by design and must not count
    labels = torch.where(real, ids, -100)

    def grads():
        model.zero_grad()
        model(ids, labels=labels, **inputs).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    expected = grads()
    with patch(model, config):
        assert_same(grads(), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("side", ["none", "left"])
def test_gradient_checkpointing(reentrant, side):
    model = tiny().train()
    mask = padded(side)
    inputs = {"attention_mask": mask, "position_ids": positions(mask), "use_cache": False}
    with patch(model, SMALL) as report:
        expected = gradients(model, **inputs)
        assert report.approximate_calls == 2
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        actual = gradients(model, **inputs)
        assert report.approximate_calls == 6  # forward, and again in backward
    for name, grad in expected.items():
        assert torch.equal(actual[name], grad), name


def test_checkpointed_packed_documents():
    model = tiny().train()
    inputs = {
        "input_ids": tokens(1, 8), "use_cache": False,
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]),
    }  # fmt: skip
    expected = gradients(model, **dict(inputs))
    with patch(model, ExactConfig()):
        model.gradient_checkpointing_enable()
        assert_same(gradients(model, **dict(inputs)), expected)


def test_lora_trains_under_a_patch():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny(), config).train()
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    ids = tokens(2, 16)
    with patch(model, SMALL) as report:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        losses = []
        for _ in range(12):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert report.approximate_calls == 24
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name])


def test_lora_gradients_equal_eager():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = peft.get_peft_model(tiny(), config).train()
    expected = gradients(model)
    with patch(model, WindowConfig(window=64)):
        assert_same(gradients(model), expected)


def test_autocast():
    model = tiny()
    with patch(model, SMALL), torch.no_grad():
        expected = model(tokens()).logits
        with torch.autocast("cpu", torch.bfloat16):
            low = model(tokens()).logits
    assert float((low - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = tiny()
    with patch(model, SMALL), torch.no_grad():
        expected = model(tokens()).logits
        low = model.to(dtype)(tokens()).logits
    assert low.dtype is dtype
    assert float((low.float() - expected).norm() / expected.norm()) < 0.1
