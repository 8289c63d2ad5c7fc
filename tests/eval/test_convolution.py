"""The convolution profile tells heads that are convolutions from heads that are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from conv_cases import planted
from longspan import ConfigError
from longspan.eval.convolution import convolution_profile, is_saved_by_convolution, summary
from longspan.eval.convolution_report import (
    convolution_headlines,
    draw_convolution,
    write_convolution_page,
)


class Heads(torch.nn.Module):
    """Head 0 planted with one segment, 1 with four equal ones, 2 random, 3 all on itself."""

    def __init__(self, n):
        super().__init__()
        one, four = planted(n, [0], 1, 32, 1.5), planted(n, [0, n // 4, n // 2, 3 * n // 4], 1, 32)
        noise = torch.randn(1, 1, n, 32), 3 * torch.randn(1, 1, n, 32)
        peaked = torch.randn(1, 1, n, 32)
        peaked = 12 * peaked / peaked.norm(dim=-1, keepdim=True)
        self.query = torch.cat((one[0], four[0], noise[0], peaked), 1).float()
        self.key = torch.cat((one[1], four[1], noise[1], peaked), 1).float()

    def forward(self, tokens):
        return F.scaled_dot_product_attention(self.query, self.key, self.key, is_causal=True)


@pytest.fixture(scope="module")
def rows():
    torch.manual_seed(0)
    return convolution_profile(Heads(256), torch.zeros(1, 256), window=8, num_sinks=0,
                               rope_base=100.0)  # fmt: skip


def test_each_head_is_named_for_what_it_is(rows):
    assert len(rows) == 4
    one, four, noise, peaked = rows
    assert one["toeplitz"] < 1e-3
    assert one["means_window"] < 1e-3
    assert one["bases_needed"] == 1
    assert is_saved_by_convolution(one)
    assert four["bases_needed"] == 4
    assert four["bases_4"] < 1e-3 < 0.05 < four["bases_1"]
    assert four["paper"] < 1e-3
    assert noise["bases_needed"] is None
    assert noise["toeplitz_window"] > 0.3
    assert not noise["passes_convolution"]
    assert peaked["passes_window"]
    assert peaked["tail_mass"] < 1e-2
    assert not is_saved_by_convolution(peaked)


def test_summary_and_report(rows, tmp_path):
    facts = summary(rows)
    assert facts["heads"] == 4
    assert facts["saved"] == 0.5
    assert facts["pass_window"] == 0.25
    lines = convolution_headlines(rows)
    assert lines[0].startswith("4 heads")
    assert "50.0" in lines[-1]
    assert lines[-1].endswith(": worth using here.")
    page = write_convolution_page(rows, tmp_path / "page.html").read_text()
    assert page.count("<tr>") == 5
    assert draw_convolution(rows, tmp_path / "map.svg").stat().st_size > 1000
    with pytest.raises(ConfigError, match="ending in .png or .svg"):
        draw_convolution(rows, tmp_path / "map.pdf")


def test_offsets_of_rows_and_keys_are_fitted():
    """Scores row + key + kernel: only the model with offsets follows."""
    n = 256
    lag = torch.arange(n)[:, None] - torch.arange(n)
    scores = torch.randn(n, 1) + 2 * torch.randn(n) + 2 * torch.sin(lag / 9.0)
    query, key = scores[None, None], torch.eye(n)[None, None]

    def model(tokens):
        return F.scaled_dot_product_attention(query, key, key, is_causal=True, scale=1.0)

    row = convolution_profile(model, torch.zeros(1, n), window=8, num_sinks=0, num_rows=128)[0]
    assert row["offsets_window"] < 0.1 < 0.3 < row["toeplitz_window"]


def test_refusals():
    with pytest.raises(ConfigError, match="at least 256"):
        convolution_profile(Heads(64), torch.zeros(1, 64))
    with pytest.raises(ConfigError, match="no full causal attention call"):
        convolution_profile(lambda tokens: tokens, torch.zeros(1, 64), window=4)
