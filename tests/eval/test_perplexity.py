import math

import pytest
import torch

from longspan.errors import ConfigError
from longspan.eval.perplexity import exp_or_inf, perplexity, plan_windows
from longspan.eval.scoring import SplitModel, as_input_ids, token_losses
from longspan.eval.tail import tail_loss


@pytest.mark.parametrize("count", [2, 3, 10, 64, 65, 100])
@pytest.mark.parametrize(("window", "stride"), [(10, 10), (10, 3), (10, 1), (64, 32), (2, 1)])
def test_each_token_is_scored_at_most_once_and_overlaps_miss_none(count, window, stride):
    windows = plan_windows(count, window, stride)
    scored = [i for start, stop, first in windows for i in range(first, stop)]
    assert scored == sorted(set(scored))
    if stride < window:
        assert scored == list(range(1, count))
    else:
        assert set(range(1, count)) - set(scored) <= set(range(0, count, window))
    for start, stop, first in windows:
        assert start < first < stop <= count
        assert stop - start <= window
        if start:
            assert first - start >= min(window - stride, 1)


def test_one_window_is_the_mean_loss(tiny, tokens):
    result = perplexity(tiny.model, tokens[:200], window=200, num_bytes=200)
    losses = token_losses(SplitModel(tiny.model), as_input_ids(tokens[:200], "cpu"))
    assert result.loss == pytest.approx(float(losses.mean()))
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_token == pytest.approx(result.loss / math.log(2))
    assert result.bits_per_byte == pytest.approx(result.bits_per_token)  # one byte per token
    assert (result.num_tokens, result.num_windows) == (199, 1)
    pairs = zip(result.loss_by_position, result.counts, strict=True)
    assert sum(m * c for m, c in pairs) == pytest.approx(float(losses.sum()))


def test_windows_with_overlap_equal_a_loop(tiny, tokens):
    ids, window, stride = tokens[:150], 40, 15
    result = perplexity(tiny.model, ids, window=window, stride=stride, num_buckets=39)
    total, by_position = 0.0, {}
    seen = 1
    for start in range(0, 150, stride):
        part = torch.tensor([ids[start : start + window]])
        with torch.no_grad():
            logits = tiny.model(input_ids=part).logits[0].double().log_softmax(-1)
        for i in range(1, part.shape[1]):
            if start + i >= seen:
                loss = -float(logits[i - 1, part[0, i]])
                total += loss
                by_position.setdefault(i, []).append(loss)
        seen = max(seen, start + part.shape[1])
        if seen >= 150:
            break
    assert result.num_tokens == 149
    assert result.loss == pytest.approx(total / 149, rel=1e-5)
    for position, mean in zip(result.edges[:-1], result.loss_by_position, strict=True):
        here = by_position[position]
        assert mean == pytest.approx(sum(here) / len(here), rel=1e-4)


def test_progress_adds_up(tiny, tokens):
    shares = []
    perplexity(tiny.model, tokens[:100], window=30, stride=20, progress=shares.append)
    assert sum(shares) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("window", "stride", "count", "text"),
    [
        (1, 1, 10, r"window: 1 came\. Allowed: 2 or more .* Pass a longer window"),
        (8, 0, 10, r"stride: 0 came\. Allowed: 1 \.\. window = 8"),
        (8, 9, 10, r"stride: 9 came"),
        (8, 8, 1, r"token_ids: 1 tokens came\. Allowed: 2 or more\. Pass a longer text"),
    ],
)
def test_bad_windows(window, stride, count, text):
    with pytest.raises(ConfigError, match=text):
        plan_windows(count, window, stride)


def test_an_absurd_loss_gives_infinity():
    assert exp_or_inf(1e4) == math.inf


def test_tail_scores_the_same_tokens_with_less_context(tiny, tokens):
    split = SplitModel(tiny.model)
    whole = token_losses(split, as_input_ids(tokens[-120:], "cpu"))
    result = tail_loss(tiny.model, tokens, context=100, tail=20)
    assert result.loss == pytest.approx(float(whole[-20:].mean()))
    assert result.standard_error > 0
    short = tail_loss(tiny.model, tokens, context=1, tail=20)
    assert short.loss != pytest.approx(result.loss)


@pytest.mark.parametrize(
    ("context", "tail", "text"),
    [
        (0, 5, r"context: 0 came\. Allowed: 1 or more"),
        (5, 0, r"tail: 0 came"),
        (99, 9, r"context: 99 came, but the text has 50 tokens.*at most 41"),
    ],
)
def test_bad_tails(tiny, context, tail, text):
    with pytest.raises(ConfigError, match=text):
        tail_loss(tiny.model, list(range(50)), context=context, tail=tail)
