"""convert_infini: plain keys, equality inside a segment, streams, adapters, training."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from tiny_models import COMMON, distance, padded, positions, tiny, tokens
from transformers import DynamicCache

from longspan import ConfigError, InfiniConfig, InfiniState, LongspanWarning, UnsupportedError
from longspan.errors import PatchError
from longspan.hf import (
    convert_infini,
    infini_calls,
    load_adapter,
    make_cache,
    patch,
    rotation,
    save_adapter,
)
from longspan.hf.infini_layer import InfiniLayer
from longspan.nn import gate_parameter_groups, gate_statistics

KINDS = ["llama", "qwen3", "gemma3", "phi", "glm4", "gpt_neox", "mistral"]
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
        "original_max_position_embeddings": 32}  # fmt: skip
CLOSE = 2e-5


def run(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def in_chunks(model, ids, sizes, cache=None, **inputs):
    cache = make_cache(model) if cache is None else cache
    with torch.no_grad():
        parts = [model(c, past_key_values=cache, **inputs).logits for c in ids.split(sizes, 1)]
    return torch.cat(parts, 1)


@pytest.fixture
def model():
    return tiny()


def noted_calls(monkeypatch):
    """What reaches the mechanism: its keyword arguments, call by call."""
    calls = []
    inner = infini_calls.infini_attention

    def note(query, key, value, **rest):
        calls.append({"query": query, "key": key, "value": value, **rest})
        return inner(query, key, value, **rest)

    monkeypatch.setattr(infini_calls, "infini_attention", note)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "changes", "query_of", "key_of"),
    [
        ("llama", {}, "q_proj", "k_proj"),
        ("llama", {"rope_parameters": YARN}, "q_proj", "k_proj"),
        ("qwen3", {}, "q_norm", "k_norm"),
        ("gemma3", {}, "q_norm", "k_norm"),
        ("phi", {}, "q_proj", "k_proj"),
        ("glm4", {}, "q_proj", "k_proj"),
    ],
    ids=["llama", "llama-yarn", "qwen3", "gemma3", "phi", "glm4"],
)
def test_memory_sees_the_projections_before_rotation(monkeypatch, dtype, kind, changes, query_of,
                                                     key_of):  # fmt: skip
    model, ids = tiny(kind, **changes).to(dtype), tokens(2, 14)
    wanted, calls = {}, noted_calls(monkeypatch)
    with convert_infini(model, 6):
        attention = [m for m in model.modules() if hasattr(m, "longspan_gate")]
        for name in (query_of, key_of):
            part = getattr(attention[0], name)
            part.register_forward_hook(lambda m, i, out, name=name: wanted.update({name: out}))
        far = torch.arange(40, 54)[None]  # not the first positions
        calls.clear()  # of the check of the patch
        run(model, input_ids=ids, position_ids=far)
    assert len(attention) == 2
    for name, keyword, rotated in (
        (query_of, "memory_query", "query"), (key_of, "memory_key", "key"),
    ):  # fmt: skip
        plain = calls[0][keyword]
        raw = wanted[name]
        if raw.ndim == 3:
            raw = raw.unflatten(-1, (-1, plain.shape[-1])).transpose(1, 2)
        elif raw.shape[1] != plain.shape[1]:
            raw = raw.transpose(1, 2)
        largest = raw.abs().max()
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 0.012}[dtype] * float(largest)
        torch.testing.assert_close(plain, raw, rtol=0, atol=tolerance)
        assert (calls[0][rotated] - raw).abs().max() > 0.1 * largest  # rotation matters here
        assert plain.dtype is dtype


def test_yarn_lengthens_what_it_turns():
    """The case above is one in which a^2 is not 1."""
    rotary = tiny(rope_parameters=YARN).model.rotary_emb
    cos, sin = rotary(torch.zeros(1), torch.arange(4)[None])
    assert (cos**2 + sin**2).mean() > 1.2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["none", "left", "right", "both"])
def test_one_segment_is_the_base_model(kind, side):
    model, mask = tiny(kind), padded(side)
    ids = torch.where(mask.bool(), tokens(3), 0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
    expected = run(model, **inputs)
    with convert_infini(model, 14):
        assert distance(run(model, **inputs), expected, mask) < CLOSE
        chunks = in_chunks(model, tokens(1), [5, 1, 8])
        assert distance(chunks, run(model, input_ids=tokens(1))) < CLOSE
    with convert_infini(model, 5, gate_start=0.0):
        assert distance(run(model, **inputs), expected, mask) > 0.01
    assert torch.equal(run(model, **inputs), expected)


@pytest.mark.parametrize("kind", ["llama", "glm4", "phi"])
@pytest.mark.parametrize("local", ["segment", "sliding"])
def test_closed_gates_leave_attention_inside_segments(kind, local):
    """Several segments against the base model under a mask of blocks, which knows no longspan."""
    model, ids, length = tiny(kind), tokens(2, 23), 5
    segment = torch.arange(23) // length
    behind = segment[:, None] - segment[None, :]
    seen = (behind >= 0) & (behind <= (local == "sliding"))
    seen &= torch.ones(23, 23, dtype=torch.bool).tril()
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    expected = run(model, input_ids=ids, attention_mask=mask.expand(2, -1, -1, -1))
    with convert_infini(model, length, local=local, gate_start=-1e9):
        assert distance(run(model, input_ids=ids), expected) < CLOSE
        far = torch.arange(60, 83)[None]
        assert distance(run(model, input_ids=ids, position_ids=far), expected) < 1e-4
        assert distance(in_chunks(model, ids, [3, 1, 12, 7]), expected) < CLOSE


@pytest.mark.parametrize("sizes", [[3, 20], [3, 1, 12, 7], [1] * 23], ids=str)
def test_streams_that_begin_at_other_positions(model, sizes):
    """Keys of the first segment keep the model's positions, in whichever chunk they come."""
    ids, far, seen, parts = tokens(2, 23), torch.arange(60, 83)[None], 0, []
    with convert_infini(model, 5, gate_start=0.0):
        expected = run(model, input_ids=ids)
        cache = make_cache(model)
        for size in sizes:
            part = slice(seen, seen + size)
            parts.append(run(model, input_ids=ids[:, part], position_ids=far[:, part],
                             past_key_values=cache))  # fmt: skip
            seen += size
    assert distance(torch.cat(parts, 1), expected) < 1e-4


def test_positions_start_again_in_each_segment(monkeypatch, model):
    """Angles do not grow with the length: segment 3 sees what segment 1 would."""
    calls = noted_calls(monkeypatch)
    ids = tokens(1, 6).repeat(1, 4)
    with convert_infini(model, 6, layers=[0]):
        run(model, input_ids=ids)
    key = calls[-1]["key"]
    for segment in range(1, 4):
        again = key[:, :, 6 * segment : 6 * segment + 6]
        torch.testing.assert_close(again, key[:, :, :6], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("update", ["linear", "delta", "delta_corrected", "gated_delta"])
def test_chunks_of_any_size_equal_the_whole(kind, update):
    model, ids = tiny(kind), tokens(2, 31)
    with convert_infini(model, 4, update=update):
        expected = run(model, input_ids=ids)
        for sizes in ([31], [1] * 31, [3, 9, 1, 18]):
            assert distance(in_chunks(model, ids, sizes), expected) < CLOSE


def test_far_tokens_reach_later_ones_through_the_memory_only(model):
    ids = tokens(1, 24)
    changed = ids.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 61
    for gate, reaches in ((0.0, True), (-1e9, False)):
        with convert_infini(model, 4, gate_start=gate):
            difference = (run(model, input_ids=changed) - run(model, input_ids=ids)).abs().amax(-1)
        assert difference[0, :2].max() == 0
        assert (difference[0, 12:].max() > 1e-3) == reaches
        if not reaches:
            assert difference[0, 4:].max() < 1e-6


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}], ids=str)
def test_generate_in_bounded_memory(model, side, settings):
    ids, mask = tokens(3, 10), padded(side, 3, 10)
    ids = torch.where(mask.bool(), ids, 0)
    common = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, **settings}
    with convert_infini(model, 4, gate_start=0.0):
        whole = {name: v for name, v in common.items() if name != "prefill_chunk_size"}
        expected = model.generate(ids, use_cache=False, **whole)
        cache = make_cache(model)
        actual = model.generate(ids, past_key_values=cache, **common)
    assert torch.equal(actual, expected)
    for layer in cache.layers:
        assert isinstance(layer, InfiniLayer)
        assert all(isinstance(state, InfiniState) for state in layer.states)
        assert all(state.key.shape[2] < 4 for state in layer.states)
    assert cache.get_seq_length() == 18


def test_a_padded_row_gives_what_it_gives_alone(model):
    mask = padded("left", 3, 14)
    ids = torch.where(mask.bool(), tokens(3), 0)
    with convert_infini(model, 4, gate_start=0.0):
        together = run(model, input_ids=ids, attention_mask=mask, position_ids=positions(mask))
        streamed = in_chunks_padded(model, ids, mask, [6, 1, 7])
        for row in range(3):
            real = mask[row].bool()
            alone = run(model, input_ids=ids[row : row + 1, real])
            assert distance(together[row : row + 1, real], alone) < CLOSE
            assert distance(streamed[row : row + 1, real], alone) < CLOSE


def in_chunks_padded(model, ids, mask, sizes):
    cache, parts, seen = make_cache(model), [], 0
    where = positions(mask)
    for size in sizes:
        stop = seen + size
        with torch.no_grad():
            parts.append(model(
                ids[:, seen:stop], attention_mask=mask[:, :stop], past_key_values=cache,
                position_ids=where[:, seen:stop],
            ).logits)  # fmt: skip
        seen = stop
    return torch.cat(parts, 1)


def test_packed_documents_do_not_see_each_other(model):
    first, second = tokens(1, 9), tokens(1, 13, seed=5)
    where = torch.cat((torch.arange(9), torch.arange(13)))[None]
    with convert_infini(model, 4, gate_start=0.0):
        packed = run(model, input_ids=torch.cat((first, second), 1), position_ids=where,
                     use_cache=False)  # fmt: skip
        apart = torch.cat([run(model, input_ids=part) for part in (first, second)], 1)
        assert distance(packed, apart) < CLOSE
        with pytest.raises(UnsupportedError, match="packed documents"):
            run(model, input_ids=torch.cat((first, second), 1), position_ids=where,
                past_key_values=make_cache(model))  # fmt: skip


def test_a_copy_at_a_boundary_is_a_prefix_snapshot(model):
    """One prompt read once, several continuations, none of which disturbs the others."""
    ids = tokens(1, 16)
    with convert_infini(model, 4, gate_start=0.0):
        expected = run(model, input_ids=ids)
        cache = make_cache(model)
        in_chunks(model, ids[:, :8], [8], cache)
        assert all(layer.states[0].at_boundary for layer in cache.layers)
        first = copy.deepcopy(cache)
        in_chunks(model, tokens(1, 8, seed=8), [8], cache)
        assert distance(in_chunks(model, ids[:, 8:], [3, 5], first), expected[:, 8:]) < CLOSE


def test_state_does_not_grow(model):
    sizes = set()
    with convert_infini(model, 4):
        for count in (43, 203):
            cache = make_cache(model)
            in_chunks(model, tokens(1, count), [count - 1, 1], cache)
            sizes.add(sum(layer.states[0].num_bytes for layer in cache.layers))
    assert len(sizes) == 1


def test_crop_inside_a_segment_and_not_past_a_fold(model):
    ids = tokens(1, 12)
    with convert_infini(model, 4, gate_start=0.0):
        expected = run(model, input_ids=ids)
        cache = make_cache(model)
        in_chunks(model, torch.cat((ids[:, :9], tokens(1, 2, seed=9)), 1), [11], cache)
        cache.crop(-2)
        assert cache.get_seq_length() == 9
        assert distance(in_chunks(model, ids[:, 9:], [3], cache), expected[:, 9:]) < CLOSE
        with pytest.raises(UnsupportedError, match="folded into the memory, which cannot be undo"):
            cache.crop(-1)


def test_assisted_decoding_stops_at_a_fold(model):
    """Inside a segment drafts are taken back; a draft that crosses into the memory refuses."""
    assistant = tiny(num_hidden_layers=1)
    inputs = {"input_ids": tokens(1, 6), "do_sample": False, "assistant_model": assistant}
    with convert_infini(model, 64):
        expected = model.generate(tokens(1, 6), do_sample=False, max_new_tokens=20, use_cache=False)
        actual = model.generate(**inputs, max_new_tokens=20, past_key_values=make_cache(model))
        assert torch.equal(actual, expected)
    with convert_infini(model, 4), pytest.raises(UnsupportedError, match="cannot be undone"):
        model.generate(**inputs, max_new_tokens=20, past_key_values=make_cache(model))


def test_rows_are_requests_of_their_own(model):
    ids = tokens(3, 11)
    with convert_infini(model, 4, gate_start=0.0):
        expected = run(model, input_ids=ids)
        cache = make_cache(model)
        in_chunks(model, ids[:, :6], [6], cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        chosen = in_chunks(model, ids[[2, 0], 6:], [5], cache)
        assert distance(chosen, expected[[2, 0], 6:]) < CLOSE
        cache.reset()
        assert cache.get_seq_length() == 0
        assert distance(in_chunks(model, ids, [11], cache), expected) < CLOSE
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        cache.batch_repeat_interleave(2)
        assert [layer.batch for layer in cache.layers] == [6, 6]


def test_caches_that_do_not_fit_are_refused(model):
    ids = tokens(1, 8)
    with convert_infini(model, 4):
        cache = DynamicCache()
        run(model, input_ids=ids, past_key_values=cache)
        with pytest.raises(UnsupportedError, match=r"make_cache\(model\)"):
            run(model, input_ids=ids[:, :1], past_key_values=cache)
        mine = make_cache(model)
        run(model, input_ids=ids, past_key_values=mine)
    with pytest.raises(UnsupportedError, match="holds is a memory, not keys"):
        run(model, input_ids=ids[:, :1], past_key_values=mine)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_adapter_round_trip(tmp_path, kind):
    model, ids = tiny(kind), tokens(2, 14)
    with convert_infini(model, 5, update="delta", impl="eager"):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("longspan_gate"):
                    parameter.normal_()
        expected = run(model, input_ids=ids)
        save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "longspan_adapter.json", "longspan_adapter.safetensors",
    ]  # fmt: skip
    fresh = tiny(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        applied = load_adapter(fresh, tmp_path, segment_length=5)
    assert torch.equal(run(fresh, input_ids=ids), expected)
    assert {c.update for c in applied.plan.configs.values()} == {"delta"}
    applied.undo()
    with pytest.raises(ConfigError, match="segment_length of layer .* has 5, the call has 8"):
        load_adapter(fresh, tmp_path, segment_length=8)
    with pytest.raises(ConfigError, match="model_type"):
        load_adapter(tiny("qwen3"), tmp_path)
    with pytest.raises(ConfigError, match="hidden_size"):
        load_adapter(tiny(kind, hidden_size=64), tmp_path)
    with pytest.raises(ConfigError, match="gate"):
        load_adapter(tiny(kind, num_attention_heads=8), tmp_path)
    header = json.loads((tmp_path / "longspan_adapter.json").read_text())
    next(iter(header["layers"].values()))["settings"]["segment_length"] = 0
    (tmp_path / "longspan_adapter.json").write_text(json.dumps(header))
    with pytest.raises(ConfigError, match="segment_length is 0"):
        load_adapter(fresh, tmp_path)
    assert not any(hasattr(module, "longspan_gate") for module in fresh.modules())


def test_weights_and_adapter_on_disk(tmp_path, model):
    """A model trained as a whole: save_pretrained has the weights, the adapter has the rest."""
    ids = tokens(2, 14)
    with convert_infini(model, 5):
        step(model, ids, lr=0.05)
        expected = run(model, input_ids=ids)
        save_adapter(model, tmp_path)
        applied_names = [n for n, _ in model.named_parameters() if "longspan" in n]
    model.save_pretrained(tmp_path)
    assert applied_names
    fresh = type(model).from_pretrained(tmp_path)
    with load_adapter(fresh, tmp_path):
        assert distance(run(fresh, input_ids=ids), expected) < CLOSE


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def step(model, ids, lr=0.01, **groups):
    model.train()
    groups = gate_parameter_groups(model, lr=lr, gate_lr=lr, **groups)
    optimizer = torch.optim.AdamW(groups)
    loss = loss_of(model, ids)
    loss.backward()
    optimizer.step()
    model.eval()
    return float(loss.detach())


def test_gates_alone_can_be_trained(model):
    ids = tokens(2, 20)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with convert_infini(model, 4, gate_start="zero", train="gates"):
        groups = gate_parameter_groups(model, lr=1e-3, gate_lr=1e-2, weight_decay=0.1)
        assert [len(group["params"]) for group in groups] == [0, 2]
        assert groups[1]["weight_decay"] == 0
        losses = [step(model, ids, lr=0.05) for _ in range(8)]
        assert losses[-1] < losses[0]
        shares = gate_statistics(model)
        assert len(shares) == 2
        assert all(share["min"] != share["max"] for share in shares.values())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.requires_grad


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_everything(model, checkpointing):
    ids = tokens(2, 20)
    if checkpointing:
        model.gradient_checkpointing_enable()
    with convert_infini(model, 4):
        model.train()
        loss_of(model, ids).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        if checkpointing:
            expected = {n: p.grad.clone() for n, p in model.named_parameters()}
            model.zero_grad()
            model.gradient_checkpointing_disable()
            loss_of(model, ids).backward()
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.grad, expected[name])


def test_low_rank_adapters_and_gates_train_together(model):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped, ids = peft.get_peft_model(model, lora), tokens(2, 20)
    with convert_infini(wrapped, 4):
        groups = gate_parameter_groups(wrapped, lr=0.05, gate_lr=0.05)
        assert [len(group["params"]) for group in groups] == [8, 2]
        losses = [step(wrapped, ids, lr=0.05) for _ in range(6)]
        assert losses[-1] < losses[0]
        expected = run(wrapped, input_ids=ids, use_cache=False)
        assert distance(in_chunks(wrapped, ids, [7, 13], make_cache(wrapped)), expected) < CLOSE


def test_gradients_flow_through_the_memory(model):
    """The loss of the last segment reaches the embedding of a token of the first."""
    ids = tokens(1, 20)
    with convert_infini(model, 4, gate_start=0.0, layers=[0]):
        hidden = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=hidden, use_cache=False).logits
        logits[:, 17].sum().backward()
    assert (hidden.grad[0, :4].abs().amax(-1) > 0).all()


def test_gates_start_spread_and_in_float32():
    model = tiny().to(torch.bfloat16)
    with convert_infini(model, 4) as applied:
        gate = model.model.layers[0].self_attn.longspan_gate
        assert gate.dtype is torch.float32
        assert gate.tolist() == [-3, -1, 1, 3]
        run(model, input_ids=tokens())
        assert "infini" in str(applied)


def test_undo_leaves_no_trace(model):
    import transformers.models.llama.modeling_llama as file

    rotate, names = file.apply_rotary_pos_emb, set(dict(model.named_parameters()))
    convert_infini(model, 4).undo()
    assert file.apply_rotary_pos_emb is rotate
    assert set(dict(model.named_parameters())) == names
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    from longspan.hf.compat import attention_functions, mask_functions

    assert "longspan_probe" not in attention_functions()
    assert "longspan_probe" not in mask_functions()


def test_what_cannot_be_converted_is_refused(monkeypatch, model):
    from longspan.testing.models import tiny_model

    with pytest.raises(PatchError, match="learned position vectors"):
        convert_infini(tiny_model("gpt2").model, 4)
    with pytest.raises(PatchError, match="patched already"):
        with convert_infini(model, 4):
            convert_infini(model, 4)
    with pytest.raises(ConfigError, match="train: 'gate' came"):
        convert_infini(model, 4, train="gate")
    with pytest.raises(ConfigError, match="segment_length is 0"):
        convert_infini(model, 0)
    import transformers.models.llama.modeling_llama as file

    inner = file.apply_rotary_pos_emb
    monkeypatch.setattr(
        file,
        "apply_rotary_pos_emb",
        lambda q, k, cos, sin: [t + 0.5 for t in inner(q, k, cos, sin)],
    )
    with pytest.raises(PatchError, match="with -sin does not undo it"):
        convert_infini(model, 4)
    assert not any(hasattr(module, "longspan_gate") for module in model.modules())
    with pytest.raises(UnsupportedError, match="sliding_window"):
        sliding = tiny("mistral_sliding")
        with convert_infini(sliding, 4, layers="every"):
            run(sliding, input_ids=tokens())


def test_sequences_over_ranks_do_not_take_rotated_keys(model):
    from longspan.hf import context_parallel

    with (
        pytest.raises(UnsupportedError, match="keys come rotated, which must not enter the mem"),
        context_parallel(model, InfiniConfig(), group=None, layout=None),
    ):
        pass


def test_layers_that_turn_nothing_need_nothing_taken_back(monkeypatch):
    """SmolLM3 leaves positions out in some layers, though it hands them angles."""
    import transformers

    config = transformers.SmolLM3Config(**COMMON, no_rope_layers=[1, 0], attn_implementation="sdpa")
    torch.manual_seed(7)
    model, ids = transformers.SmolLM3ForCausalLM(config).eval(), tokens(2, 14)
    expected, calls = run(model, input_ids=ids), noted_calls(monkeypatch)
    with convert_infini(model, 14):
        calls.clear()
        assert distance(run(model, input_ids=ids), expected) < CLOSE
    assert (calls[0]["memory_key"] - calls[0]["key"]).abs().max() > 0.1
    assert torch.equal(calls[1]["memory_key"], calls[1]["key"])
    with convert_infini(model, 4):
        whole = run(model, input_ids=ids)
        assert distance(in_chunks(model, ids, [3, 6, 5]), whole) < CLOSE


def test_rotation_by_a_function_that_is_not_found_is_refused(monkeypatch, model):
    monkeypatch.setattr(rotation, "ROTATE", "turned_by_something_else")
    with pytest.raises(PatchError, match="positions into its queries without calling"):
        convert_infini(model, 4)
    assert not any(hasattr(module, "longspan_gate") for module in model.modules())


def test_patch_takes_it_too_and_warns(model):
    ids = tokens(2, 14)
    with pytest.warns(LongspanWarning, match="Inputs of one segment stay"):
        applied = patch(model, InfiniConfig(segment_length=14))
    applied.undo()
    with convert_infini(model, 14):
        expected = run(model, input_ids=ids)
    assert distance(run(model, input_ids=ids), expected) < CLOSE


def test_compiled(model):
    ids = tokens(2, 14)
    with convert_infini(model, 4):
        expected = run(model, input_ids=ids, use_cache=False)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert distance(run(compiled, input_ids=ids, use_cache=False), expected) < CLOSE


@pytest.mark.models
def test_a_pretrained_model_stays_what_it_was():
    from longspan.models import load

    loaded = load("smollm2-135m")
    ids = loaded.tokenizer("It was the best of times, " * 20, return_tensors="pt").input_ids
    expected = run(loaded.model, input_ids=ids)
    with convert_infini(loaded.model, ids.shape[1]):
        torch.testing.assert_close(run(loaded.model, input_ids=ids), expected, rtol=1e-3, atol=1e-3)
        streamed = in_chunks(loaded.model, ids, [ids.shape[1] - 3, 3])
        torch.testing.assert_close(streamed, expected, rtol=1e-3, atol=1e-3)
