"""What a safetensors file says it holds, its data untouched.

The format: eight bytes with the header's length (little endian), the header (JSON: name -> dtype, shape, first and last byte of the
data behind it), then the tensors' bytes one after the other. ``checkpoint.tensor_file`` writes it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from megastab.config.errors import UserError

# Names of the format, and torch's. Weights come in the first four; the others are named to say what a file holds.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit


@dataclass(frozen=True)
class Entry:
    """One tensor of a file as its header tells it."""

    dtype: str
    """The format's name: F32, BF16, I8, ..."""
    shape: tuple[int, ...]

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
