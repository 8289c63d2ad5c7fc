"""Bounded caches on disk, and transformers models as streams."""

from __future__ import annotations

import pytest
import torch
from test_hf_infini import CLOSE, in_chunks, run
from tiny_models import distance, padded, tiny, tokens

from longspan import ConfigError, WindowConfig
from longspan.errors import PatchError
from longspan.hf import (
    PatchedStream,
    convert_infini,
    load_cache,
    make_cache,
    patch,
    save_cache,
)
from longspan.models import TextSource, TextStream

KINDS = ["llama", "gemma3"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 3, 8, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prefix_on_disk_goes_on_as_in_memory(tmp_path, kind, count, dtype):
    model, ids = tiny(kind).to(dtype), tokens(2, 17)
    with convert_infini(model, 4, update="delta"):
        cache = make_cache(model)
        if count:
            in_chunks(model, ids[:, :count], [count], cache)
        save_cache(model, cache, tmp_path / "prefix.safetensors")
        loaded = load_cache(model, tmp_path / "prefix.safetensors")
        assert loaded.get_seq_length() == count
        rest = ids[:, count:]
        expected = in_chunks(model, rest, [2, rest.shape[1] - 2], cache)
        assert torch.equal(in_chunks(model, rest, [2, rest.shape[1] - 2], loaded), expected)


def test_windows_and_padded_rows_on_disk(tmp_path):
    model, ids, mask = tiny(), tokens(3, 14), padded("left")
    for config in (WindowConfig(window=4, num_sinks=2), "infini:segment_length=4"):
        with pytest.warns() if isinstance(config, str) else _nothing(), patch(model, config):
            cache = make_cache(model)
            with torch.no_grad():
                model(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
            save_cache(model, cache, tmp_path / "cache")
            loaded = load_cache(model, tmp_path / "cache")
            ends = [
                run(model, input_ids=ids[:, 9:], attention_mask=mask, past_key_values=held)
                for held in (cache, loaded)
            ]
            assert torch.equal(*ends)


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_caches_of_others_are_refused(tmp_path):
    model = tiny()
    path = tmp_path / "cache"
    with convert_infini(model, 4):
        cache = make_cache(model)
        in_chunks(model, tokens(1, 6), [6], cache)
        save_cache(model, cache, path)
    with convert_infini(model, 8), pytest.raises(ConfigError, match='segment_length": 4'):
        load_cache(model, path)
    with pytest.raises(PatchError, match="not patched"):
        load_cache(model, path)
    other = tiny("qwen3")
    with convert_infini(other, 4), pytest.raises(ConfigError, match="qwen3"):
        load_cache(other, path)
    with convert_infini(model, 4, layers=[0]):
        with pytest.raises(ConfigError, match="layer 1 is a DynamicLayer, which keeps the keys"):
            save_cache(model, make_cache(model), path)
        with pytest.raises(ConfigError, match="Convert all layers"):
            PatchedStream(model)


@pytest.mark.parametrize("kind", KINDS)
def test_streams_write_what_the_model_says(tmp_path, kind):
    """Greedy tokens against the converted model run over everything without a cache."""
    model = tiny(kind)
    text = "It was the best of times, it was the worst of times. " * 3

    def make(folder):
        return TextStream(
            PatchedStream(model), lambda t: [b % 50 + 5 for b in t.encode()],
            lambda ids: "".join(chr(48 + i) for i in ids), TextSource(text.encode(), piece=40),
            folder, start=[1], chunk_size=21, save_every=30,
        )  # fmt: skip

    with convert_infini(model, 8, gate_start=0.0):
        assert make(tmp_path / "whole").run(15).read == len(text) + 1
        ids = torch.tensor([[1, *(b % 50 + 5 for b in text.encode())]])
        lines = (tmp_path / "whole" / "tokens.txt").read_text().split()
        for token in map(int, lines):
            assert int(run(model, input_ids=ids, use_cache=False)[0, -1].argmax()) == token
            ids = torch.cat((ids, torch.tensor([[token]])), 1)
        make(tmp_path / "cut").run(7)
        assert make(tmp_path / "cut").run(15).resumed == len(text) + 8
        assert (tmp_path / "cut" / "tokens.txt").read_text().split() == lines
    with convert_infini(model, 8, gate_start=0.5), pytest.raises(ConfigError, match="model is"):
        make(tmp_path / "cut")  # other gates


def test_far_on_a_stream_is_as_at_its_start():
    """Twenty million tokens on, where float32 angles mean nothing, segments are what they were."""
    model, ids = tiny(), tokens(1, 8)
    with convert_infini(model, 8, gate_start=-1e9):
        expected = run(model, input_ids=ids)
        cache = make_cache(model)
        in_chunks(model, ids, [8], cache)
        for layer in cache.layers:
            layer.seen = 20_000_000
            layer.states = tuple(s._replace(seen=20_000_000) for s in layer.states)
        assert distance(in_chunks(model, ids, [3, 5], cache), expected) < CLOSE * 5
