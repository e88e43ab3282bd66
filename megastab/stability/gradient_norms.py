"""The norm of each logical matrix's gradient, over all ranks, from one all-reduce; asked for only when something wants to know.

Inside the norm seam the gradients are reduced and not yet clipped: the last point where they exist whole. ``ownership`` says who
contributes what, so the squares add up to the square of the global norm at every layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megastab.parallel import collectives
from megastab.parallel.grid import Grid
from megastab.parallel.ownership import counts_here
from megastab.wrappers.adapter import Adapter, GradientPiece, block_norms


@dataclass(frozen=True)
class Share:
    """One matrix's share of the squared gradient norm."""

    name: str
    share: float | None
    """In [0, 1]; None where the gradient is not finite."""


class GradientNorms:
    """Norms by canonical name, the same on every rank (collective over the job at construction and at each call)."""

    def __init__(self, adapter: Adapter, grid: Grid):
        self.adapter, self.grid = adapter, grid
        infos = map(adapter.info, adapter.parameters())
        mine = [(part.name, info.layer) for info in infos for part in info.parts]
        stages = collectives.gather_objects_in(mine, grid.pp.group)  # over pp: a stage knows its own matrices
        self.layers: dict[str, int | None] = dict(named for stage in stages for named in stage)
        """Block of every matrix of the model, None outside the blocks; tied copies have one name."""
        self._place = {name: i for i, name in enumerate(self.layers)}

    def squares(self) -> dict[str, float]:
        """Squared norm of every matrix's gradient, in units of the fp16 loss scale; inside an ``on_norm`` listener."""
        table = self.squares_here()
        collectives.sum_doubles_(table, collectives.job_group())  # over (tp x dp x pp): each row of each matrix was added once
        return dict(zip(self._place, table.tolist(), strict=True))

    def squares_here(self) -> Tensor:
        """This rank's terms of them: fp64 on the CPU, in the order of ``layers``; no communication."""
        pieces = [piece for piece in self.adapter.reduced_gradients() if self._counts(piece)]
        table = torch.zeros(len(self._place), dtype=torch.float64)
        if pieces:
            norms = torch._foreach_norm(block_norms([piece.values for piece in pieces]), 2, torch.float32)
            places = torch.tensor([self._place[piece.part.name] for piece in pieces])
            table.index_add_(0, places, torch.stack(norms).cpu().double().square())
        return table

    def by_name(self, norm: float) -> dict[str, float]:
        """Norm of every matrix's gradient, given the global one, which says what a unit is."""
        squares = self.squares()
        total = sum(squares.values())
        return {name: norm * math.sqrt(square / total) if total else 0.0 for name, square in squares.items()}

    def by_layer(self, norm: float) -> dict[str, float]:
        """The same by block (``layers.0``, ...); what lies outside the blocks keeps its name."""
        squares = dict[str, float]()
        for name, of_matrix in self.by_name(norm).items():
            key = block_of(name, self.layers[name])
            squares[key] = squares.get(key, 0.0) + of_matrix * of_matrix
        return {key: math.sqrt(square) for key, square in squares.items()}

    def scale_(self, factors: Mapping[str, float]) -> None:
        """Multiply some matrices' gradients, on every rank that updates with them."""
        pieces = [piece for piece in self.adapter.reduced_gradients() if factors.get(piece.part.name, 1.0) != 1.0]
        if pieces:
            torch._foreach_mul_([piece.values for piece in pieces], [factors[piece.part.name] for piece in pieces])

    def _counts(self, piece: GradientPiece) -> bool:
        # Without partitions every data-parallel rank holds the same gradients: the first one contributes them.
        return (self.adapter.is_partitioned or self.grid.dp.rank == 0) and counts_here(piece.parameter, self.grid.tp.rank)


def block_of(name: str, layer: int | None) -> str:
    """The block a matrix belongs to, or its own name outside the blocks."""
    return name if layer is None else f"layers.{layer}"


def top_shares(squares: Mapping[str, float], count: int = 5) -> list[Share]:
    """The matrices that carry the norm, largest first; those that are not finite before all others."""
    bad = [Share(name, None) for name, square in squares.items() if not math.isfinite(square)]
    total = sum(square for square in squares.values() if math.isfinite(square))
    largest: Sequence[tuple[str, float]] = sorted(((n, s) for n, s in squares.items() if math.isfinite(s)), key=lambda item: -item[1])
    return (bad + [Share(name, square / total) for name, square in largest if square > 0])[:count]
