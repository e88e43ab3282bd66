"""Whether a checkpoint's files are the ones that were written."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from megastab.checkpoint import manifest
from megastab.checkpoint.manifest import Manifest
from megastab.checkpoint.pieces import STATES, WEIGHTS
from megastab.checkpoint.tensor_file import Seal, seal_of
from megastab.config.errors import UserError


def damage(where: Path, rank: int = 0, world: int = 1) -> list[str]:
    """What is wrong with one rank's share of a checkpoint's files, each named with the reason; empty where nothing is."""
    try:
        read = Manifest.read(where)
    except UserError:
        path = where / manifest.FILE
        return _if_first(rank, [f"{path} is {'damaged' if path.exists() else 'missing'}"])
    if read.format != manifest.FORMAT:
        return []  # nothing to compare with; the manifest's own check refuses it by name
    found = _if_first(rank, _foreign(where, read))
    for place, (name, values) in enumerate(sorted(read.files.items())):
        if place % world == rank and (said := _fault(where / name, Seal(*values), where.name)):
            found.append(said)
    return found


def _if_first(rank: int, found: list[str]) -> list[str]:
    return found if rank == 0 else []


def _fault(path: Path, wanted: Seal, tag: str) -> str:
    try:
        size = path.stat().st_size
        if size < wanted.num_bytes:
            return f"{path} is truncated: {size} of {wanted.num_bytes} bytes"
        if seal_of(path) == wanted:
            return ""
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    origin = _origin(path)
    if origin not in ("", tag):
        return f"{path} is a file of another checkpoint ({origin})"
    return f"{path} is not what was written ({size} bytes of {wanted.num_bytes}, another checksum)"


def _origin(path: Path) -> str:
    """The checkpoint a file of tensors says it was written for."""
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("checkpoint", ""))
    except (SafetensorError, OSError, ValueError):
        return ""


def _foreign(where: Path, read: Manifest) -> list[str]:
    there = [path for folder in (STATES, WEIGHTS) for path in sorted((where / folder).glob("*"))]
    return [f"{path} does not belong to this checkpoint" for path in there if path.relative_to(where).as_posix() not in read.files]
