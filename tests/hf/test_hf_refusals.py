"""What cannot be honoured raises, with the argument, what came, and what to do."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings

import pytest
import torch
from tiny_models import distance, padded, tiny, tokens

from longspan import (
    ExactConfig,
    LongspanWarning,
    UnsupportedError,
    WindowConfig,
)
from longspan.hf import attention, compat, patch
from longspan.hf.attention import longspan_attention
from longspan.hf.masks import longspan_mask

SMALL = WindowConfig(window=3, num_sinks=1)


@pytest.fixture
def model():
    return tiny()


def call(model, **keywords):
    module = model.model.layers[0].self_attn
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    return longspan_attention(module, query, key, key, None, **keywords)


@pytest.mark.parametrize(
    "keywords",
    [
        {"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(4, 6, 6)},
        {"head_mask": torch.ones(4)}, {"is_causal": False}, {"cache": object()},
        {"dropout": 0.1},
    ],
    ids=lambda keywords: next(iter(keywords)),
)  # fmt: skip
def test_keywords_that_change_the_result(model, keywords):
    name = next(iter(keywords))
    with patch(model, SMALL):
        assert call(model)[0].shape == (1, 6, 4, 8)
        with pytest.raises(UnsupportedError, match=rf"^{name}: .*layers\.0.*(Use|Set) "):
            call(model, **keywords)


def test_keywords_that_change_nothing(model):
    with patch(model, SMALL):
        expected = call(model)[0].shape
        quiet = {"softcap": None, "use_cache": True, "position_ids": torch.arange(6)[None]}
        assert call(model, **quiet)[0].shape == expected


def test_softcap_of_gemma2_and_sinks_of_gpt_oss():
    from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

    common = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    gemma = Gemma2ForCausalLM(Gemma2Config(**common, attn_logit_softcapping=20.0))
    oss = GptOssForCausalLM(GptOssConfig(**common, num_local_experts=2, num_experts_per_tok=1))
    for model, name in ((gemma, "softcap"), (oss, "s_aux")):
        report = patch(model.eval(), ExactConfig(), verify=False)
        with report, pytest.raises(UnsupportedError, match=f"^{name}: "):
            model(tokens())
        with pytest.raises(UnsupportedError, match=f"^{name}: "):
            patch(model, ExactConfig())
        assert model.config._attn_implementation != "longspan"


def test_attention_dropout_in_training():
    model = tiny(attention_dropout=0.25).train()
    with patch(model, SMALL), pytest.raises(UnsupportedError, match=r"dropout 0.25.*model.eval"):
        model(tokens())
    with patch(model, ExactConfig()):
        torch.manual_seed(0)
        first = model(tokens()).logits
        assert distance(model(tokens()).logits, first) > 1e-4  # exact layers do drop weights
        with pytest.raises(UnsupportedError, match="a padded batch cannot honour"):
            model(tokens(3), attention_mask=padded("left"))


def test_dropout_of_exact_layers_equals_sdpa():
    model = tiny(attention_dropout=0.25, attention="sdpa").train()
    torch.manual_seed(5)
    expected = model(tokens()).logits
    with patch(model, ExactConfig()):
        torch.manual_seed(5)
        assert distance(model(tokens()).logits, expected) < 1e-5


def test_four_dimensional_masks(model):
    mask = torch.ones(2, 1, 14, 14, dtype=torch.bool).tril()
    with patch(model, SMALL), pytest.raises(UnsupportedError, match=r"4-D mask.*2-D padding mask"):
        model(tokens(), attention_mask=mask)


def test_short_masks(model):
    from transformers import DynamicCache

    with patch(model, SMALL), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(tokens(2, 8), past_key_values=cache)
        with pytest.raises(UnsupportedError, match="it has 2 columns but 10 tokens were seen"):
            model(tokens(2, 2), attention_mask=torch.ones(2, 2), past_key_values=cache)


def test_masks_that_are_not_causal(model):
    from transformers.masking_utils import (
        bidirectional_mask_function,
        chunked_causal_mask_function,
        create_causal_mask,
        sliding_window_bidirectional_mask_function,
    )

    for function in (
        bidirectional_mask_function,
        chunked_causal_mask_function(4, torch.zeros(1)),
        sliding_window_bidirectional_mask_function(4),
    ):
        with pytest.raises(UnsupportedError, match="not causal attention over"):
            longspan_mask(1, 8, 8, mask_function=function)
    embeddings = torch.zeros(1, 8, 4)
    with patch(model, SMALL):
        for extra in (
            {"or_mask_function": bidirectional_mask_function},
            {"block_sequence_ids": torch.zeros(1, 8, dtype=torch.int64)},
        ):
            with pytest.raises(UnsupportedError, match="leave this model or input unpatched"):
                create_causal_mask(model.config, embeddings, None, None, **extra)


@pytest.mark.parametrize("config", [SMALL, WindowConfig(window=8, num_sinks=1)], ids=str)
def test_sinks_outside_a_sliding_window(config):
    model = tiny("mistral_sliding")
    with patch(model, config, layers="every"):
        model(tokens(2, 5))  # as long as the window: nothing is outside of it
        with pytest.raises(UnsupportedError, match=r"the last 5 of 14 keys.*num_sinks=0"):
            model(tokens(2, 14))


def test_windows_on_sliding_layers_are_intersected():
    model = tiny("mistral_sliding")
    exact = model(tokens()).logits
    with patch(model, WindowConfig(window=9, num_sinks=0), layers="every"):
        assert distance(model(tokens()).logits, exact) < 1e-5
    narrow = tiny("mistral_sliding", sliding_window=3)(tokens()).logits
    with patch(model, WindowConfig(window=3, num_sinks=0), layers="every"):
        assert distance(model(tokens()).logits, narrow) < 1e-5


def test_output_attentions_warns_once(model):
    attention._WARNED.clear()
    with patch(model, SMALL):
        with pytest.warns(LongspanWarning, match="never formed.*attn_implementation='eager'"):
            model(tokens(), output_attentions=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", LongspanWarning)
            model(tokens(), output_attentions=True)


def test_context_parallel_of_torch(model, monkeypatch):
    from torch.distributed.tensor.experimental._context_parallel import _attention

    assert compat.context_parallel_reason() is None
    with patch(model, SMALL):
        model(tokens())
        swapped = {torch.nn.functional.scaled_dot_product_attention: ("sdpa", None)}
        monkeypatch.setattr(_attention, "_replaced_functions", swapped)
        with pytest.raises(UnsupportedError, match=r"torch's context_parallel is active.*distrib"):
            model(tokens())


def test_context_parallel_of_torch_for_real(model):
    """The flag that is read above is the one that torch's own context manager sets."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        ids = tokens(1, 8)
        with patch(model, SMALL):
            sharded = context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1])
            with sharded, pytest.raises(UnsupportedError, match="torch's context_parallel is"):
                model(ids)
            model(ids)
    finally:
        dist.destroy_process_group()


def test_context_parallel_of_accelerate(model, monkeypatch):
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import AcceleratorState

    parallel = ParallelismConfig(cp_size=2)
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", parallel)
    report = patch(model, SMALL, verify=False)
    with report, pytest.raises(UnsupportedError, match=r"cp_size=2\) is active"):
        model(tokens())


def test_missing_transformers_names_the_extra():
    code = (
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'transformers' else find(name, *a)\n"
        "import longspan\n"
        "try:\n    longspan.hf\nexcept longspan.MissingExtraError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(r"longspan\.hf needs.*'transformers'.*longspan\[hf\]", done.stdout)
