"""``.zst`` and ``.parquet`` files: the same documents as plain lines, and what is wrong with a file said by its name."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megastab.config.errors import UserError
from megastab.data.documents import plan_units, read_documents

TEXTS = [f"document {number} \u6f22\u5b57\n" * (number % 40 + 1) for number in range(500)]


def read_all(path: Path, unit_bytes: int | None = None, key: str = "text") -> list[str]:
    return [document.decode() for unit in plan_units([path], unit_bytes) for document in read_documents(unit, key)]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("how", ["one_frame", "no_size", "frames", "long"])
def test_zst_holds_the_same_documents(tmp_path: Path, how: str) -> None:
    data = lines(TEXTS)
    if how == "frames":  # as pzstd and `cat a.zst b.zst` write, with an empty one and a skippable one between
        skippable = (0x184D2A50).to_bytes(4, "little") + (7).to_bytes(4, "little") + b"skipped"
        half = data.index(b"\n", len(data) // 2) - 3
        packed = zstandard.compress(data[:half]) + zstandard.compress(b"") + skippable + zstandard.compress(data[half:])
    elif how == "long":  # zstd --long=28 from a pipe: a window beyond what is accepted by default
        settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
        packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
        packed = packer.compress(data) + packer.flush()
    else:
        packed = zstandard.ZstdCompressor(write_content_size=how == "one_frame").compress(data)
    (tmp_path / "d.jsonl.zst").write_bytes(packed)
    assert read_all(tmp_path / "d.jsonl.zst", unit_bytes=100) == TEXTS


def test_txt_zst_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "d.txt.zst").write_bytes(zstandard.compress("\n".join(TEXTS).encode() * 30))
    assert read_all(tmp_path / "d.txt.zst") == ["\n".join(TEXTS) * 30]


def test_damaged_zst_is_named(tmp_path: Path) -> None:
    whole = zstandard.ZstdCompressor(write_checksum=True).compress(lines(TEXTS))
    damaged = {"cut": whole[:-20], "header": whole[:3], "other": b"not zst at all", "flipped": whole[:90] + b"\0" * 9 + whole[99:]}
    damaged["last_byte"] = whole[:-1]
    for name, data in damaged.items():
        path = tmp_path / f"{name}.jsonl.zst"
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"{name}\.jsonl\.zst: damaged or cut-off zst"):
            read_all(path)


def test_bad_line_of_zst_is_named_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(lines(TEXTS[:41]) + b"oops\n"))
    with pytest.raises(UserError, match=r"d\.jsonl\.zst, line 42: not valid JSON"):
        read_all(tmp_path / "d.jsonl.zst")


def table(column: Any) -> pyarrow.Table:
    return pyarrow.table({"id": pyarrow.array(range(len(column))), "text": column})


KINDS = {
    "string": pyarrow.array(TEXTS),
    "large": pyarrow.array(TEXTS, pyarrow.large_string()),
    "dictionary": pyarrow.array(TEXTS).dictionary_encode(),
}


@pytest.mark.parametrize("unit_bytes", [1, 3000, None])
@pytest.mark.parametrize("column", KINDS.values(), ids=KINDS)
def test_rows_of_parquet_are_read_once_for_any_cut(tmp_path: Path, column: Any, unit_bytes: int | None) -> None:
    path = tmp_path / "d.parquet"
    parquet.write_table(table(column), path, row_group_size=30)
    assert read_all(path, unit_bytes) == TEXTS
    units = plan_units([path], unit_bytes)
    assert [unit.groups for unit in plan_units([path], 1)] == [(number, number + 1) for number in range(17)]
    assert units[-1].stop <= path.stat().st_size
    assert [unit.start for unit in units[1:]] == [unit.stop for unit in units[:-1]]


def test_column_is_named_by_key_and_empty_files_hold_nothing(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.table({"content": ["a", " ", "b"]}), path)
    assert read_all(path, key="content") == ["a", "", "b"]
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert read_all(path) == []


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.table({"content": ["a"], "id": [1]}), path)
    with pytest.raises(UserError, match=r"d\.parquet: no column 'text', only \['content', 'id'\]; .*--key"):
        read_all(path)
    with pytest.raises(UserError, match="column 'id' is int64, not string"):
        read_all(path, key="id")
    parquet.write_table(table(pyarrow.array(["a"] * 700 + [None, "b"])), path, row_group_size=300)
    with pytest.raises(UserError, match=r"d\.parquet, row 701: 'text' is null"):
        read_all(path, unit_bytes=1)


def test_text_that_is_not_utf8_is_named_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    column = pyarrow.array([b"fine"] * 400 + [b"caf\xe9"]).view(pyarrow.string())
    parquet.write_table(table(column), path, row_group_size=150)
    with pytest.raises(UserError, match=r"d\.parquet, row 401: byte 0xe9 is not UTF-8"):
        read_all(path, unit_bytes=1)


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "whole.parquet"
    parquet.write_table(table(KINDS["string"]), path, compression="none", write_page_checksum=True, use_dictionary=False)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(byte ^ 255 for byte in whole[middle : middle + 9]) + whole[middle + 9 :]
    for name, data in {"cut": whole[:-20], "empty": b"", "other": b"not parquet at all", "flipped": flipped}.items():
        damaged = tmp_path / f"{name}.parquet"
        damaged.write_bytes(data)
        with pytest.raises(UserError, match=rf"{name}\.parquet: damaged or cut-off parquet"):
            read_all(damaged)


@pytest.mark.parametrize(("name", "package"), [("d.jsonl.zst", "zstandard"), ("d.parquet", "pyarrow")])
def test_missing_package_is_named_with_its_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    plain = builtins.__import__

    def without(wanted: str, *rest: Any) -> Any:
        if wanted.split(".")[0] == package:
            raise ImportError(f"No module named {wanted}")
        return plain(wanted, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"{name}: reading .* needs the {package} package; pip install {package}"):
        plan_units([tmp_path / name])
