"""Documents out of files: ``.txt`` (a file is a document), ``.jsonl`` (a line is one), either as ``.gz`` or ``.zst``; ``.parquet`` (a row).

Work is cut into units that depend on the input files alone, never on the number of workers or ranks: ranges of lines of a ``.jsonl``,
row groups of a ``.parquet``, and whole files otherwise. A line belongs to the unit that holds its first byte. Documents are UTF-8 bytes
throughout.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from megastab.config.errors import UserError
from megastab.data.parquet import read_rows, row_group_bytes
from megastab.data.zstd import open_zst, require_zstandard

_SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".txt.zst", ".jsonl.zst", ".parquet")
_MIN_UNIT_BYTES = 1 << 20  # below it, starting a unit costs more than it balances
_MAX_UNITS = 2048  # bounds the number of shard files a run has open or waiting


@dataclass(frozen=True)
class Unit:
    """Bytes [start, stop) of a file as it lies on disk; a whole file unless it is a plain ``.jsonl`` or a ``.parquet``."""

    path: str
    start: int
    stop: int
    state: tuple[int, int] = (0, 0)
    """Size in bytes and time of change in nanoseconds of the file when the work was planned."""
    groups: tuple[int, int] | None = None
    """Row groups [first, stop) of a ``.parquet``; the bytes are then theirs, counted without what lies between."""

    @property
    def num_bytes(self) -> int:
        """Size on disk, for progress bars."""
        return self.stop - self.start


def plan_units(inputs: Sequence[str | Path], unit_bytes: int | None = None) -> list[Unit]:
    """Cut the input files into units of about ``unit_bytes``, in the order given."""
    if not inputs:
        raise UserError(f"no input files; give one or more of {', '.join(_SUFFIXES)}")
    states = {str(path): _checked_state(str(path)) for path in inputs}
    step = unit_bytes or max(_MIN_UNIT_BYTES, sum(size for size, _ in states.values()) // _MAX_UNITS)
    cuts = {
        path: _row_group_units(path, state, step) if path.endswith(".parquet") else _cut(path, state, step)
        for path, state in states.items()
    }
    return [unit for path in map(str, inputs) for unit in cuts[path]]


def _cut(path: str, state: tuple[int, int], step: int) -> list[Unit]:
    size = state[0]
    stride = step if path.endswith(".jsonl") else max(size, 1)
    return [Unit(path, start, min(start + stride, size), state) for start in range(0, max(size, 1), stride)]


def _row_group_units(path: str, state: tuple[int, int], step: int) -> list[Unit]:
    """Neighbouring row groups together until they reach a unit's size."""
    units, first, start, stop = [], 0, 0, 0
    sizes = row_group_bytes(path)
    for number, size in enumerate(sizes, 1):
        stop += size
        if stop - start >= step or number == len(sizes):
            units.append(Unit(path, start, stop, state, (first, number)))
            first, start = number, stop
    return units or [Unit(path, 0, 0, state, (0, 0))]


def _checked_state(path: str) -> tuple[int, int]:
    if not path.endswith(_SUFFIXES):
        raise UserError(f"{path}: cannot tell its format; input files end in {', '.join(_SUFFIXES)}")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file" if not Path(path).exists() else f"{path}: is not a file; list the files in it")
    if path.endswith(".zst"):
        require_zstandard(path)
    return state_of(path)


def state_of(path: str) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds: what tells that a file is another one now."""
    facts = Path(path).stat()
    return facts.st_size, facts.st_mtime_ns


def read_documents(unit: Unit, key: str = "text") -> Iterator[bytes]:
    """The documents of a unit as UTF-8; one without any visible character comes as ``b""`` so that the caller can count it."""
    try:
        if unit.groups is not None:
            for place, data in read_rows(unit.path, unit.groups, key):
                try:
                    data.decode()
                except UnicodeDecodeError as error:
                    raise _not_utf8(place, error) from error
                yield _visible(data)
        elif unit.path.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl"):
            for position, line in _lines(unit):
                if line.strip():
                    yield _visible(_text_of_line(unit.path, position, line, key))
        else:
            with _open(unit.path) as stream:
                data = stream.read()
            _decode(unit.path, 0, data)
            yield _visible(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{unit.path}: damaged or cut-off gzip file ({error}); fetch or compress it again") from error


def _visible(data: bytes) -> bytes:
    return data if data.strip() else b""


def _open(path: str) -> BinaryIO:
    if path.endswith(".zst"):
        return open_zst(path)
    return cast(BinaryIO, gzip.open(path, "rb")) if path.endswith(".gz") else open(path, "rb")


def _lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """(position of the first byte, line) of every line that starts inside the unit."""
    with _open(unit.path) as stream:
        position = 0
        if unit.start:
            stream.seek(unit.start - 1)  # one byte early: a line that starts exactly at ``start`` is then not skipped
            position = unit.start - 1 + len(stream.readline())
        for line in stream:
            if position >= unit.stop and unit.path.endswith(".jsonl"):
                return
            yield position, line
            position += len(line)


def _text_of_line(path: str, position: int, line: bytes, key: str) -> bytes:
    text = _decode(path, position, line).removeprefix("\ufeff")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{_place(path, position)}: not valid JSON ({error}); each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise UserError(f"{_place(path, position)}: holds a {type(record).__name__}; each line must be one JSON object")
    if key not in record:
        raise UserError(f"{_place(path, position)}: no key {key!r}, only {sorted(record)}; name the key of the text with --key")
    if not isinstance(record[key], str):
        raise UserError(
            f"{_place(path, position)}: {key!r} is a {type(record[key]).__name__}, not a string; name the key of the text with --key"
        )
    try:
        return record[key].encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{_place(path, position)}: {key!r} holds half a surrogate pair, which no UTF-8 can say; mend or drop the line"
        ) from error


def _decode(path: str, position: int, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(_place(path, position + error.start), error) from error


def _not_utf8(place: str, error: UnicodeDecodeError) -> UserError:
    fix = "convert the file, for example with: iconv -f latin1 -t utf-8"
    return UserError(f"{place}: byte 0x{error.object[error.start]:02x} is not UTF-8; {fix}")


def _place(path: str, position: int) -> str:
    """``file, line n`` of a byte; lines are counted only now that something is wrong."""
    number, left = 1, position
    with _open(path) as stream:
        while left > 0 and (chunk := stream.read(min(left, 1 << 20))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    return f"{path}, line {number}"
