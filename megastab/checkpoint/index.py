"""Where every element of every matrix of a checkpoint is: made from all ranks' pieces, asked for ranges by a rank of any layout."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from megastab.checkpoint.pieces import MASTER, WEIGHT, Piece, Share, key_of
from megastab.checkpoint.safetensors_file import DTYPES
from megastab.config.errors import UserError

FILE = "index.json"


class Place(NamedTuple):
    """A range of one kind of one matrix, and the file that holds it."""

    first: int
    length: int
    file: str


class Index:
    """The pieces of a checkpoint by matrix and kind."""

    def __init__(self, pieces: Mapping[str, Iterable[Piece]]):
        self.sizes: dict[str, int] = {}
        self._places: dict[tuple[str, str], list[Place]] = {}
        self._moments: dict[str, list[str]] = {}
        self._scalars: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for file, held in pieces.items():
            for piece in held:
                self._add(file, piece)
        for places in self._places.values():
            places.sort()

    def _add(self, file: str, piece: Piece) -> None:
        if self.sizes.setdefault(piece.name, piece.size) != piece.size:
            raise ValueError(f"{piece.name} has {self.sizes[piece.name]} elements, but {piece.size} in {file}")
        for kind in piece.kinds:
            if kind not in (MASTER, WEIGHT) and kind not in self._moments.setdefault(piece.name, []):
                self._moments[piece.name].append(kind)
            self._places.setdefault((piece.name, kind), []).append(Place(piece.first, piece.length, file))
        if piece.scalars:
            self._scalars.setdefault(piece.name, []).append((piece.first, piece.scalars))

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Of a checkpoint's folder."""
        table = json.loads((folder / FILE).read_text())
        return cls({file: [Piece(*values) for values in held] for file, held in table.items()})

    def faults(self) -> list[str]:
        """Why this is not each element of each matrix exactly once; empty where it is."""
        found = []
        for (name, kind), places in self._places.items():
            at = 0
            for place in places:
                if place.first != at:
                    said = "is missing" if place.first > at else "is there twice"
                    found.append(f"{kind} of {name}: element {min(at, place.first)} {said} ({place.file})")
                at = place.first + place.length
            if at != self.sizes[name]:
                found.append(f"{kind} of {name} ends at element {at} of {self.sizes[name]}")
        kinds = {kind for _, kind in self._places} & {MASTER, WEIGHT}  # of any matrix: then of all
        return found + [f"{name} has no {kind}" for name in self.sizes for kind in sorted(kinds) if (name, kind) not in self._places]

    def kinds(self, name: str) -> list[str]:
        """What there is of a matrix beside its master: the optimizer's moments."""
        return self._moments.get(name, [])

    def master_kind(self, name: str) -> str:
        """``master``, or ``weight`` where the weights are fp32 and so the masters."""
        return MASTER if (name, MASTER) in self._places else WEIGHT

    def scalars(self, name: str) -> dict[str, Any]:
        """The numbers of the optimizer's tensor that held the matrix's first element."""
        return min(self._scalars.get(name, [(0, {})]), key=lambda each: each[0])[1]

    def places(self, name: str, kind: str, first: int, length: int) -> Iterator[Place]:
        """The places that hold elements [first, first + length), in order."""
        held = self._places.get((name, kind), [])
        for place in held[max(0, bisect_right(held, first, key=lambda place: place.first) - 1) :]:
            if place.first >= first + length:
                break
            if place.first + place.length > first:
                yield place


def text_of(pieces: Mapping[str, Iterable[Piece]]) -> str:
    """What :meth:`Index.read` reads."""
    return json.dumps({file: list(held) for file, held in sorted(pieces.items())}, separators=(",", ":"))


class Reader:
    """Ranges of a checkpoint's matrices, read from its files piece by piece."""

    def __init__(self, folder: Path, index: Index | None = None):
        self.folder, self.index = folder, index or Index.read(folder)
        self._files: dict[str, Any] = {}

    def fill(self, target: Tensor, name: str, kind: str, first: int) -> None:
        """Copy elements [first, first + numel) of a matrix into a 1-D ``target``, whatever its device."""
        done = 0
        for place in self.index.places(name, kind, first, target.numel()):
            low = max(first, place.first)
            length = min(first + target.numel(), place.first + place.length) - low
            target.narrow(0, low - first, length).copy_(self._values(place, name, kind, low - place.first, length))
            done += length
        if done != target.numel():
            raise UserError(f"{self.folder} holds {done} of elements {first} to {first + target.numel()} of {name} ({kind}): it is damaged")

    def dtype(self, name: str, kind: str) -> torch.dtype:
        """As stored."""
        place = next(self.index.places(name, kind, 0, 1))
        return DTYPES[self._held(place, name, kind).get_dtype()]

    def rounded(self, share: Share) -> Iterator[Tensor]:
        """The tensors of a share of weights, made from the masters: bit for bit what the ranks train with."""
        for entry, piece in zip(share.entries, share.pieces, strict=True):
            values = torch.empty(piece.length)
            self.fill(values, piece.name, MASTER, piece.first)
            yield values.to(entry.dtype)

    def _values(self, place: Place, name: str, kind: str, first: int, length: int) -> Tensor:
        held = self._held(place, name, kind)
        width = prod(held.get_shape()[1:])
        row, rest = divmod(first, width)
        values: Tensor = held[row : -(-(first + length) // width)]
        return values.reshape(-1).narrow(0, rest, length)

    def _held(self, place: Place, name: str, kind: str) -> Any:
        if place.file not in self._files:
            self._files[place.file] = safe_open(self.folder / place.file, framework="pt")  # mapped, not read
        return self._files[place.file].get_slice(key_of(kind, name, place.first))
