import pytest

from longspan.bench.report import (
    bench_tables,
    crossover_lines,
    crossovers,
    draw,
    readme_table,
    write_bench_page,
)
from longspan.errors import ConfigError


def make_rows(speedups, *, verified=True):
    rows = []
    for length, speedup in speedups.items():
        shared = {
            "kind": "bench",
            "pass": "forward",
            "head_dim": 64,
            "heads": 4,
            "batch": 1,
            "dtype": "float32",
            "length": length,
            "device": "a machine",
            "torch": "2.13",
            "max_abs_error": 1e-6,
            "refusal": None,
        }
        rows.append(
            {
                **shared,
                "label": "exact",
                "is_baseline": True,
                "ms_p50": length / 100,
                "verified": True,
                "speedup": None,
            }
        )
        rows.append(
            {
                **shared,
                "label": "window:window=64",
                "is_baseline": False,
                "ms_p50": length / 100 / speedup,
                "verified": verified,
                "speedup": speedup,
            }
        )
    return rows


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ({128: 0.5, 512: 2.0, 2048: 8.0}, 256.0),  # the geometric middle of 128 and 512
        ({128: 2.0, 512: 0.5, 2048: 2.0}, 1024.0),  # faster, slower, faster: only the last counts
        ({128: 0.5, 512: 0.9}, None),
        ({128: 3.0, 512: 4.0}, 128.0),
    ],
)
def test_crossover(speedups, expected):
    (result,) = crossovers(make_rows(speedups))
    assert result.label == "window:window=64"
    assert result.length == (pytest.approx(expected) if expected else None)


def test_sentences():
    (line,) = crossover_lines(make_rows({128: 0.5, 512: 2.0}))
    assert line.endswith("faster than exact attention from about 260 tokens.")
    (line,) = crossover_lines(make_rows({128: 0.5}))
    assert "exact attention is faster at all measured lengths" in line
    (line,) = crossover_lines(make_rows({128: 1.5}))
    assert "faster than exact attention at all measured lengths" in line


def test_readme_leaves_out_what_was_not_verified():
    table = readme_table(make_rows({128: 0.5, 512: 2.0}))
    assert (
        "| `window:window=64` | forward | 64 | 2.56 ms (0.50\u00d7) | 2.56 ms (2.0\u00d7) |"
        in table
    )
    assert "| `exact` | forward | 64 | 1.28 ms | 5.12 ms |" in table
    assert "a machine" in table
    assert "window" not in readme_table(make_rows({128: 0.5}, verified=False))
    assert readme_table([]) == "No verified rows.\n"


def test_table_and_refused_rows():
    from rich.console import Console

    rows = make_rows({128: 0.5})
    rows[1].update(ms_p50=None, speedup=None, verified=False, refusal="out of memory")
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(next(bench_tables(rows)))
    assert "out of memory" in console.export_text()
    assert crossovers(rows) == []


def test_pictures_are_repeatable(tmp_path):
    pytest.importorskip("matplotlib")
    rows = make_rows({128: 0.5, 512: 2.0})
    for name in ("a.svg", "a.png"):
        first = draw(rows, tmp_path / name).read_bytes()
        assert draw(rows, tmp_path / name).read_bytes() == first
        assert len(first) > 1000
    with pytest.raises(ConfigError, match=r"path: a\.pdf came\. Allowed: .*\.png or \.svg"):
        draw(rows, tmp_path / "a.pdf")


def test_the_page_marks_unverified_rows_and_is_self_contained(tmp_path):
    pytest.importorskip("matplotlib")
    page = write_bench_page(
        make_rows({128: 0.5, 512: 2.0}, verified=False), tmp_path / "b.html"
    ).read_text()
    assert page.count("<td>no</td>") == 2
    assert "<script" not in page
    assert "src=" not in page
    assert "260 tokens" in page
