"""Files in the format of LongBench: read whole, in part, from a folder and from the archive."""

import json
import zipfile

import pytest

from longspan.errors import ConfigError
from longspan.eval.longbench import is_longbench, longbench_texts, read_longbench


def line(number, dataset, context="A river runs. ", **changes):
    row = {"input": f"What {number}?", "context": context * 3, "answers": ["a river", "river"],
           "length": 9, "dataset": dataset, "language": "en", "all_classes": None,
           "_id": f"id{number}"}  # fmt: skip
    return json.dumps({**row, **changes}, ensure_ascii=False)


@pytest.fixture
def folder(tmp_path):
    home = tmp_path / "data"
    home.mkdir()
    (home / "qasper.jsonl").write_text(line(1, "qasper") + "\n" + line(2, "qasper") + "\n")
    (home / "trec.jsonl").write_text(
        line(3, "trec", "长文 ", language="zh", all_classes=["Animal", "Colour"]) + "\n",
        encoding="utf-8",
    )
    return home


def test_reads_files_folders_and_the_archive(folder, tmp_path):
    items = list(read_longbench(folder))
    assert [item.item_id for item in items] == ["id1", "id2", "id3"]
    assert items[0].answers == ("a river", "river")
    assert items[0].all_classes == ()
    assert items[2].all_classes == ("Animal", "Colour")
    assert items[2].context == "长文 " * 3
    assert list(read_longbench(folder / "trec.jsonl")) == items[2:]
    assert list(read_longbench(folder, datasets=["qasper"])) == items[:2]
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for file in folder.iterdir():
            made.write(file, f"data/{file.name}")
        made.writestr("data/readme.txt", "not this")
    assert list(read_longbench(archive)) == items


def test_contexts_are_texts_once(folder):
    texts = list(longbench_texts(read_longbench(folder)))
    assert [text.name for text in texts] == ["qasper:id1", "trec:id3"]


def test_recognised(folder, tmp_path):
    assert is_longbench(folder)
    (tmp_path / "book.txt").write_text("A book.")
    (tmp_path / "lines.jsonl").write_text('{"text": "A book."}')
    assert not is_longbench(tmp_path / "book.txt")
    assert not is_longbench(tmp_path / "lines.jsonl")
    assert not is_longbench(None)


def test_refusals(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"qasper, trec"):
        list(read_longbench(folder, datasets=["narrativeqa"]))
    with pytest.raises(ConfigError, match=r"no \.jsonl"):
        list(read_longbench(tmp_path / "nothing.txt"))
    (folder / "trec.jsonl").write_text('{"context": "x"}\n')
    with pytest.raises(ConfigError, match=r"trec\.jsonl:1 is no item \(KeyError: 'answers'"):
        list(read_longbench(folder))
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04cut")
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_longbench(tmp_path / "cut.zip"))
