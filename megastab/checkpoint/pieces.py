"""What one rank writes into a checkpoint, in coordinates of the whole matrices.

Tensor parallelism cuts matrices into whole rows and ZeRO cuts flat ranges, so that whatever a rank holds of a matrix is one range of it
flattened. OrthoAdam's rotated moments lie at the positions of their weights and are cut alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megastab.checkpoint.tensor_file import Planned
from megastab.parallel.grid import Grid
from megastab.parallel.ownership import counts_here
from megastab.parallel.param_info import Part, info_of
from megastab.wrappers.adapter import Adapter, Fragment
from megastab.wrappers.states import OptimizerState
from megastab.wrappers.zero3 import gathered

MASTER, WEIGHT = "master", "weight"
STATES, WEIGHTS = "states", "weights"  # folders of a checkpoint


class Piece(NamedTuple):
    """A range of one matrix in one file."""

    name: str
    size: int
    """Elements of the whole matrix."""
    first: int
    length: int
    kinds: list[str]
    """``master`` and the optimizer's moments by their names; ``weight`` in a file of weights."""
    scalars: dict[str, Any]
    """Of the tensor the optimizer steps (its step count)."""


def key_of(kind: str, name: str, first: int) -> str:
    """The name of a piece's tensor in its file."""
    return name if kind == WEIGHT else f"{kind}:{name}:{first}"


@dataclass
class Share:
    """One file of this rank: what will be in it, and the tensors one after another.

    The tensors are to be taken to the end on every rank, also by one that fails to write: taking them may be collective.
    """

    file: str
    """Path in the checkpoint's folder; empty where this rank has nothing to write and only takes part."""
    tensors: Iterator[Tensor]
    entries: list[Planned] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)


def first_of(fragment: Fragment) -> int:
    """First element of a fragment in its whole matrix."""
    return fragment.part.start * (fragment.info.width or 1) + fragment.start


def size_of(fragment: Fragment) -> int:
    """Elements of the whole matrix."""
    return fragment.part.global_rows * (fragment.info.width or 1)


def owned(adapter: Adapter, grid: Grid) -> Iterator[Fragment]:
    """The fragments this rank writes: over all ranks, every element of every matrix once."""
    if adapter.is_partitioned or grid.dp.rank == 0:
        for fragment in adapter.fragments():
            if counts_here(fragment.parameter, grid.tp.rank):
                yield fragment


def states_share(adapter: Adapter, grid: Grid, rank: int) -> Share:
    """Masters and moments. In fp32 the weights are the masters, and are written as weights only (ZeRO-3 would have to gather them)."""
    state, tensors, entries, pieces = OptimizerState(adapter), list[Tensor](), list[Planned](), list[Piece]()
    for fragment in owned(adapter, grid):
        held = dict(state.tensors(fragment))
        if fragment.copy.dtype != fragment.master.dtype or adapter.partitions_weights:
            held[MASTER] = fragment.master
        name, first, length = fragment.part.name, first_of(fragment), fragment.master.numel()
        pieces.append(Piece(name, size_of(fragment), first, length, sorted(held), state.scalars(fragment)))
        for kind, values in sorted(held.items()):
            entries.append(Planned(key_of(kind, name, first), values.dtype, (length,)))
            tensors.append(values)
    return Share(f"{STATES}/rank{rank:04d}.safetensors", iter(tensors), entries, pieces)


def weights_share(module: nn.Module, grid: Grid) -> Share:
    """The weights this rank counts, whole rows of each matrix, bounded in memory by a parameter.

    Collective over data-parallel ranks where parameters are partitioned (ZeRO-3); the first of them writes.
    """
    counted = [p for p in module.parameters() if grid.dp.rank == 0 and counts_here(p, grid.tp.rank)]
    share = Share("", _weights(module, {id(p) for p in counted}))
    if grid.dp.rank == 0:
        share.file = f"{WEIGHTS}/pp{grid.pp.rank:02d}-tp{grid.tp.rank:02d}.safetensors"
        starts: dict[str, int] = {}
        for parameter in counted:
            trailing = tuple(getattr(parameter, "ds_shape", parameter.shape))[1:]
            for part in _parts(parameter):
                width = prod(trailing)
                starts[part.name] = part.start
                share.entries.append(Planned(part.name, parameter.dtype, (part.rows, *trailing)))
                share.pieces.append(Piece(part.name, part.global_rows * width, part.start * width, part.rows * width, [WEIGHT], {}))
        share.metadata["starts"] = json.dumps(starts)
    return share


@torch.no_grad()
def _weights(module: nn.Module, counted: set[int]) -> Iterator[Tensor]:
    for parameter in module.parameters():
        with gathered(parameter):
            if id(parameter) in counted:
                yield from parameter.detach().split([part.rows for part in _parts(parameter)])


def _parts(parameter: nn.Parameter) -> tuple[Part, ...]:
    info = info_of(parameter)
    assert info is not None, "only described parameters have canonical names"
    return info.parts
