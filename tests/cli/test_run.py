import pytest

from longspan.cli._run import run_lines


def test_a_row_that_was_stored_but_not_announced_is_reported(tmp_path):
    def work(rows, listener):
        listener.begin("a")
        rows.append({"key": "a"})
        listener.finish("a", rows.rows[-1], "")
        listener.begin("b")
        rows.append({"key": "b"})
        raise KeyboardInterrupt

    outcome = run_lines(tmp_path, 3, work)
    assert [row["key"] for row in outcome.rows] == ["a", "b"]
    assert outcome.exit_code == 130
    assert outcome.notes == ["Interrupted: 2 of 3 lines are finished and kept."]


def test_a_run_that_fails_before_its_first_row_leaves_nothing(tmp_path):
    def work(rows, listener):
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        run_lines(tmp_path / "new", 1, work)
    assert list(tmp_path.iterdir()) == []


def test_an_old_folder_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")

    def work(rows, listener):
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        run_lines(tmp_path, 1, work)
    assert (tmp_path / "notes.txt").read_text() == "mine"
