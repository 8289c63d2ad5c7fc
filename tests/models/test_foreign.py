"""ChatGLM and Baichuan folders: logits against their arithmetic written out, tokens, LongBench."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from longspan.errors import ConfigError
from longspan.models import load

pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")


TEXT = "the grass is green and the sky is blue while the sun is yellow here we go there and back "
CHATGLM = {
    "model_type": "chatglm", "_name_or_path": "THUDM/chatglm3-6b-32k", "hidden_size": 32,
    "ffn_hidden_size": 48, "num_layers": 2, "num_attention_heads": 4, "multi_query_attention": True,
    "multi_query_group_num": 2, "kv_channels": 8, "padded_vocab_size": 320,
    "layernorm_epsilon": 1e-5, "rmsnorm": True, "add_bias_linear": False, "add_qkv_bias": True,
    "post_layer_norm": True, "apply_residual_connection_post_layernorm": False, "rope_ratio": 50,
    "seq_length": 32768, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
BAICHUAN = {
    "model_type": "baichuan", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "rms_norm_eps": 1e-6, "vocab_size": 320, "hidden_act": "silu",
    "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    home = tmp_path_factory.mktemp("pieces")
    (home / "text.txt").write_text("\n".join([TEXT] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(home / "text.txt"), model_prefix=str(home / "tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return home / "tokenizer.model"


def draw(shapes):
    generator = torch.Generator().manual_seed(0)
    return {
        name: 1 + 0.1 * torch.randn(shape, generator=generator)
        if "norm" in name
        else torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 1)
        for name, shape in shapes.items()
    }


def chatglm_weights():
    shapes = {
        "transformer.embedding.word_embeddings.weight": (320, 32),
        "transformer.encoder.final_layernorm.weight": (32,),
        "transformer.output_layer.weight": (320, 32),
    }
    for layer in range(2):
        home = f"transformer.encoder.layers.{layer}."
        shapes |= {
            home + "input_layernorm.weight": (32,),
            home + "self_attention.query_key_value.weight": (64, 32),
            home + "self_attention.query_key_value.bias": (64,),
            home + "self_attention.dense.weight": (32, 32),
            home + "post_attention_layernorm.weight": (32,),
            home + "mlp.dense_h_to_4h.weight": (96, 32),
            home + "mlp.dense_4h_to_h.weight": (32, 48),
        }
    return draw(shapes)


def baichuan_weights():
    shapes = {
        "model.embed_tokens.weight": (320, 32), "model.norm.weight": (32,),
        "lm_head.weight": (320, 32),
    }  # fmt: skip
    for layer in range(2):
        home = f"model.layers.{layer}."
        shapes |= {
            home + "input_layernorm.weight": (32,),
            home + "self_attn.W_pack.weight": (96, 32),
            home + "self_attn.o_proj.weight": (32, 32),
            home + "post_attention_layernorm.weight": (32,),
            home + "mlp.gate_proj.weight": (48, 32),
            home + "mlp.up_proj.weight": (48, 32),
            home + "mlp.down_proj.weight": (32, 48),
        }
    return draw(shapes)


def save(folder, settings, weights, pieces, kind="safetensors"):
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.model").write_bytes(pieces.read_bytes())
    names = sorted(weights)
    for shard, some in enumerate((names[::2], names[1::2])):
        tensors = {name: weights[name] for name in some}
        if kind == "safetensors":
            save_file(tensors, folder / f"model-0000{shard}-of-00002.safetensors")
        else:
            tensors["transformer.rotary_pos_emb.inv_freq"] = torch.ones(4)
            torch.save(tensors, folder / f"pytorch_model-0000{shard}-of-00002.bin")
    return folder


def norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def attend(q, k, v):
    """(H, N, D) with as many key heads; causal softmax, entry by entry."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return scores.softmax(-1) @ v


def turn(x, angles, interleaved):
    """Pairs of the first 2 * angles.shape[1] entries of (H, N, D) as complex numbers."""
    half = angles.shape[1]
    rest = x[..., 2 * half :]
    part = x[..., : 2 * half]
    pairs = part.unflatten(-1, (half, 2)) if interleaved else part.unflatten(-1, (2, half)).mT
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    )
    flat = turned.flatten(-2) if interleaved else turned.mT.flatten(-2)
    return torch.cat((flat, rest), -1)


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(0, 1)


def chatglm_logits(w, ids, *, base, stretch):
    x, eps = w["transformer.embedding.word_embeddings.weight"][ids], 1e-5
    inverse = base ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4)  # half of kv_channels turns
    angles = torch.arange(len(ids))[:, None] / stretch * inverse
    for layer in range(2):
        own = {
            name.removeprefix(f"transformer.encoder.layers.{layer}."): tensor
            for name, tensor in w.items()
        }
        y = norm(x, own["input_layernorm.weight"], eps)
        packed = y @ own["self_attention.query_key_value.weight"].mT
        packed = packed + own["self_attention.query_key_value.bias"]
        q, k, v = (
            heads(t, n) for t, n in zip(packed.split((32, 16, 16), -1), (4, 2, 2), strict=True)
        )
        q, k = (turn(t, angles, True) for t in (q, k))
        k, v = (t.repeat_interleave(2, 0) for t in (k, v))
        x = x + attend(q, k, v).transpose(0, 1).flatten(1) @ own["self_attention.dense.weight"].mT
        y = norm(x, own["post_attention_layernorm.weight"], eps)
        gate, up = (y @ own["mlp.dense_h_to_4h.weight"].mT).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ own["mlp.dense_4h_to_h.weight"].mT
    x = norm(x, w["transformer.encoder.final_layernorm.weight"], eps)
    return x @ w["transformer.output_layer.weight"].mT


def baichuan_logits(w, ids, *, normalised):
    x, eps = w["model.embed_tokens.weight"][ids], 1e-6
    inverse = 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = torch.arange(len(ids))[:, None] * inverse
    for layer in range(2):
        own = {name.removeprefix(f"model.layers.{layer}."): tensor for name, tensor in w.items()}
        y = norm(x, own["input_layernorm.weight"], eps)
        q, k, v = (heads(t, 4) for t in (y @ own["self_attn.W_pack.weight"].mT).chunk(3, -1))
        q, k = (turn(t, angles, False) for t in (q, k))
        x = x + attend(q, k, v).transpose(0, 1).flatten(1) @ own["self_attn.o_proj.weight"].mT
        y = norm(x, own["post_attention_layernorm.weight"], eps)
        inner = F.silu(y @ own["mlp.gate_proj.weight"].mT) * (y @ own["mlp.up_proj.weight"].mT)
        x = x + inner @ own["mlp.down_proj.weight"].mT
    head = w["lm_head.weight"]
    if normalised:
        head = head / head.norm(dim=1, keepdim=True)
    return norm(x, w["model.norm.weight"], eps) @ head.mT


def double(weights):
    return {name: tensor.double() for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("name", "kind", "base", "stretch"),
    [
        ("THUDM/chatglm3-6b-32k", "safetensors", 500_000.0, 1.0),
        ("THUDM/chatglm2-6b-32k", "bin", 10_000.0, 50.0),
    ],
)
def test_chatglm(pieces, tmp_path, name, kind, base, stretch):
    weights = chatglm_weights()
    folder = save(tmp_path / "m", CHATGLM | {"_name_or_path": name}, weights, pieces, kind)
    loaded = load(folder, dtype=torch.float64)
    ids = torch.randint(0, 320, (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = loaded.model(ids[None]).logits[0]
    wanted = chatglm_logits(double(weights), ids, base=base, stretch=stretch)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    assert loaded.max_length == 32768
    size = loaded.tokenizer.pieces.get_piece_size()
    row = loaded.tokenizer("the sky is blue", return_tensors="pt")["input_ids"]
    assert row[0, :2].tolist() == [size + 1, size + 3]  # [gMASK], sop
    plain = loaded.tokenizer("the sky is blue", add_special_tokens=False)["input_ids"]
    assert row[0, 2:].tolist() == plain
    assert loaded.tokenizer.decode(row[0]) == "the sky is blue"


@pytest.mark.parametrize("vocabulary", [320, 125_696])
def test_baichuan(pieces, tmp_path, vocabulary):
    weights = baichuan_weights()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rest = torch.zeros(vocabulary - 320, 32)
        weights[name] = torch.cat((weights[name], rest)).contiguous()
    settings = BAICHUAN | {"vocab_size": vocabulary}
    loaded = load(save(tmp_path / "m", settings, weights, pieces), dtype=torch.float64)
    ids = torch.randint(0, 320, (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = loaded.model(ids[None]).logits[0, :, :320]
    wanted = baichuan_logits(double(weights), ids, normalised=vocabulary > 320)[:, :320]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    assert loaded.tokenizer("the sky")["input_ids"] == loaded.tokenizer.encode("the sky")


def test_the_study_runs_on_longbench_files(pieces, tmp_path):
    """The ready-made command for users: a ChatGLM folder and LongBench's archive."""
    import zipfile

    from longspan.eval.rows import read_rows
    from longspan.studies.__main__ import main

    folder = save(tmp_path / "chatglm3", CHATGLM, chatglm_weights(), pieces)
    line = {"input": "Who?", "context": TEXT * 400, "answers": ["x"], "length": 8000,
            "dataset": "narrativeqa", "language": "en", "_id": "1"}  # fmt: skip
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/narrativeqa.jsonl", json.dumps(line))
    code = main([
        "hyper-pretrained", "--model", str(folder), "--heldout", str(tmp_path / "data.zip"),
        "--tokens", "2300", "--documents", "1", "--parts", "perplexity,layers", "--device", "cpu",
        "--setting", "exact", "--setting", "paper, LSH", "--out", str(tmp_path / "run"),
    ])  # fmt: skip
    assert code == 0
    rows = read_rows(tmp_path / "run" / "rows.jsonl")
    losses = {row["setting"]: row["loss"] for row in rows if row["kind"] == "perplexity"}
    assert losses["exact"] != losses["paper, LSH"]
    assert {row["layers"] for row in rows if row["kind"] == "layers"} == {0, 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (CHATGLM | {"add_bias_linear": True}, "add_bias_linear = True"),
        ({k: v for k, v in CHATGLM.items() if k != "ffn_hidden_size"}, "no ffn_hidden_size"),
        ({k: v for k, v in BAICHUAN.items() if k != "max_position_embeddings"}, "ALiBi"),
    ],
)
def test_other_models_are_refused(pieces, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        load(save(tmp_path / "m", settings, {"x": torch.ones(1), "y": torch.ones(1)}, pieces))


def test_missing_weights(pieces, tmp_path):
    weights = baichuan_weights()
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj"):
        load(save(tmp_path / "m", BAICHUAN, weights, pieces))
    for file in (tmp_path / "m").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ConfigError, match="no weights"):
        load(tmp_path / "m")
