"""A checkpoint written again in fewer or more files, offline: to copy it, to keep it, or to read it with another tool.

A run needs none of this: it goes on from a checkpoint of any shape (``checkpoint.fragments``). Memory is bounded by one matrix.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megastab.checkpoint import verify
from megastab.checkpoint.index import Reader
from megastab.checkpoint.manifest import Manifest
from megastab.checkpoint.pieces import MASTER, STATES, WEIGHT, WEIGHTS, Piece, Share, key_of
from megastab.checkpoint.store import LATEST
from megastab.checkpoint.tensor_file import Planned, write_text
from megastab.checkpoint.weight_source import OwnWeights
from megastab.checkpoint.writing import complete, partial_of, prepare, write
from megastab.config.errors import UserError


def rewrite(checkpoint: Path, out: Path, num_files: int = 1, progress: bool = True) -> Path:
    """Write a checkpoint again, each matrix whole in one of ``num_files`` files of states and of weights; the new checkpoint's folder.

    Args:
        checkpoint: a checkpoint's folder, such as ``runs/NAME/checkpoints/step00000100``.
        out: a checkpoints folder to make, which ``run.resume`` can name; it must not exist.
        num_files: at most as many as there are matrices.
        progress: whether to draw a bar.

    Raises:
        UserError: a damaged checkpoint (its files are named), ``out`` exists, or no possible number of files.
    """
    manifest = Manifest.read(checkpoint)
    if faults := verify.damage(checkpoint, 0, 1):
        raise UserError(f"the checkpoint {checkpoint} is damaged: {'; '.join(faults[:5])}. Take an older one")
    if out.exists():
        raise UserError(f"{out} exists: give a folder to make")
    reader, weights = Reader(checkpoint), OwnWeights(checkpoint / WEIGHTS)
    names = weights.names()
    if not 1 <= num_files <= len(names):
        raise UserError(f"--files {num_files}: give 1 to {len(names)}, the number of matrices")
    bar = tqdm(total=len(names) * 2, unit="matrix", desc=checkpoint.name, disable=not progress)
    prepare(out, checkpoint.name)
    aside = partial_of(out, checkpoint.name)
    for number, held in enumerate(_dealt(names, weights, num_files)):
        write(aside, number, (_states(reader, held, number, bar), _weights(weights, held, number, bar)), checkpoint.name)
    complete(out, checkpoint.name, manifest)
    write_text(out / LATEST, checkpoint.name)
    bar.close()
    return out / checkpoint.name


def _dealt(names: Sequence[str], weights: OwnWeights, num_files: int) -> list[list[str]]:
    """Matrices over files, the largest first, each to the file with least in it."""
    held: list[list[str]] = [[] for _ in range(num_files)]
    sizes = [0] * num_files
    for name in sorted(names, key=lambda name: -math.prod(weights.shape(name))):
        least = sizes.index(min(sizes))
        held[least].append(name)
        sizes[least] += math.prod(weights.shape(name))
    return held


def _states(reader: Reader, names: Sequence[str], number: int, bar: tqdm) -> Share:
    share = Share(f"{STATES}/rank{number:04d}.safetensors", iter(()))
    wanted: list[tuple[str, str, int]] = []
    for name in names:
        size = reader.index.sizes[name]
        master = [MASTER] if reader.index.master_kind(name) == MASTER else []
        kinds = [*master, *reader.index.kinds(name)]
        share.entries += [Planned(key_of(kind, name, 0), reader.dtype(name, kind), (size,)) for kind in kinds]
        share.pieces.append(Piece(name, size, 0, size, kinds, reader.index.scalars(name)))
        wanted += [(name, kind, size) for kind in kinds]

    def tensors() -> Iterator[Tensor]:
        for (name, kind, size), planned in zip(wanted, share.entries, strict=True):
            whole = torch.empty(size, dtype=planned.dtype)
            reader.fill(whole, name, kind, 0)
            yield whole
        bar.update(len(names))

    share.tensors = tensors()
    return share


def _weights(weights: OwnWeights, names: Sequence[str], number: int, bar: tqdm) -> Share:
    entries = [Planned(name, weights.dtype(name), weights.shape(name)) for name in names]
    pieces = [Piece(name, math.prod(shape := weights.shape(name)), 0, math.prod(shape), [WEIGHT], {}) for name in names]

    def tensors() -> Iterator[Tensor]:
        for name in names:
            yield weights.rows(name, 0, weights.shape(name)[0])
            bar.update()

    starts = {"starts": json.dumps(dict.fromkeys(names, 0))}
    return Share(f"{WEIGHTS}/part{number:02d}.safetensors", tensors(), entries, pieces, starts)
