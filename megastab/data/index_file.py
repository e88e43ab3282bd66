"""The ``.idx`` file of Megatron's indexed dataset, written and checked without importing megatron (six seconds).

Layout, little-endian: magic (9 bytes), version 1 (u64), dtype code (u8), number of sequences n (u64), number of document marks m
(u64), then lengths i32[n], byte offsets into the ``.bin`` i64[n], document marks i64[m] (first sequence of each document, then n),
and modes i8[n] in multimodal files only. A test holds the bytes equal to those of megatron-core's ``IndexedDatasetBuilder``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megastab.config.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
_REMAKE = "copy the file again or remake it with tools/prepare_data.py"


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where ids fit, else int32: megatron-core's ``DType.optimal_dtype``, with its margin below 65536."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Index of a ``.bin`` in which every document is one sequence of ``lengths`` tokens."""
    offsets = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
    code = next(code for code, kind in _DTYPES.items() if kind == dtype)
    with open(path, "wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
        stream.write(np.asarray(lengths, "<i4").tobytes())
        stream.write((offsets * dtype.itemsize).astype("<i8").tobytes())
        stream.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


@dataclass(frozen=True)
class IndexHeader:
    """The first 34 bytes."""

    dtype: np.dtype
    num_sequences: int
    num_marks: int


def read_header(path: Path) -> IndexHeader:
    """Header of an index whose size agrees with it; UserError for anything else."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise UserError(f"{path}: {size} bytes is too short for an index, the file is cut off; {_REMAKE}")
    magic, version, code, num_sequences, num_marks = _HEADER.unpack(head)
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise UserError(f"{path}: is not a Megatron index (starts with {magic!r}, version {version}, dtype {code}); {_REMAKE}")
    if not np.issubdtype(_DTYPES[code], np.integer):
        raise UserError(f"{path}: holds {np.dtype(_DTYPES[code])} items, not token ids; {_REMAKE}")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_marks
    if size not in (expected, expected + num_sequences):
        raise UserError(f"{path}: is {size} bytes but its header announces {expected}, the file is cut off or damaged; {_REMAKE}")
    if num_sequences == 0 or num_marks < 2:
        raise UserError(f"{path}: holds no documents; {_REMAKE}")
    return IndexHeader(np.dtype(_DTYPES[code]), num_sequences, num_marks)


def check_tables(path: Path, header: IndexHeader) -> None:
    """The three tables agree with each other and with the ``.bin`` beside them; vectorised, below 100 ms per million documents."""
    lengths = np.memmap(path, "<i4", "r", _HEADER.size, (header.num_sequences,))
    offsets = np.memmap(path, "<i8", "r", _HEADER.size + lengths.nbytes, (header.num_sequences,))
    marks = np.memmap(path, "<i8", "r", _HEADER.size + lengths.nbytes + offsets.nbytes, (header.num_marks,))
    bin_path = path.with_suffix(".bin")
    needed = int(offsets[-1]) + int(lengths[-1]) * header.dtype.itemsize  # first, because it reads two numbers and not all of them
    if bin_path.stat().st_size < needed:
        raise UserError(f"{bin_path}: is {bin_path.stat().st_size} bytes but its index needs {needed}, the file is cut off; {_REMAKE}")
    if lengths.min() < 0 or marks[0] != 0 or marks[-1] != header.num_sequences or (np.diff(marks) < 0).any():
        raise UserError(f"{path}: its document table contradicts itself, the file is damaged; {_REMAKE}")
    ends = np.cumsum(lengths, dtype=np.int64) * header.dtype.itemsize
    if offsets[0] != 0 or not np.array_equal(offsets[1:], ends[:-1]):
        raise UserError(f"{path}: sequences do not lie one after the other in the .bin file; {_REMAKE}")
    if ends[-1] == 0:
        raise UserError(f"{path}: holds no tokens; {_REMAKE}")
