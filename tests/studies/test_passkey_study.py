"""The passkey study: prompts, controls, streams, resuming, the whole run, the page."""

import dataclasses

import pytest
import torch

from longspan.errors import ConfigError
from longspan.eval.passkey import FILLER, QUESTION, TASK
from longspan.models import Transformer
from longspan.studies.clock import Clock, OutOfTime
from longspan.studies.infini_passkey.asking import DEPTHS, HAYSTACKS, ask
from longspan.studies.infini_passkey.page import build_report, rate
from longspan.studies.infini_passkey.run import phases, run_passkey
from longspan.studies.infini_passkey.sizes import FULL, SMALL, Stage
from longspan.studies.infini_passkey.task import DIGITS, draw_prompts, read_words
from longspan.studies.infini_passkey.training import (
    Training,
    fill_growth,
    filled_state,
    passkey_loss,
    train_variant,
)
from longspan.studies.infini_passkey.variants import (
    VARIANTS,
    build_model,
    gate_shares,
    hidden_after,
    set_segments,
)
from longspan.studies.report import render_html, render_markdown
from longspan.studies.stick_breaking_length.data import open_data
from longspan.train import load_tokenizer

MODEL = {"width": 16, "layers": 2, "heads": 2}
SIZES = dataclasses.replace(
    SMALL, model=MODEL, tokens_per_step=1024, log_every=2, checkpoint_every=4, text_places=4,
    stages=(Stage(share=0.5, segment=64, length=512), Stage(share=0.5, segment=128, length=640)),
    steps=8, trials={640: 3, 896: 2}, book_lengths=(640, 896),
    full_lengths=(640,), control_lengths=(640,), seeds=(0, 1),
    chunk_tokens=1024,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return load_tokenizer(prepared / "tokenizer.json")


@pytest.fixture(scope="module")
def words(tokenizer):
    return read_words(tokenizer)


def training_of(variant, words, book, **changes):
    return Training(**{
        "variant": VARIANTS[variant], "seed": 0, "steps": 8, "sizes": SIZES, "words": words,
        "vocab_size": 300, "book": book, "device": torch.device("cpu"), "dtype": torch.float32,
        **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def book(prepared):
    return torch.from_numpy(open_data(prepared).train.ids[:].astype("int32"))


def test_prompts_hold_task_needle_and_question(words, tokenizer):
    prompts = draw_prompts(words, length=700, count=3, seed=5)
    for ids, key, place in zip(*prompts[:3], strict=True):
        number = tokenizer.decode(key.tolist())
        assert len(number) == DIGITS
        text = tokenizer.decode(ids.tolist())
        assert text.startswith(TASK)
        assert text.endswith(f"{QUESTION} {number[:-1]}")
        assert text.count(f"The pass key is {number}. Remember it. {number} is the pass key.") == 1
        assert FILLER in text
        assert ids[place : place + len(words.before)].tolist() == words.before.tolist()


def test_keys_depend_on_the_seed_alone(words):
    drawn = [
        draw_prompts(words, length=n, count=4, seed=seed, depth=depth)
        for n, seed, depth in ((600, 1, 0.0), (900, 1, 1.0), (600, 2, 0.0))
    ]
    assert torch.equal(drawn[0].keys, drawn[1].keys)
    assert not torch.equal(drawn[0].keys, drawn[2].keys)
    assert set(drawn[0].needle.tolist()) == {len(words.task)}
    assert set(drawn[1].needle.tolist()) == {900 - words.tail_length - words.needle_length}


def test_natural_filler_comes_from_the_book(words, book):
    prompts = draw_prompts(
        words, length=600, count=40, seed=1, depth=0.0, book=book, book_share=0.5
    )
    assert 5 < prompts.natural.sum() < 35
    text = " ".join(map(str, book.tolist()))
    for ids, natural in zip(prompts.ids, prompts.natural, strict=True):
        piece = ids[len(words.task) + words.needle_length : 600 - words.tail_length]
        assert (" ".join(map(str, piece.tolist())) in text) == bool(natural)
    with pytest.raises(ConfigError, match=r"book: 10 tokens came\. Allowed: more than 600"):
        draw_prompts(words, length=600, count=1, seed=0, book=book[:10], book_share=1.0)
    with pytest.raises(ConfigError, match=f"length: 20 came. Allowed: {words.shortest}"):
        draw_prompts(words, length=20, count=1, seed=0)


@pytest.mark.parametrize("variant", ["linear", "delta", "delta-corrected", "local"])
def test_streams_equal_the_whole(variant):
    model = build_model(VARIANTS[variant], MODEL, vocab_size=50, segment=8, seed=1)
    ids = torch.randint(50, (2, 45), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        state, parts = None, []
        for part in ids.split([8, 16, 3, 18], 1):
            hidden, state = hidden_after(model, part, state)
            parts.append(hidden)
        torch.testing.assert_close(torch.cat(parts, 1), model.hidden(ids), rtol=1e-4, atol=1e-5)


def gradient_of_the_first_segment(name):
    """Of the hidden vectors of the last segment, into the input of a one-layer model."""
    model = build_model(VARIANTS[name], {**MODEL, "layers": 1}, vocab_size=50, segment=8, seed=1)
    ids = torch.randint(50, (1, 24), generator=torch.Generator().manual_seed(0))
    seen = []
    model.embedding.register_forward_hook(lambda *call: seen.append(call[-1]))
    handle = model.embedding.register_forward_hook(lambda *call: call[-1].detach().requires_grad_())
    model.embedding.register_forward_hook(lambda *call: seen.append(call[-1]))
    hidden = model.hidden(ids)
    handle.remove()
    (gradient,) = torch.autograd.grad(hidden[:, 16:].square().sum() + hidden[:, 16:, 0].sum(),
                                      seen[-1])  # fmt: skip
    return gradient[:, :16].abs().max().item(), gradient[:, 16:].abs().max().item(), hidden


def test_detached_memory_is_read_but_passes_no_gradient():
    far, _, hidden = gradient_of_the_first_segment("linear")
    assert far > 1e-5
    cut, still, same = gradient_of_the_first_segment("detached")
    assert cut == 0.0
    assert still > 1e-3
    torch.testing.assert_close(same, hidden, rtol=1e-5, atol=1e-6)
    shut, _, other = gradient_of_the_first_segment("local")
    assert shut == 0.0
    assert not torch.allclose(other, hidden, atol=1e-3)


def test_variants_share_their_weights():
    drawn = {
        name: build_model(variant, MODEL, vocab_size=50, segment=8, seed=3)
        for name, variant in VARIANTS.items()
    }
    for name, model in drawn.items():
        assert torch.equal(model.head.weight, drawn["linear"].head.weight)
        assert torch.equal(model.blocks[1].mlp.up.weight, drawn["linear"].blocks[1].mlp.up.weight)
        assert bool(gate_shares(model)) == (name != "full")
    assert gate_shares(drawn["local"]) == [[0.0, 0.0], [0.0, 0.0]]
    set_segments(drawn["linear"], 16)
    assert drawn["linear"].config.attention.segment_length == 16
    assert drawn["linear"].blocks[0].attention.mechanism.settings["config"].segment_length == 16


def test_filled_memories_are_those_of_long_filler(words, book):
    sizes = dataclasses.replace(SIZES, trials={100_000: 1})
    training = training_of("prefilled", words, book, sizes=sizes)
    period = len(words.filler)
    model = build_model(VARIANTS["prefilled"], MODEL, vocab_size=300, segment=period, seed=0)
    prompts = draw_prompts(words, length=600, count=4, seed=1)  # no book among them
    stage = Stage(share=1.0, segment=period, length=600)
    state = filled_state(training, model, stage, prompts, 3, 1.0)
    ids = words.filler.repeat(32)[None]
    with torch.no_grad():
        _, long = hidden_after(model, ids, None)  # twice as long as what filled_state reads
    layer, wanted = state.layers[0], long.layers[0]
    ratios = (layer.normaliser / wanted.normaliser).flatten(1)
    torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios), rtol=1e-3, atol=0)
    assert len(set(ratios[:, 0].tolist())) == 4
    assert ratios.min() >= 0.5 - 1e-3
    assert ratios.max() <= 100_000 / (32 * period) * 1.001
    scaled = wanted.memory * ratios[:, :1, None, None]
    torch.testing.assert_close(layer.memory, scaled, rtol=1e-3, atol=1e-2)
    assert [fill_growth(step, 6) for step in (0, 2, 3, 5)] == pytest.approx([0, 0, 1 / 3, 1])
    losses = passkey_loss(model, words, prompts, SIZES, state, 0)
    without = passkey_loss(model, words, prompts, SIZES, None, 0)
    assert losses.answer != without.answer


@pytest.mark.parametrize("variant", ["linear", "prefilled"])
def test_a_killed_training_gives_the_same_losses(variant, words, book, tmp_path):
    training = training_of(variant, words, book)
    said = []
    whole = train_variant(training, tmp_path / "whole", clock=Clock(), say=said.append)
    assert said
    for attempt in range(10):
        try:
            broken = train_variant(
                training, tmp_path / "broken", clock=Clock(1e-6), say=lambda text: None
            )
            break
        except OutOfTime:
            assert attempt < 9
    assert attempt >= 2
    names = ("step", "segment", "length", "answer", "copy", "text", "right", "gates")
    assert [{n: row[n] for n in names} for row in broken.rows] == [
        {n: row[n] for n in names} for row in whole.rows
    ]
    assert [row["segment"] for row in whole.rows] == [64, 64, 128, 128]
    for one, other in zip(whole.model.parameters(), broken.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_answers_are_counted_from_the_whole_prompt(words, book):
    """A stream in small chunks, whose last one is shorter than the answer, as the dense model."""
    model = build_model(VARIANTS["linear"], MODEL, vocab_size=300, segment=64, seed=0).eval()
    settings = {"length": 642, "trials": 30, "haystack": "book", "book": book, "segment": 64,
                "dtype": torch.float32}  # fmt: skip
    result = ask(model, words, chunk_tokens=1, **settings)
    for name, depth in DEPTHS.items():
        prompts = draw_prompts(words, length=642, count=30, seed=1 << 40, depth=depth, book=book,
                               book_share=1.0)  # fmt: skip
        with torch.no_grad():
            right = model(prompts.ids)[:, -DIGITS:].argmax(-1) == prompts.keys
        cell = result["cells"][name]
        assert cell["digits_right"] == int(right.sum())
        assert cell["found"] == int(right.all(1).sum())
    assert result["state_bytes"] > 0
    assert result["peak_bytes"] is None
    assert not result["end_is_local"]  # two tokens in the last segment


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("passkey")
    calls = 0
    while True:
        calls += 1
        assert calls < 60
        outcome = run_passkey(
            open_data(prepared), prepared / "tokenizer.json", folder, sizes=SIZES, device="cpu",
            stop_after=1.0 + 0.5 * calls,
        )  # fmt: skip
        assert not outcome.failures
        if outcome.is_finished:
            return folder, outcome.rows, calls


def test_rows(finished, prepared):
    folder, rows, calls = finished
    assert calls > 1
    assert len({row["key"] for row in rows}) == len(rows)
    trained = [f"{row['variant']}:{row['seed']}" for row in rows if row["kind"] == "trained"]
    assert trained == phases(SIZES)
    asked = {(r["variant"], r["seed"], r["haystack"], r["length"])
             for r in rows if r["kind"] == "passkey"}  # fmt: skip
    wanted = set()
    for variant in VARIANTS:
        for seed in SIZES.seeds:
            short = variant == "full" or (variant in ("local", "detached") and seed)
            for haystack in HAYSTACKS:
                wanted |= {(variant, seed, haystack, n) for n in ((640,) if short else (640, 896))}
    assert asked == wanted
    states = {row["state_bytes"] for row in rows
              if row["kind"] == "passkey" and row["variant"] == "linear"}  # fmt: skip
    assert len(states) == 1  # of 640 and 896 tokens alike
    model = Transformer.load(folder / "runs" / "delta-1" / "model")
    assert model.config.attention.update == "delta"
    assert model.config.attention.segment_length == 128
    again = run_passkey(open_data(prepared), prepared / "tokenizer.json", folder, sizes=SIZES,
                        device="cpu")  # fmt: skip
    assert len(again.rows) == len(rows)


def test_phases_and_budget(prepared, tmp_path):
    data, tokens = open_data(prepared), prepared / "tokenizer.json"
    outcome = run_passkey(
        data, tokens, tmp_path, sizes=SIZES, device="cpu", budget_minutes=0.02,
        only=["full:1"],
    )  # fmt: skip
    assert outcome.is_finished
    assert {(r["variant"], r["seed"]) for r in outcome.rows} == {("full", 1)}
    assert (tmp_path / "plan.json").exists()
    with pytest.raises(ConfigError, match="only: 'linaer' is no phase"):
        run_passkey(data, tokens, tmp_path / "b", sizes=SIZES, only=["linaer"])


def test_report_of_small_sizes(finished):
    _, rows, _ = finished
    report = build_report(rows)
    text = render_markdown(report)
    first = report.verdicts[0]
    assert "trained at 640 tokens with segments of 128, finds a passkey in 896" in first.claim
    assert first.outcome == "not reproduced"  # eight steps
    assert "Sizes for a processor" in text
    assert "Infini, corrected delta, 2 seeds" in text
    assert "<script" not in render_html(report)
    with pytest.raises(ConfigError, match="none of this study's models"):
        build_report([])


def made_rows(found):
    """Rows of the full study in which (variant, length, depth) -> found of ten prompts a seed."""
    rows = []
    for seed in (0, 1):
        for variant in {name for name, _, _ in found}:
            rows.append({
                "study": "infini-passkey", "kind": "trained", "variant": variant, "seed": seed,
                "steps": 10, "tokens": 1000, "seconds": 1.0, "num_parameters": 5,
                "dtype": "bfloat16", "curve": [[5, 192, 2.0, 0.2], [10, 5120, 1.0, 0.5]],
                "gates_before": [[0.1, 0.9]], "gates": [[0.02, 1.0]],
                "sizes": dataclasses.asdict(FULL),
            })  # fmt: skip
        for variant, length in {(name, length) for name, length, _ in found}:
            cells = {}
            for depth in DEPTHS:
                n = found[variant, length, depth]
                cells[depth] = {"trials": 10, "found": n, "low": 0.0, "high": 1.0,
                                "digits_right": 5 * n, "digits": 50}  # fmt: skip
            rows.append({
                "study": "infini-passkey", "kind": "passkey", "variant": variant, "seed": seed,
                "haystack": "landmark", "length": length, "cells": cells, "state_bytes": 100,
                "peak_bytes": 10, "tokens_per_second": 5.0, "end_is_local": True,
            })  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("middle", "longest", "outcome"),
    [(10, 9, "reproduced"), (5, 0, "partly"), (4, 4, "not reproduced")],
)
def test_verdicts_follow_the_rows(middle, longest, outcome):
    found = {}
    for depth in DEPTHS:
        far = depth != "end"
        found["linear", 5_120, depth] = 10
        found["linear", 32_768, depth] = middle if far else 10
        found["linear", 1_048_576, depth] = longest if far else 10
        found["local", 1_048_576, depth] = 0 if far else 10
        found["detached", 5_120, depth] = 1 if far else 10
    rows = made_rows(found)
    text = render_markdown(build_report(rows))
    by_claim = {verdict.claim: verdict for verdict in build_report(rows).verdicts}
    linear = next(v for claim, v in by_claim.items() if "(linear)" in claim)
    assert linear.outcome == outcome
    assert f"{10 * longest}/{10 * longest}/100 % at 1,048,576" in linear.numbers
    assert "2 seeds" in linear.numbers
    local = next(v for claim, v in by_claim.items() if "held local" in claim)
    assert local.outcome == "reproduced"
    gradient = next(v for claim, v in by_claim.items() if "Gradient" in claim)
    assert gradient.outcome == "reproduced"
    assert next(v for c, v in by_claim.items() if "(delta)" in c).outcome == "not measured"
    assert "trained at 5,120 tokens with segments of 512, finds a passkey in 1,048,576" in text
    assert "Sizes for a processor" not in text
    assert rate(rows, "linear", 32_768) == (4 * middle, 40, 2)
    assert "| Infini, linear | 2 | 0 |" in text  # gates: two heads local, two memory


@pytest.mark.slow
def test_a_small_model_learns_to_read_the_memory(tmp_path):
    """The key lies segments away; held local, the same model stays at chance."""
    from longspan.studies.infini_passkey.task import Words

    def ids(*values):
        return torch.tensor(values)

    words = Words(task=ids(10), filler=torch.arange(11, 23), before=ids(23, 24, 25),
                  between=ids(26), after=ids(27), question=ids(28, 24, 25),
                  digits=torch.arange(10))  # fmt: skip
    sizes = dataclasses.replace(
        SMALL, model={"width": 64, "layers": 3, "heads": 2, "head_dim": 32}, book_share=0.0,
        stages=(Stage(share=1.0, segment=32, length=128),), steps=300, checkpoint_every=300,
    )  # fmt: skip
    shares = {}
    for name in ("linear", "local"):
        training = training_of(name, words, torch.zeros(5000, dtype=torch.int32), sizes=sizes,
                               steps=300, vocab_size=32)  # fmt: skip
        model = train_variant(training, tmp_path / name, clock=Clock(), say=lambda t: None).model
        asked = ask(model, words, length=160, trials=50, haystack="landmark", segment=32,
                    book=torch.zeros(1), chunk_tokens=4096, dtype=torch.float32)  # fmt: skip
        shares[name] = {d: cell["digits_right"] / 250 for d, cell in asked["cells"].items()}
    assert min(shares["linear"]["start"], shares["linear"]["middle"]) > 0.5
    assert max(shares["local"]["start"], shares["local"]["middle"]) < 0.25
