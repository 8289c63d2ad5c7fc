"""Texts: the bundled book, files, folders, archives, and their tokens."""

import hashlib
import io
import json
import lzma
import tarfile
from pathlib import Path

import pytest

from longspan.errors import ConfigError
from longspan.eval import data
from longspan.eval.data import BOOKS, iter_texts, load_text, take_tokens


def write_archive(path, members):
    with tarfile.open(path, "w:xz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_bundled_book():
    book = load_text()
    assert load_text(book.name) == book
    assert book.name in BOOKS
    assert 200_000 < len(book.text) < 1_100_000
    assert "\r" not in book.text
    assert book.sha256 == hashlib.sha256(book.text.encode()).hexdigest()
    provenance = Path(data.__file__).with_name("books") / "README.md"
    assert book.sha256 in provenance.read_text()


def test_line_ends_and_byte_order_mark(tmp_path):
    file = tmp_path / "old.txt"
    file.write_bytes("\ufeffone\r\ntwo\rthree\n".encode())
    assert load_text(file)[:2] == ("old.txt", "one\ntwo\nthree\n")


def test_compressed_file(tmp_path):
    file = tmp_path / "a.txt.xz"
    file.write_bytes(lzma.compress("Kôr".encode()))
    assert load_text(str(file)).text == "Kôr"


def test_existing_file_goes_before_a_bundled_book(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(data.DEFAULT_BOOK).write_text("mine")
    assert load_text(data.DEFAULT_BOOK).text == "mine"
    assert load_text().text != "mine"


def test_json_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": t, "id": i}) for i, t in enumerate(["one", " ", "two\u2028three"])]
    file.write_text("\n\n".join(lines))
    assert load_text(file).text == "one\n\ntwo\u2028three"
    assert [t.text for t in iter_texts(file)] == ["one", "two\u2028three"]


def test_json_lines_keep_raw_separators_inside_strings(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n")
    assert load_text(file).text == "a\u2028b\x85c"


@pytest.mark.parametrize("line", ['{"text": ', '{"body": "x"}', '{"text": 3}', '["x"]', '"x"'])
def test_bad_json_line_is_named(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ConfigError, match=r"line 2 of .*a\.jsonl.*Allowed: one object per line"):
        load_text(file)


def test_folder_in_order_of_names(tmp_path):
    (tmp_path / "in").mkdir()
    for name, text in {"b.txt": "two", "a.txt": "one", "in/c.txt": "three", "d.md": "no"}.items():
        (tmp_path / name).write_text(text)
    assert load_text(tmp_path).text == "one\n\ntwo\n\nthree"
    assert load_text(tmp_path).name == tmp_path.name


def test_archive_and_its_members(tmp_path):
    members = {"X__Two.txt": b"two", "A__One.txt": b"one\r\n", "notes.md": b"no"}
    path = write_archive(tmp_path / "books.tar.xz", members)
    assert load_text(path).text == "one\n\n\ntwo"
    assert [part.name for part in iter_texts(path)] == ["A__One.txt", "X__Two.txt"]
    assert load_text(path / "X__Two.txt")[:2] == ("X__Two.txt", "two")
    assert load_text(f"{path}/X__Two").text == "two"
    with pytest.raises(ConfigError, match=r"no member 'X_Too\.txt'\. Did you mean 'X__Two\.txt'"):
        load_text(path / "X_Too.txt")


def test_cut_archive(tmp_path):
    path = write_archive(tmp_path / "books.tar.xz", {"a.txt": bytes(range(32, 127)) * 500})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ConfigError, match=r"not a whole archive.*cut short: copy it again"):
        load_text(path)
    (tmp_path / "b.txt.xz").write_bytes(b"not xz")
    with pytest.raises(ConfigError, match=r"b\.txt\.xz is not a whole archive"):
        load_text(tmp_path / "b.txt.xz")


def test_missing_file_suggests_a_book(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'great-expectations'") as caught:
        load_text("great-expectation")
    assert "neither a file, a folder nor a bundled book" in str(caught.value)


def test_not_utf8(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("Kôr".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"not UTF-8 \(byte 1 is 0xf4\).*iconv"):
        load_text(file)


@pytest.mark.parametrize("content", ["", " \n\t\r\n", "\ufeff"])
def test_empty_file(tmp_path, content):
    file = tmp_path / "empty.txt"
    file.write_text(content)
    with pytest.raises(ConfigError, match="holds no text"):
        load_text(file)
    with pytest.raises(ConfigError, match="holds no text"):
        load_text(tmp_path)


def test_unreadable_file(tmp_path, monkeypatch):
    file = tmp_path / "secret.txt"
    file.write_text("x")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied\)"):
        load_text(file)


@pytest.fixture(params=[False, True], ids=["plain", "bos"])
def tokenizer(request):
    pytest.importorskip("transformers")
    from longspan.testing.models import byte_tokenizer

    return byte_tokenizer(add_bos=request.param)


def test_take_tokens(tokenizer):
    front = tokenizer("")["input_ids"]
    text = "abc def ghi"
    ids = list(text.encode())
    assert take_tokens(text, tokenizer, 5) == (front + ids)[:5]
    assert take_tokens(text, tokenizer, 3, start=4) == (front + ids[4:])[:3]
    assert take_tokens(text, tokenizer, len(front) + 11) == front + ids


def test_take_tokens_too_few(tokenizer):
    front = len(tokenizer("")["input_ids"])
    with pytest.raises(ConfigError, match=f"count is 20, but the text has {7 + front} tokens"):
        take_tokens("abc def ghi", tokenizer, 20, start=4)
    with pytest.raises(ConfigError, match=r"book\.txt has"):
        take_tokens(data.Text("book.txt", "abc", ""), tokenizer, 20)
    with pytest.raises(ConfigError, match=f"has {front} tokens from start=50"):
        take_tokens("abc", tokenizer, 5, start=50)


@pytest.mark.parametrize(("count", "start"), [(0, 0), (-1, 0), (3, -1)])
def test_take_tokens_bad_numbers(tokenizer, count, start):
    with pytest.raises(ConfigError, match=f"count={count} and start={start} came"):
        take_tokens("abc", tokenizer, count, start=start)
