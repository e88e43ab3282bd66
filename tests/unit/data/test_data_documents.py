"""Every document once, whatever the cut; every bad input by file, line and fix."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from corpora import write_jsonl

from megastab.config.errors import UserError
from megastab.data.documents import plan_units, read_documents


def read_all(paths: list[Path], unit_bytes: int | None = None, key: str = "text") -> list[str]:
    return [document.decode() for unit in plan_units(paths, unit_bytes) for document in read_documents(unit, key)]


@pytest.mark.parametrize("unit_bytes", [1, 2, 7, 20, 21, 22, 1000, None])
def test_every_line_is_read_once_for_any_cut(tmp_path: Path, unit_bytes: int | None) -> None:
    texts = ["a", "bb" * 20, "\u6f22\u5b57\n", "c" * 13, "last"]
    assert read_all([write_jsonl(tmp_path / "d.jsonl", texts)], unit_bytes) == texts


def test_last_line_needs_no_newline_and_blank_lines_are_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert read_all([path]) == ["a", "b"]


def test_txt_is_one_document_and_gz_equals_plain(tmp_path: Path) -> None:
    text = "line one\n\n  line two\n"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    lines = "".join(json.dumps({"text": str(number)}) + "\n" for number in range(1000))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    paths = [tmp_path / name for name in ("a.txt", "b.txt.gz", "c.jsonl.gz")]
    assert read_all(paths, unit_bytes=10) == [text, text, *map(str, range(1000))]


def test_documents_without_visible_text_come_empty(tmp_path: Path) -> None:
    assert read_all([write_jsonl(tmp_path / "d.jsonl", ["a", "", " \n\t", "b"])]) == ["a", "", "", "b"]


def test_key_names_the_text(tmp_path: Path) -> None:
    assert read_all([write_jsonl(tmp_path / "d.jsonl", ["a"], key="content")], key="content") == ["a"]


BAD_LINES = {
    "not_json": (b'{"text": "a"', "not valid JSON"),
    "not_an_object": (b'["a"]', "one JSON object"),
    "missing_key": (b'{"content": "a", "id": 1}', r"no key 'text', only \['content', 'id'\].*--key"),
    "not_a_string": (b'{"text": 3}', "'text' is a int"),
    "not_utf8": (b'{"text": "caf\xe9"}', "byte 0xe9 is not UTF-8.*iconv"),
    "half_a_pair": (b'{"text": "\\ud800"}', "half a surrogate"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(("line", "said"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line_is_named_by_its_number(tmp_path: Path, line: bytes, said: str, packed: bool) -> None:
    path = tmp_path / ("d.jsonl.gz" if packed else "d.jsonl")
    data = b'{"text": "good"}\n' * 41 + line + b"\n"
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(UserError, match=f"line 42: .*{said}"):
        read_all([path], unit_bytes=100)


def test_bad_byte_of_a_text_file_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\nfine\nb\xffd\n")
    with pytest.raises(UserError, match=r"a\.txt, line 3: byte 0xff is not UTF-8"):
        read_all([tmp_path / "a.txt"])


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b"some text " * 1000)
    for number, data in enumerate((whole[:-20], b"not gzip at all", whole[:30] + b"\0" * 10 + whole[40:])):
        path = tmp_path / f"{number}.txt.gz"
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"{number}.txt.gz: damaged"):
            read_all([path])


def test_unusable_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    (tmp_path / "folder.txt").mkdir()
    for paths, said in (([], "no input files"), (["a.csv"], "format"), (["none.txt"], "no such file"), (["folder.txt"], "not a file")):
        with pytest.raises(UserError, match=said):
            plan_units([tmp_path / path for path in paths])
