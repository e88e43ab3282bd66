"""Every matrix on a sampled step: mean and std after it, how far it moved, and its share of the gradient norm, over all ranks.

How far it moved is |after - before| / |before|, decay and rescaling included, over a fixed choice of at least ``KEPT_ELEMENTS`` elements of
the matrix (all of a smaller one): every stride-th in global order, so that no layout chooses others, with a stride that shares no factor
with the width, so that no channel is left out. Only those are kept from before the step: at most 3 x ``KEPT_ELEMENTS`` fp32 numbers
(768 KiB) a matrix over all ranks together, and only while a sampled step runs. For n independent entries the estimate's relative error
is about 1 / sqrt(2 n): 0.3 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from megastab.parallel import collectives
from megastab.parallel.grid import Grid
from megastab.parallel.ownership import counts_here
from megastab.parallel.param_info import VECTOR_ROLES, Role
from megastab.stability.gradient_norms import GradientNorms
from megastab.stability.tvr import RESCALED_ROLES, TVR, mean_and_std, sums_of_pieces
from megastab.wrappers.adapter import Adapter, Fragment

KEPT_ELEMENTS = 1 << 16
_SUMS = 4  # of a matrix: entries, their squares, squares of the chosen ones' change, and of the chosen ones before


class Matrix(NamedTuple):
    """One logical matrix of the model."""

    role: Role
    layer: int | None
    elements: int
    width: int

    @property
    def stride(self) -> int:
        """Distance of the elements chosen for the update."""
        stride = max(1, self.elements // KEPT_ELEMENTS)
        while math.gcd(stride, self.width) > 1:
            stride -= 1
        return stride


class MatrixSummary(NamedTuple):
    """What is told of one matrix; NaN where there is no such number."""

    mean: float
    std: float
    std_over_target: float
    """Over what TVR lets it be; NaN where TVR does not look at it."""
    update_ratio: float
    """Change over weight in this step; 0 where the step was skipped."""
    gradient_norm: float
    """L2, before clipping."""
    gradient_share: float
    """Of the squared global norm."""


class WeightWatch:
    """The masters this rank holds (collective over the pipeline at construction).

    Args:
        adapter: of the engine; gradients are looked at where their norm is known and nothing has been scaled.
        grid: this rank's place.
        norms: the engine's.
        tvr: whose targets the stds are held against.
    """

    def __init__(self, adapter: Adapter, grid: Grid, norms: GradientNorms, tvr: TVR | None = None):
        self.adapter, self.grid, self.norms, self.tvr = adapter, grid, norms, tvr
        infos = [(info, part) for info in map(adapter.info, adapter.parameters()) for part in info.parts]
        mine = [
            (part.name, Matrix(part.role, info.layer, part.global_rows * info.width, info.width))
            for info, part in infos
            if info.width is not None and part.role not in VECTOR_ROLES
        ]
        stages = collectives.gather_objects_in(mine, grid.pp.group)  # over pp: a stage knows its own matrices
        self.matrices: dict[str, Matrix] = dict(named for stage in stages for named in stage)
        self._index = {name: i for i, name in enumerate(self.matrices)}
        self._before: list[Tensor] = []
        self._gradients: Tensor | None = None
        self._is_watching = False
        adapter.on_norm(self._norm_known, first=True)  # before a rule scales any

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the step inside."""
        self._before = [self._chosen(fragment).clone() for fragment in self._held()]
        self._is_watching, self._gradients = True, None
        try:
            yield
        finally:
            self._is_watching = False

    def _norm_known(self, norm: float) -> None:
        if self._is_watching:
            self._gradients = self.norms.squares_here()

    def _held(self) -> list[Fragment]:
        """The fragments this rank contributes; without partitions the first data-parallel rank does it for all."""
        if not self.adapter.is_partitioned and self.grid.dp.rank != 0:
            return []
        held = self.adapter.fragments()
        return [f for f in held if f.part.name in self._index and counts_here(f.parameter, self.grid.tp.rank)]

    def _chosen(self, fragment: Fragment) -> Tensor:
        matrix = self.matrices[fragment.part.name]
        first = fragment.part.start * matrix.width + fragment.start  # in the global matrix
        return fragment.master.detach()[-first % matrix.stride :: matrix.stride]

    # -- over ranks ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def table(self) -> Tensor:
        """1-D fp64 on the CPU; the sum of all ranks' tables is for :meth:`read`."""
        sums = torch.zeros(len(self.matrices), _SUMS, dtype=torch.float64)
        held = self._held()
        if held:
            changes = [_squares(self._chosen(f).float() - before.float(), before) for f, before in zip(held, self._before, strict=True)]
            rows = torch.cat([sums_of_pieces([f.master.detach() for f in held]), torch.stack(changes).cpu()], dim=1)
            sums.index_add_(0, torch.tensor([self._index[f.part.name] for f in held]), rows)
        self._before = []
        gradients = torch.zeros(len(self.norms.layers), dtype=torch.float64) if self._gradients is None else self._gradients
        return torch.cat([sums.flatten(), gradients])

    def read(self, table: Tensor, norm: float) -> dict[str, MatrixSummary]:
        """What the sum of all ranks' tables says, given the global gradient norm."""
        split = len(self.matrices) * _SUMS
        squares = dict(zip(self.norms.layers, table[split:].tolist(), strict=True))
        total = sum(squares.values())
        found = {}
        for (name, matrix), (entries, of_entries, change, before) in zip(
            self.matrices.items(), table[:split].view(-1, _SUMS).tolist(), strict=True
        ):
            mean, std = mean_and_std(entries, of_entries, matrix.elements)
            share = squares[name] / total if math.isfinite(total) and total > 0 else math.nan
            moved = math.sqrt(change / before) if before > 0 else math.nan
            found[name] = MatrixSummary(mean, std, std / self._target(matrix), moved, norm * math.sqrt(share), share)
        return found

    def _target(self, matrix: Matrix) -> float:
        is_looked_at = self.tvr is not None and matrix.role in RESCALED_ROLES and matrix.role not in self.tvr.exclude
        return self.tvr.target(matrix.role, matrix.layer) if self.tvr is not None and is_looked_at else math.nan


def _squares(*tensors: Tensor) -> Tensor:
    """Their sums of squares, fp64."""
    return torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64).square() for t in tensors])
