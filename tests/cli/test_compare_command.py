import json
import signal
import time

import pytest

WINDOWS = [16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224]
MANY = [part for window in WINDOWS for part in ("--attention", f"window:window={window}")]


def rows_of(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_end_to_end(longspan, folder, book, tmp_path):
    out = tmp_path / "run"
    code, shown, _ = longspan(
        "compare", "--model", folder, "--text", book, "--length", 512, "--out", out,
        "--attention", "window:window=32", "--attention", "window:window=600,num_sinks=0",
    )  # fmt: skip
    assert code == 0
    rows = rows_of(out)
    assert [row["label"] for row in rows] == [
        "exact", "window:window=32", "window:window=600,num_sinks=0",
    ]  # fmt: skip
    assert all(row["length"] == 512 for row in rows)
    assert rows[2]["kl"] < 1e-6 < rows[1]["kl"]
    assert str(out / "report.html") in shown.replace("\n", "")
    page = (out / "report.html").read_text()
    for row in rows:
        assert row["label"].split(",")[0] in page
    assert f"{rows[1]['perplexity']:.1f}"[:4] in page
    assert f"--out {out}" in page
    assert "A-Tale" in page


def test_the_default_set_runs(longspan, folder, book, tmp_path):
    from longspan.mechanisms import MECHANISMS

    out = tmp_path / "run"
    code, _, _ = longspan(
        "compare", "--model", folder, "--text", book, "--length", 256, "--out", out
    )
    assert code == 0
    names = {row["mechanism"] for row in rows_of(out)}
    assert names == {name for name, m in MECHANISMS.items() if m.on_pretrained}


def test_layers_and_a_folder_of_its_own(longspan, folder, book, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, _ = longspan(
        "compare", "--model", folder, "--text", book, "--length", 128, "--layers", "last:1",
        "--attention", "window:window=8",
    )  # fmt: skip
    assert code == 0
    (out,) = (tmp_path / "runs").iterdir()
    assert rows_of(out)[1]["num_patched_layers"] == 1


def wait_for_rows(path, count, child):
    for _ in range(6000):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert child.poll() is None, child.communicate()
        time.sleep(0.005)
    pytest.fail("no rows after 30 seconds")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_and_run_again(spawn, longspan, folder, book, tmp_path, how):
    out = tmp_path / "run"
    arguments = [
        "compare",
        "--model",
        folder,
        "--text",
        book,
        "--length",
        4096,
        "--out",
        out,
        *MANY,
    ]
    child = spawn(*arguments)
    wait_for_rows(out / "rows.jsonl", 2, child)
    child.send_signal(how)
    _, messages = child.communicate(timeout=60)
    whole = (out / "rows.jsonl").read_bytes().count(b"\n")
    assert 2 <= whole <= len(WINDOWS)
    before = (out / "rows.jsonl").read_bytes().split(b"\n")[:whole]
    if how == signal.SIGINT:
        assert child.returncode == 130
        assert f"{whole} of {len(WINDOWS) + 1} lines are finished and kept" in messages
        assert "--out" in messages
        page = (out / "report.html").read_text()
        assert page.count("<tr>") == whole + 1
        assert "Interrupted:" in page
    else:
        assert child.returncode == -signal.SIGKILL
        with open(out / "rows.jsonl", "ab") as handle:
            handle.write(b'{"key": "half a ro')  # killed in the middle of a write

    code, _, messages = longspan(*arguments)
    assert code == 0
    assert messages.count("kept from an earlier run") == whole
    after = (out / "rows.jsonl").read_bytes().split(b"\n")
    assert after[:whole] == before
    assert len(rows_of(out)) == len(WINDOWS) + 1
    page = (out / "report.html").read_text()
    assert page.count("<tr>") == len(WINDOWS) + 2
    assert "Interrupted:" not in page
