"""Span profiles: what is measured, on layers and on transformers models, and the page."""

from __future__ import annotations

import pytest
import torch

from longspan import ConfigError, StickBreakingConfig
from longspan.eval.span_report import draw_spans, span_headlines, write_span_page
from longspan.eval.spans import span_profile
from longspan.nn import StickBreakingAttention


def layers(**options):
    torch.manual_seed(0)
    stack = torch.nn.Sequential(*(StickBreakingAttention(16, 2, 1, **options) for _ in range(2)))
    return stack.eval()


def test_a_head_that_takes_half_each_time_has_span_two():
    model = layers(logit_bias=0.0)
    with torch.no_grad():
        for layer in model:
            layer.query.weight.zero_()  # every gate 1/2: the rest after d keys is 2**-d
            layer.logit_bias[1] = -20.0
    rows = span_profile(model, torch.randn(1, 40, 16), thresholds=(0.5, 1e-2))
    assert len(rows) == 2 * 2 * 2
    by_key = {(r["layer"], r["head"], r["threshold"]): r for r in rows}
    for layer in range(2):
        assert by_key[layer, 0, 0.5]["p50"] == 2.0
        assert by_key[layer, 0, 1e-2]["p10"] == by_key[layer, 0, 1e-2]["p90"] == 7.0
        assert by_key[layer, 0, 1e-2]["unspent"] == 0.0
        long = by_key[layer, 1, 0.5]
        assert long["unspent"] == 1.0
        assert long["mean"] == long["visible"] == pytest.approx(sum(range(20, 40)) / 20)
        assert long["num_queries"] == 20


def test_a_single_layer():
    rows = span_profile(StickBreakingAttention(16, 2), torch.randn(1, 20, 16), thresholds=(0.5,))
    assert [(row["layer"], row["head"]) for row in rows] == [(0, 0), (0, 1)]


def test_window_and_first_query():
    model = layers(config=StickBreakingConfig(window=3, attend_current=True), logit_bias=-30.0)
    rows = span_profile(model, torch.randn(2, 12, 16), thresholds=(0.5,), first_query=0)
    assert rows[0]["num_queries"] == 24
    assert rows[0]["p90"] == 3.0
    assert rows[0]["visible"] == pytest.approx((1 + 2 + 3 * 10) / 12)


def test_the_model_computes_the_same():
    model, hidden = layers(), torch.randn(1, 30, 16)
    seen = []
    hook = model.register_forward_hook(lambda _, __, output: seen.append(output))
    span_profile(model, hidden)
    hook.remove()
    with torch.no_grad():
        assert torch.equal(seen[0], model(hidden))


def test_softmax_spans_by_hand():
    class Uniform(torch.nn.Module):
        def forward(self, hidden):
            q = torch.zeros(1, 2, hidden.shape[1], 4)
            return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    rows = span_profile(Uniform(), torch.zeros(1, 8, 4), thresholds=(0.4,), first_query=7)
    # eight equal weights: less than 0.4 is left beyond the 5 nearest (3/8), not beyond 4 (4/8)
    assert [row["p50"] for row in rows] == [5.0, 5.0]
    assert {row["mechanism"] for row in rows} == {"softmax"}
    assert rows[0]["visible"] == 8.0


def test_softmax_models_and_masks():
    pytest.importorskip("transformers")
    from longspan.testing.models import tiny_model

    model = tiny_model("llama").model
    ids = torch.randint(0, 255, (1, 48), generator=torch.Generator().manual_seed(0))
    rows = span_profile(model, ids, thresholds=(0.5, 1e-2))
    assert len(rows) == 2 * 4 * 2
    assert all(1 <= row["p10"] <= row["p50"] <= row["p90"] <= 48 for row in rows)
    # a random model spreads its mass: half of it lies within about half of the keys
    assert all(0.3 < row["p50"] / row["visible"] < 0.8 for row in rows if row["threshold"] == 0.5)


def test_picture_and_page(tmp_path):
    pytest.importorskip("matplotlib")
    rows = span_profile(layers(), torch.randn(1, 40, 16))
    assert draw_spans(rows, tmp_path / "spans.png").stat().st_size > 1000
    page = write_span_page(rows, tmp_path / "spans.html").read_text()
    assert "<script" not in page
    assert "http-equiv" not in page
    assert page.count("<tr>") == 1 + len(rows)
    assert "<svg" in page
    assert len(span_headlines(rows)) == 3
    assert "stick" in span_headlines(rows)[0]
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        draw_spans(rows, tmp_path / "spans.gif")
    with pytest.raises(ConfigError, match="none came"):
        span_headlines([])


def test_refusals():
    hidden = torch.randn(1, 8, 16)
    with pytest.raises(ConfigError, match="no attention call"):
        span_profile(torch.nn.Linear(16, 16), hidden)
    with pytest.raises(ConfigError, match="strictly"):
        span_profile(layers(), hidden, thresholds=(0.0,))
    with pytest.raises(ConfigError, match="0 to 7"):
        span_profile(layers(), hidden, first_query=8)
