"""The weights of a checkpoint by canonical name, readable at any layout and without executing anything (safetensors).

Each (stage, tp rank) writes the rows it counts; because a rank always holds whole rows, merging is a concatenation along dim 0 in
the order of each piece's first row, which is stored beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from megastab.checkpoint.pieces import WEIGHTS
from megastab.config.errors import UserError
from megastab.parallel.param_info import info_of

FOLDER = WEIGHTS


def _pieces(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    """Every matrix's pieces: (first row, file)."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name, start in json.loads(file.metadata()["starts"]).items():
                found.setdefault(name, []).append((start, path))
    return found


def merged_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, whole matrix) one at a time."""
    pieces = _pieces(folder)
    if not pieces:
        raise UserError(f"no weights in {folder}: give the folder of one checkpoint, such as runs/NAME/checkpoints/step00000100")
    for name, parts in pieces.items():
        yield name, torch.cat([_read(path, name) for _, path in sorted(parts)])


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


@torch.no_grad()
def load_weights(module: nn.Module, folder: Path) -> list[str]:
    """Fill a described module, cut however it is, from merged weights; every parameter must be found.

    Returns the names of what the folder holds and the module does not: nothing where the module is the whole of the same model.
    """
    homes: dict[str, list[tuple[nn.Parameter, Any, int]]] = {}
    for parameter in module.parameters():
        info, offset = info_of(parameter), 0
        assert info is not None
        for part in info.parts:
            homes.setdefault(part.name, []).append((parameter, part, offset))
            offset += part.rows
    unused = []
    for name, matrix in merged_weights(folder):
        if name not in homes:
            unused.append(name)
        for parameter, part, offset in homes.pop(name, []):
            if matrix.shape[0] != part.global_rows:
                raise UserError(
                    f"{folder}: {name} has {matrix.shape[0]} rows, the model wants {part.global_rows}: another model's checkpoint"
                )
            parameter.data[offset : offset + part.rows].copy_(matrix[part.start : part.start + part.rows])
    if homes:
        raise UserError(f"{folder} lacks {', '.join(sorted(homes)[:5])}: another model's checkpoint, or an incomplete one")
    return unused
