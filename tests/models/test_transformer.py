"""The reference transformer: causal, streaming equals whole, packed equals apart, it learns."""

import dataclasses
import inspect

import pytest
import torch

from longspan import ExactConfig, InfiniConfig, WindowConfig
from longspan.errors import ConfigError, LongspanError, ShapeError, UnsupportedError
from longspan.mechanisms import MECHANISMS
from longspan.models import (
    Transformer,
    TransformerConfig,
    generate,
    next_token_loss,
)
from longspan.models.attend import CausalAttention
from longspan.nn import gate_parameter_groups

WINDOW = WindowConfig(window=5, num_sinks=2)
VARIANTS = {
    "rope": {},
    "none": {"positions": "none"},
    "alibi": {"positions": "alibi"},
    "forget": {"positions": "forget"},
    "forget-gqa": {"positions": "forget", "kv_heads": 2},
    "gqa": {"kv_heads": 2, "qk_norm": True},
    "window": {"attention": WINDOW},
    "infini": {"attention": InfiniConfig(segment_length=4), "kv_heads": 2},
    "infini-delta": {"attention": InfiniConfig(segment_length=3, update="delta"), "qk_norm": True},
    "infini-gated": {
        "attention": InfiniConfig(segment_length=4, update="gated_delta"),
        "kv_heads": 2,
    },
    "mixed": {"attention": (WINDOW, ExactConfig(), WINDOW), "layers": 3, "kv_heads": 1},
    "untied": {"tie_embeddings": False, "head_dim": 6, "mlp_width": 40},
}


def make(variant="rope", *, seed=0, dtype=torch.float64, **settings):
    sizes = {"vocab_size": 50, "width": 32, "layers": 2, "heads": 4}
    config = TransformerConfig(**{**sizes, **VARIANTS[variant]})
    model = Transformer(config, seed=seed, **settings).to(dtype)
    with torch.no_grad():  # large enough for attention to matter
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def tokens(*shape, seed=0):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=list(VARIANTS))
def model(request):
    return make(request.param)


def close(found, wanted, tolerance=1e-9):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_future_tokens_change_nothing(model):
    ids = tokens(2, 20)
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 50
    with torch.no_grad():
        first, second = model(ids), model(changed)
    close(second[:, :12], first[:, :12])
    assert (second[:, 12:] - first[:, 12:]).abs().amax(-1).min() > 1e-3


def test_past_tokens_change_later_ones(model):
    ids = tokens(1, 12)
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    with torch.no_grad():
        difference = (model(changed) - model(ids)).abs().amax(-1)[0]
    assert difference[9:].min() > 1e-3


@pytest.mark.parametrize("sizes", [(23,), (1,) * 23, (7, 16), (1, 9, 1, 12)])
def test_chunks_equal_the_whole(model, sizes):
    ids = tokens(2, 23)
    state, parts = None, []
    with torch.no_grad():
        for chunk in ids.split(sizes, dim=1):
            logits, state = model.forward_chunk(chunk, state)
            parts.append(logits)
        close(torch.cat(parts, dim=1), model(ids))
    assert state.seen == 23


def test_a_gated_memory_is_written_as_strongly_as_each_token_says():
    """What the layer projects reaches the memory: other biases, another memory."""
    model, ids = make("infini-gated"), tokens(1, 12)
    first = model.forward_chunk(ids).final_state.layers[0].memory
    with torch.no_grad():
        model.blocks[0].attention.write.bias[:2] += 1.0
        stronger = model.forward_chunk(ids).final_state.layers[0].memory
        model.blocks[0].attention.write.bias[2:] -= 8.0
        forgetful = model.forward_chunk(ids).final_state.layers[0].memory
    assert (stronger - first).abs().max() > 0.01
    assert forgetful.norm() < 0.9 * stronger.norm()


def test_positions_do_not_reach_the_memory():
    """Rotated keys would: the model with positions off gives other keys, but the same memory."""
    model, ids = make("infini"), tokens(1, 12)
    first = model.forward_chunk(ids).final_state.layers[0]
    model.config = dataclasses.replace(model.config, positions="none")
    second = model.forward_chunk(ids).final_state.layers[0]
    close(second.memory, first.memory)
    close(second.normaliser, first.normaliser)


def test_gates_have_their_own_optimizer_group():
    model = make("infini")
    groups = gate_parameter_groups(model, lr=1e-3, gate_lr=1e-2, weight_decay=0.1)
    assert [tuple(p.shape) for p in groups[1]["params"]] == [(4,), (4,)]
    assert groups[1]["params"][0][0] == -3  # spread, and not drawn with the weights


def test_window_layers_keep_a_window():
    state = make("mixed").forward_chunk(tokens(1, 40)).final_state
    window, exact, _ = state.layers
    assert window.key.shape[2] == WINDOW.num_sinks + WINDOW.window - 1
    assert exact.key.shape[2] == 40


def test_num_logits():
    model, ids = make(), tokens(2, 9)
    close(model.forward_chunk(ids, num_logits=2).logits, model(ids)[:, -2:])


def test_state_on_disk(model, tmp_path):
    ids = tokens(2, 15)
    state = model.forward_chunk(ids[:, :9]).final_state
    state.save(tmp_path / "state")
    loaded = model.load_state(tmp_path / "state")
    assert loaded.seen == 9
    expected = model.forward_chunk(ids[:, 9:], state).logits
    assert torch.equal(model.forward_chunk(ids[:, 9:], loaded).logits, expected)


def test_state_of_other_settings_is_refused(tmp_path):
    make("window").forward_chunk(tokens(1, 5)).final_state.save(tmp_path)
    with pytest.raises(ConfigError, match="KeyValueCache"):
        make("rope").load_state(tmp_path)


def test_packed_documents_equal_documents_apart(model):
    lengths = [4, 1, 17, 9]
    ids = tokens(sum(lengths))
    cu = torch.tensor([0, 4, 5, 22, 31], dtype=torch.int32)
    with torch.no_grad():
        packed = model(ids, cu_seqlens=cu, max_seqlen=17)
        apart = [model(document[None])[0] for document in ids.split(lengths)]
        close(packed, torch.cat(apart))
        close(model(ids, cu_seqlens=cu), packed)
    loss = next_token_loss(packed, ids, cu_seqlens=cu)
    sums = [
        next_token_loss(logits[None], document[None]) * (len(document) - 1)
        for logits, document in zip(apart, ids.split(lengths), strict=True)
        if len(document) > 1
    ]
    close(loss, (sum(sums) / (31 - 4)).float(), 1e-5)


def test_loss_with_an_empty_document_at_the_end():
    model, ids = make(), tokens(6)
    logits = model(ids, cu_seqlens=torch.tensor([0, 6], dtype=torch.int32))
    whole = next_token_loss(logits, ids)
    empty = torch.tensor([0, 6, 6], dtype=torch.int32)
    assert torch.equal(next_token_loss(logits, ids, cu_seqlens=empty), whole)


def test_loss_is_the_mean_in_nats():
    logits, ids = torch.zeros(2, 5, 50), tokens(2, 5)
    assert next_token_loss(logits, ids).item() == pytest.approx(3.912023, abs=1e-5)


def test_gradient_reaches_every_parameter(model):
    ids = tokens(2, 16)
    next_token_loss(model(ids), ids).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_checkpointing_changes_no_gradient(model):
    ids = tokens(2, 16)
    next_token_loss(model(ids), ids).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing = True
    next_token_loss(model(ids), ids).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_checkpointing_keeps_less():
    held = []
    for flag in (False, True):
        model, ids = make(gradient_checkpointing=flag), tokens(1, 64)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            model(ids)
        held.append(sum(saved))
    assert held[1] < held[0] / 2


def test_same_seed_same_weights():
    before = torch.get_rng_state()
    first, second, other = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(before, torch.get_rng_state())
    states = [model.state_dict() for model in (first, second, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["embedding.weight"], states[2]["embedding.weight"])


def test_what_writes_to_the_residual_stream_starts_smaller():
    model = Transformer(TransformerConfig(vocab_size=500, width=128, layers=8, heads=2))
    block = model.blocks[0]
    for weight in (block.attention.out.weight, block.mlp.down.weight):
        assert weight.std().item() == pytest.approx(0.02 / 16**0.5, rel=0.05)
    for weight in (block.attention.query.weight, block.mlp.up.weight, model.embedding.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_number_of_parameters():
    config = TransformerConfig(
        vocab_size=100, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48
    )
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert Transformer(config).num_parameters == 100 * 32 + 2 * layer + 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(model, tmp_path, dtype):
    model = model.to(dtype)
    model.save(tmp_path / "model")
    loaded = Transformer.load(tmp_path / "model")
    assert loaded.config == model.config
    assert loaded.num_parameters == model.num_parameters
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    ids = tokens(2, 11)
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    text = (tmp_path / "model" / "config.json").read_text()
    assert TransformerConfig.from_json(text) == model.config


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_load_what_is_no_model(tmp_path, damage):
    make().save(tmp_path)
    path = tmp_path / "model.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match=r"Transformer\.load: .*Copy it again|has format None"):
        Transformer.load(tmp_path)


@pytest.mark.parametrize("variant", ["alibi", "mixed"])
def test_compiles_without_graph_breaks(variant):
    model, ids = make(variant), tokens(2, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(compiled(ids), model(ids))


def test_low_precision_stays_near_float32():
    model, ids = make("mixed", dtype=torch.float32), tokens(2, 30)
    with torch.no_grad():
        wanted = model(ids)
        found = model.to(torch.bfloat16)(ids)
    assert found.dtype == torch.bfloat16
    assert (found - wanted).norm() / wanted.norm() < 0.1


def test_generate_greedy_equals_full_forwards(model):
    prompt = tokens(2, 6)
    expected = prompt
    with torch.no_grad():
        for _ in range(8):
            expected = torch.cat((expected, model(expected)[:, -1].argmax(-1)[:, None]), dim=1)
    assert torch.equal(generate(model, prompt, 8), expected)
    assert torch.equal(generate(model, prompt, 8, chunk_size=4), expected)
    assert torch.equal(generate(model, prompt, 0), prompt)


def test_generate_by_seed():
    model, prompt = make(dtype=torch.float32), tokens(3, 4)
    drawn = generate(model, prompt, 12, temperature=1.0, seed=5)
    assert torch.equal(drawn, generate(model, prompt, 12, temperature=1.0, seed=5))
    assert not torch.equal(drawn, generate(model, prompt, 12, temperature=1.0, seed=6))
    alone = generate(model, prompt[1:2], 12, temperature=1.0, seed=6)
    assert torch.equal(drawn[1:2], alone)  # row 1 of seed 5 draws with seed 6
    first_only = generate(model, prompt, 12, temperature=3.0, top_k=1, seed=5)
    assert torch.equal(first_only, generate(model, prompt, 12))


def test_generate_draws_the_right_shares():
    model = make(dtype=torch.float32)
    prompt = tokens(1, 4).expand(4000, 4)
    with torch.no_grad():
        scores = model(prompt[:1])[0, -1].div(2.0)
    best = scores.topk(3)
    drawn = generate(model, prompt, 1, temperature=2.0, top_k=3, seed=0)[:, -1]
    shares = torch.stack([(drawn == token).float().mean() for token in best.indices])
    close(shares, best.values.softmax(-1), 0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1.0}, "drawing needs a seed"),
        ({"temperature": 1.0, "seed": 0, "top_k": 0}, "top_k is 0"),
    ],
)
def test_generate_refuses(settings, message):
    with pytest.raises(ConfigError, match=message):
        generate(make(), tokens(1, 4), 3, **settings)
    with pytest.raises(ConfigError, match="at least one token"):
        generate(make(), tokens(1, 0), 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"layers": 2.0}, "layers is 2.0"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads must divide heads"),
        ({"width": 30, "heads": 4}, "Give head_dim"),
        ({"width": 30, "heads": 2, "head_dim": 15}, "Nearest valid: 16"),
        ({"positions": "rop"}, "Did you mean 'rope'"),
        ({"layers": 3, "attention": (WINDOW,)}, "1 configs for 3 layers"),
        ({"attention": "window"}, "belongs to no mechanism"),
        ({"positions": "alibi", "attention": WINDOW}, "layer 0 has window attention"),
    ],
)
def test_config_refuses(settings, message):
    with pytest.raises(ConfigError, match=message):
        TransformerConfig(**{"vocab_size": 10, **settings})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "longspan-transformer-1"}'])
def test_bad_json(text):
    with pytest.raises(ConfigError, match="the JSON"):
        TransformerConfig.from_json(text)


def test_wrong_axes():
    with pytest.raises(ShapeError, match=r"must be \(B, N\)"):
        make()(tokens(5))
    with pytest.raises(ShapeError, match=r"must be \(total,\)"):
        make()(tokens(1, 5), cu_seqlens=torch.tensor([0, 5], dtype=torch.int32))


@pytest.mark.parametrize("name", list(MECHANISMS))
def test_every_mechanism_trains_or_says_why_not(name):
    config = (
        InfiniConfig(segment_length=16) if name == "infini" else MECHANISMS[name].config_class()
    )
    parameters = inspect.signature(MECHANISMS[name].function).parameters
    settings = TransformerConfig(
        vocab_size=50, width=32, layers=1, heads=2, positions="none", attention=config
    )
    try:
        model = Transformer(settings)
    except UnsupportedError as error:
        assert any(f"needs {p}" in str(error) for p in parameters)  # noqa: PT017
        return
    ids = tokens(2, 40)
    next_token_loss(model(ids), ids).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_mechanism_with_parameters_of_its_own_is_refused(monkeypatch):
    def function(query, key, value, attn_mask=None, *, gate, is_causal=True):
        raise AssertionError("not called")

    mechanism = type(MECHANISMS["exact"])
    monkeypatch.setattr(mechanism, "function", property(lambda self: function))
    with pytest.raises(UnsupportedError, match="needs gate"):
        CausalAttention(ExactConfig(), positions="rope", seed=0, impl="auto")


def test_mechanisms_with_random_inputs_get_a_seed_per_layer(monkeypatch):
    seen = []

    def function(query, key, value, *, is_causal, enable_gqa, query_offset, config, impl, seed=9):
        seen.append(seed)
        return query

    mechanism = type(MECHANISMS["exact"])
    monkeypatch.setattr(mechanism, "function", property(lambda self: function))
    config = TransformerConfig(vocab_size=50, width=32, layers=3, heads=2, attention_seed=4)
    Transformer(config)(tokens(1, 5))
    assert seen == [4, 5, 6]


def test_named_impl_runs_or_raises():
    with pytest.raises(LongspanError, match="triton"):
        make(impl="triton")(tokens(1, 8))
    close(make(impl="reference")(tokens(1, 8)), make()(tokens(1, 8)))


@pytest.mark.parametrize("attention", [ExactConfig(), WindowConfig(window=16, num_sinks=1)])
def test_learns_a_text_by_heart(attention):
    text = b"It was the best of times, it was the worst of times, it was the age of wisdom. "
    ids = torch.tensor([list(text)])
    config = TransformerConfig(vocab_size=256, width=64, layers=2, heads=4, attention=attention)
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        loss = next_token_loss(model(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5
    assert losses[-1] < 0.1
    continued = generate(model.eval(), ids[:, :12], len(text) - 12)
    assert bytes(continued[0].tolist()) == text
