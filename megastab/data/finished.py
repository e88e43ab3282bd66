"""Finished parts of a preparation, kept beside the output until all is there, so that a run that died goes on where it was.

A part is what one unit of input became: a file of tokens for each split, and a marker ``<name>.npz``, written last, with document
lengths, token counts, and size and checksum of the token files. Its name is a digest of all that decides its content (the file, its size
and time of change, the range, the tokenizer, the options), so that a part of other input is never taken for one of this run's.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from megastab.data.documents import Unit

_LAYOUT = 1  # of the files here; raise it when they change


@dataclass(frozen=True)
class Split:
    """One split's share of a part."""

    lengths: np.ndarray
    """Tokens of each document, int32."""
    seen: np.ndarray
    """Token ids that occur, int32."""
    counts: np.ndarray
    """How often each of them does, int64."""
    text_bytes: int
    num_bytes: int
    """Size of the token file."""
    checksum: str
    """BLAKE2b of the token file, 128 bits."""


@dataclass(frozen=True)
class Part:
    """What a marker says."""

    splits: dict[str, Split]
    num_empty: int

    def write(self, folder: Path, name: str) -> None:
        """Write the marker, whole or not at all."""
        arrays: dict[str, np.ndarray] = {}
        facts: dict[str, Any] = {"empty": self.num_empty}
        for split, share in self.splits.items():
            arrays |= {f"{split}.{what}": getattr(share, what) for what in ("lengths", "seen", "counts")}
            facts[split] = [share.text_bytes, share.num_bytes, share.checksum]
        partial = folder / f"{name}.{os.getpid()}.writing"
        with open(partial, "wb") as stream:
            np.savez(stream, facts=np.array(json.dumps(facts)), **arrays)  # type: ignore[arg-type]
        partial.replace(folder / f"{name}.npz")


def read_part(folder: Path, name: str) -> Part | None:
    """The part of that name; None where it is not finished, or its marker is damaged."""
    try:
        with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
            facts = json.loads(str(arrays["facts"]))
            empty = facts.pop("empty")
            return Part(
                {s: Split(*(arrays[f"{s}.{what}"] for what in ("lengths", "seen", "counts")), *rest) for s, rest in facts.items()}, empty
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def is_intact(folder: Path, name: str) -> bool:
    """Whether a part is finished and its token files are the bytes that were written."""
    part = read_part(folder, name)
    try:
        return part is not None and all(checksum(folder / f"{name}.{split}") == share.checksum for split, share in part.splits.items())
    except OSError:
        return False


def checksum(path: Path) -> str:
    """Of a file."""
    digest = new_digest()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def new_digest() -> blake2b:
    """128 bits of BLAKE2b."""
    return blake2b(digest_size=16)


def part_names(units: Sequence[Unit], options: Sequence[object]) -> list[str]:
    """A name for the part that each unit becomes under these options; input given twice is two parts."""
    before: Counter[Unit] = Counter()
    names = []
    for unit in units:
        facts = [_LAYOUT, os.path.abspath(unit.path), unit.start, unit.stop, unit.state, unit.groups, before[unit], *options]
        names.append(blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest())
        before[unit] += 1
    return names


def markers(folder: Path) -> set[str]:
    """Names of finished parts in the folder, whoever they belong to.

    A listing, for one rank: a look for a name that is not there yet would be remembered by a network file system for a while.
    """
    return {path.stem for path in folder.glob("*.npz")}
