import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from longspan.errors import ConfigError
from longspan.eval.rows import RowFile, read_rows, settings_key


def test_key_depends_on_values_not_on_order():
    assert settings_key({"a": 1, "b": [2]}) == settings_key({"b": [2], "a": 1})
    assert settings_key({"a": 1}) != settings_key({"a": 2})
    assert settings_key({"a": 1}) != settings_key({"a": 1, "b": None})


def test_append_find_and_read_again(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    with RowFile(path) as rows:
        rows.append({"key": "a", "loss": 1.5})
        rows.append({"key": "b", "loss": 2.5})
    with RowFile(path) as rows:
        assert rows.find("a")["loss"] == 1.5
        assert rows.find("c") is None
    assert [row["key"] for row in read_rows(path)] == ["a", "b"]


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_half_written_last_line_is_cut_off(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    line = json.dumps({"key": "b", "loss": 2.5}) + "\n"
    assert len(line) > 24
    path.write_text('{"key": "a"}\n' + line[:cut])
    assert [row["key"] for row in read_rows(path)] == ["a"]
    with RowFile(path) as rows:
        assert [row["key"] for row in rows.rows] == ["a"]
        rows.append({"key": "c"})
    assert path.read_text() == '{"key": "a"}\n{"key": "c"}\n'


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b"}')
    with RowFile(path) as rows:
        rows.append({"key": "c"})
    assert [row["key"] for row in read_rows(path)] == ["a", "b", "c"]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "a"}\nnonsense\n{"key": "b"}\n')
    with pytest.raises(ConfigError, match=r"line 2 of .* is not a JSON object"):
        RowFile(path)


def test_one_writer_at_a_time(tmp_path):
    with (
        RowFile(tmp_path / "rows.jsonl"),
        pytest.raises(ConfigError, match="being written by another run"),
    ):
        RowFile(tmp_path / "rows.jsonl")
    RowFile(tmp_path / "rows.jsonl").close()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out: .* cannot be written .* Pass another folder"):
        RowFile(tmp_path / "file" / "rows.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_says_so(tmp_path):
    full = os.open("/dev/full", os.O_WRONLY)
    with RowFile(tmp_path / "rows.jsonl") as rows:
        rows.append({"key": "a"})
        os.dup2(full, rows._fd)
        with pytest.raises(ConfigError, match=r"No space left.*free some space"):
            rows.append({"key": "b"})
    os.close(full)
    assert [row["key"] for row in read_rows(tmp_path / "rows.jsonl")] == ["a"]


def test_missing_file_to_read(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file"):
        read_rows(tmp_path / "none.jsonl")


def test_killed_while_writing_keeps_whole_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    script = textwrap.dedent(f"""
        from longspan.eval.rows import RowFile
        with RowFile({str(path)!r}) as rows:
            for i in range(10**6):
                rows.append({{"key": str(i), "filler": "x" * 5000}})
                if i == 20: print("go", flush=True)
    """)
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with RowFile(path) as rows:
        count = len(rows.rows)
        assert count >= 21
        assert [row["key"] for row in rows.rows] == [str(i) for i in range(count)]
