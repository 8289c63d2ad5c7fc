import json


def test_profile_of_the_models_own_attention(longspan, folder, book, tmp_path):
    arguments = [
        "profile", "--model", folder, "--text", book, "--tokens", 200, "--thresholds", "0.5,0.01",
        "--out", tmp_path,
    ]  # fmt: skip
    code, out, _ = longspan(*arguments)
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 4 * 2
    assert {row["mechanism"] for row in rows} == {"softmax"}
    assert {row["num_queries"] for row in rows} == {100}
    assert "less than 50 % of the softmax mass" in out
    page = (tmp_path / "spans.html").read_text()
    assert "How far back each head reads" in page
    assert longspan(*arguments)[:2] == (0, out), "the same folder again uses its rows"
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(rows)


def test_profile_refuses_what_has_no_spans(longspan, folder, book):
    code, _, messages = longspan(
        "profile", "--model", folder, "--text", book, "--attention", "window:window=8"
    )
    assert code == 2
    assert "Allowed: exact, stick_breaking" in messages


def test_profile_of_convolution_likeness(longspan, folder, book, tmp_path):
    arguments = ["profile", "--model", folder, "--text", book, "--tokens", 200, "--out", tmp_path,
                 "--measure", "convolution"]  # fmt: skip
    code, out, _ = longspan(*arguments)
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 4
    assert all(0 <= row["window"] <= 1 for row in rows)
    assert "fail without" in out
    assert "How convolution-like each head is" in (tmp_path / "convolution.html").read_text()
    assert longspan(*arguments)[:2] == (0, out), "the same folder again uses its rows"


def test_profile_refuses_an_unknown_measure(longspan, folder, book):
    code, _, messages = longspan(
        "profile", "--model", folder, "--text", book, "--measure", "convolutions"
    )
    assert code == 2
    assert "Did you mean 'convolution'" in messages
