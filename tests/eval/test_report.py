import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from longspan.errors import ConfigError
from longspan.eval.report import comparison_table, headline, render_page, write_page
from longspan.eval.report.numbers import (
    bytes_text,
    change_text,
    percent_text,
    seconds_text,
    value_text,
)
from longspan.eval.report.svg import Series, line_plot, nice_ticks, scatter_plot

SPECS = [
    "exact",
    "window:window=512",
    "window:window=1024",
    "window:window=512,num_sinks=0",
    "window:window=64,num_sinks=16",
    "window:window=128",
    "window:window=256",
    "window:window=2048",
]


def make_rows(count, *, length=4096):
    edges = [1 + (length - 1) * i // 32 for i in range(33)]
    rows = []
    for index, label in enumerate(SPECS[:count]):
        extra = 0.01 * index * index
        by_position = [3.0 + math.sin(i / 3) / 4 + (extra if i > 4 else 0.0) for i in range(32)]
        loss = sum(by_position) / 32
        change = extra * 27 / 32
        rows.append(
            {
                "key": f"{index:016x}",
                "label": label,
                "kind": "compare",
                "mechanism": label.partition(":")[0],
                "config": {"window": 512, "num_sinks": 4} if index else {},
                "layers": "all" if index else "none",
                "model": "tiny <model>",
                "text": "A & B",
                "length": length,
                "dtype": "float32",
                "device_type": "cpu",
                "loss": loss,
                "perplexity": math.exp(loss),
                "loss_change": change,
                "loss_change_error": 0.003,
                "perplexity_ratio": math.exp(change),
                "kl": extra,
                "top1": 1 - extra / 2,
                "edges": edges,
                "loss_by_position": by_position,
                "kl_by_position": [extra] * 32,
                "prefill_seconds": 40.0 / (index + 1),
                "prefill_runs": 1,
                "prefill_ratio": 1 / (index + 1),
                "peak_bytes": 3 * 2**20 * (index + 1),
                "peak_method": "sampled",
                "visited_fraction": 1.0 if not index else 0.1 * index,
                "num_layers": 30,
                "num_patched_layers": 30 if index else 0,
                "calls": {},
                "command": "longspan compare --quick",
                "time": "2026-11-23T12:40:00+00:00",
                "torch": "2.13.0",
            }
        )
    return rows


class Checker(HTMLParser):
    """Counts tags, checks that they nest, and collects addresses."""

    VOID = frozenset({"meta", "wbr", "br", "line", "circle", "rect", "polyline"})

    def __init__(self):
        super().__init__()
        self.stack, self.counts, self.addresses, self.text = [], {}, [], []

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_page_is_whole_and_self_contained(count, tmp_path):
    path = write_page(make_rows(count), tmp_path / "report.html", notes=["left <out>"])
    page = path.read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.stack == []
    assert checker.addresses == []
    assert "script" not in checker.counts
    assert "http" not in page
    assert "nan" not in page.lower().replace("nanum", "")
    assert checker.counts["tr"] == count + 1
    assert checker.counts["svg"] == (3 if count == 1 else 5)
    text = "".join(checker.text)
    assert "tiny <model>" in text
    assert "A & B" in text
    assert "left <out>" in text
    assert "longspan compare --quick" in text
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_mechanism_that_gives_nan_is_shown_as_missing(tmp_path):
    rows = make_rows(3)
    nan = float("nan")
    rows[1].update(
        loss=nan,
        perplexity=nan,
        perplexity_ratio=nan,
        loss_change=nan,
        loss_change_error=None,
        kl=nan,
        loss_by_position=[3.0] * 5 + [nan] * 27,
    )
    page = write_page(rows, tmp_path / "report.html").read_text()
    assert ">nan" not in page
    assert "nan," not in page
    assert "<td>\u2013</td>" in page
    assert headline(rows).count("window:window=1024") == 1


def boxes_of_labels(svg):
    found = re.findall(r'<text class="name" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)<', svg)
    return [(float(x), float(y) - 11, float(x) + 7 * len(t), float(y) + 3) for x, y, t in found]


@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_labels_of_points_do_not_overlap(spread):
    series = [
        Series(label=label, colour=i, x=[50 + spread * i % 7], y=[3 + spread * (i * i % 5)])
        for i, label in enumerate(SPECS)
    ]
    svg = scatter_plot(series, x_title="x", y_title="y", x_text=str, y_text=str)
    boxes = boxes_of_labels(svg)
    assert len(boxes) >= 3
    for i, a in enumerate(boxes):
        assert a[0] >= 0
        assert a[2] <= 520
        for b in boxes[:i]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def test_a_line_with_gaps():
    one = Series(label="a", colour=0, x=[0, 1, 2, 3], y=[1.0, math.nan, 2.0, 3.0])
    svg = line_plot(
        [one], x_title="x", y_title="y", x_ticks=[0, 3], x_text=str, y_text=lambda v: f"{v:g}"
    )
    assert svg.count("<polyline") == 1
    assert svg.count("<circle") == 1
    assert "nan" not in svg


def test_rows_without_exact_are_refused():
    with pytest.raises(ConfigError, match=r"rows: 1 came, the first not of exact attention"):
        render_page(make_rows(2)[1:])


def test_headline_names_the_closest():
    text = headline(make_rows(3)).replace("\u00a0", " ")
    assert text.startswith("On 4,096 tokens of A & B, window:window=512 stays closest to exact")
    assert "10.0 % of the scores, 0.50\u00d7 the prefill time" in text
    assert "has perplexity" in headline(make_rows(1))


def test_a_busy_machine_is_said_to_be_busy():
    rows = make_rows(3)
    assert "busy" not in render_page(rows).replace("on a busy machine.", "")
    rows[2]["cpu_share"] = 0.31
    page = render_page(rows)
    assert "prefill time (on a busy machine)." in page
    assert "the process got 31.0\u00a0% of its threads" in page


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_table_fits(width):
    from rich.console import Console

    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_table(make_rows(8), width=width))
    text = console.export_text()
    assert "\u2026" not in text
    assert all(heading in text for heading in ("ppl", "memory", "visited"))
    assert "num_sinks=16" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (value_text(18.0912, 4), "18.09"),
        (value_text(0.0), "0"),
        (value_text(99.96, 3), "100"),
        (value_text(1234567.0, 3), "1,230,000"),
        (value_text(float("inf")), "\u221e"),
        (value_text(None), "\u2013"),
        (change_text(0.0123), "+1.2 %"),
        (change_text(-0.0012), "\u22120.12 %"),
        (change_text(0.00001), "0 %"),
        (change_text(3.5), "+350 %"),
        (percent_text(1.0), "100 %"),
        (percent_text(0.9999), "99.9 %"),
        (percent_text(0.0312), "3.1 %"),
        (seconds_text(0.0123), "12.3 ms"),
        (seconds_text(44.21), "44.2 s"),
        (seconds_text(185), "3 min 05 s"),
        (seconds_text(4.2e-5), "42.0 \u00b5s"),
        (bytes_text(1536), "1.50 KiB"),
        (bytes_text(0), "0 B"),
        (bytes_text(300e6), "286 MiB"),
    ],
)
def test_numbers(text, expected):
    assert text.replace("\u00a0", " ") == expected


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.3, 3.9), (-0.2, 0.7), (0, 1e-9), (5, 5)])
def test_ticks_cover_and_are_round(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 8
    steps = {round(b - a, 14) for a, b in pairwise(ticks)}
    assert len(steps) == 1
