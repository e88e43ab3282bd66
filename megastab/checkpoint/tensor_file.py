"""Writing a safetensors file tensor by tensor: no more than one in memory, the checksum on the way, and OSErrors as they are.

``safetensors.torch.save_file`` wants all of them at once. The format stands in ``checkpoint.safetensors_file``.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from megastab.checkpoint.safetensors_file import NAMES

CHUNK = 1 << 23  # bytes read at a time


@dataclass(frozen=True)
class Planned:
    """One tensor of a file, before it is there."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Seal:
    """What a file was when it was written."""

    num_bytes: int
    checksum: int
    """CRC-32: finds every flipped bit and burst up to 32 bits, at memory speed. It is no protection against intent."""


def write_tensors(path: Path, entries: Sequence[Planned], tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> Seal:
    """Write ``tensors``, in the order of ``entries``, and have them on the disk on return.

    Raises:
        OSError: no space, no permission, or what else the file system has to say; what was written stays.
    """
    header = _header(entries, metadata)
    size, checksum = len(header), zlib.crc32(header)
    with open(path, "wb") as file:
        file.write(header)
        for entry, tensor in zip(entries, tensors, strict=True):
            assert tensor.dtype == entry.dtype and tensor.numel() == prod(entry.shape), entry.key
            values = tensor.detach().to("cpu").reshape(-1).view(torch.uint8).numpy()
            file.write(values.data)
            size, checksum = size + values.nbytes, zlib.crc32(values.data, checksum)
        _to_disk(file)
    return Seal(size, checksum)


def _header(entries: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for entry in entries:
        table[entry.key] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [at, at + entry.num_bytes]}
        at += entry.num_bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def write_text(path: Path, text: str) -> Seal:
    """Write a small file and have it on the disk on return; it appears whole or not at all."""
    data, aside = text.encode(), path.with_name(path.name + ".new")
    with open(aside, "wb") as file:
        file.write(data)
        _to_disk(file)
    os.replace(aside, path)
    return Seal(len(data), zlib.crc32(data))


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def settle(folder: Path) -> None:
    """Have a folder's names on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal_of(path: Path) -> Seal:
    """What a file is now."""
    size = checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return Seal(size, checksum)
