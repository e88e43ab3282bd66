"""Safetensors files written and read a tensor at a time, so that memory is bounded by one of them.

The format: eight bytes with the header's length (little endian), the header (JSON: name -> dtype, shape, first and last byte of the
data behind it), then the tensors' bytes one after the other. ``safetensors.torch.save_file`` wants all of them in memory at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megastab.config.errors import UserError

# Names of the format, and torch's. Weights come in the first four; the others are named to say what a file holds.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit


@dataclass(frozen=True)
class Entry:
    """One tensor of a file as its header tells it."""

    dtype: str
    """The format's name: F32, BF16, I8, ..."""
    shape: tuple[int, ...]

    @classmethod
    def of(cls, dtype: torch.dtype, shape: tuple[int, ...]) -> Entry:
        """The entry of a tensor to be written."""
        return cls(_NAMES[dtype], shape)

    @property
    def num_bytes(self) -> int:
        """Length of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_header(path: Path) -> dict[str, Entry]:
    """What a file holds, its data untouched.

    Raises:
        UserError: the file is cut short, or no safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, path.stat().st_size - 8):
                raise ValueError(f"its header claims {length} bytes of {path.stat().st_size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        last = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + last != path.stat().st_size:
            raise ValueError(f"its header tells of {8 + length + last} bytes, the file has {path.stat().st_size}")
        return {name: Entry(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}): copy or download it again") from error


def write_file(path: Path, entries: Mapping[str, Entry], tensor_of: Callable[[str], Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``entries`` in their order; ``tensor_of`` makes each when its turn comes, and it is dropped before the next."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, entry in entries.items():
        stop = offset + entry.num_bytes
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            _write_tensor(file, name, entry, tensor_of(name))


def _write_tensor(file: BinaryIO, name: str, entry: Entry, tensor: Tensor) -> None:
    tensor = tensor.detach().cpu().contiguous()
    if Entry.of(tensor.dtype, tuple(tensor.shape)) != entry:
        raise ValueError(f"{name}: announced as {entry}, made as {tensor.dtype} {tuple(tensor.shape)}")
    tensor.view(-1).view(torch.uint8).numpy().tofile(file)
