"""The certificate on the heads of a real model: most are far from convolutions, the bound holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.overrides import TorchFunctionMode

from longspan import (
    ConvBasisConfig,
    conv_basis_attention,
    conv_basis_check,
    conv_basis_recover,
    exact_attention_with_lse,
)
from longspan.eval.data import load_text
from longspan.models.loader import load

pytestmark = pytest.mark.models
pytest.importorskip("transformers")
TOKENS = 600


class Keep(TorchFunctionMode):
    """The inputs of every attention call."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.found.append((*(t.clone() for t in args[:3]), (kwargs or {}).get("scale")))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def layers():
    loaded = load("smollm2-135m")
    ids = loaded.tokenizer(load_text().text[5000:12000], return_tensors="pt").input_ids
    with torch.no_grad(), Keep() as keep:
        loaded.model(ids[:, :TOKENS], use_cache=False)
    return keep.found[::6]


CONFIGS = [
    ConvBasisConfig(min_length=0, num_bases=16),
    ConvBasisConfig(min_length=0, num_bases=16, recover="segment", near_window=64, num_sinks=4),
    ConvBasisConfig(min_length=0, recover="means", rope_base=1e5, near_window=64, num_sinks=4),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["binary", "segment", "means"])
def test_bound_holds_and_heads_fall_back(layers, config):
    far_off = 0
    for query, key, value, scale in layers:
        settings = {"scale": scale, "enable_gqa": True}
        basis = conv_basis_recover(query, key, config=config, **settings)
        stats = conv_basis_check(basis, query, key, check_rows=config.check_rows)
        rows = stats.rows[0]
        free = dataclasses.replace(config, on_violation="return")
        got = conv_basis_attention(query, key, value, is_causal=True, config=free, **settings)
        want = exact_attention_with_lse(query, key, value, is_causal=True, **settings).output
        wide = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        radius = (wide - wide.mean(2, keepdim=True)).norm(dim=-1).amax(-1)  # (1, H)
        error = (got - want).norm(dim=-1)[:, :, rows]
        limit = 2 * stats.distances * radius.unsqueeze(-1)
        assert (error <= limit * (1 + 1e-3) + 1e-4 * radius.unsqueeze(-1)).all()
        assert ((stats.distances >= 0) & (stats.distances <= 1 + 1e-4)).all()
        checked = conv_basis_attention(query, key, value, is_causal=True, config=config, **settings)
        bad = stats.p95[0] > config.max_tv
        torch.testing.assert_close(checked[0, bad], want[0, bad], rtol=1e-4, atol=1e-4)
        far_off += int(bad.sum())
    assert far_off >= 30, "pretrained heads are not convolutions"
