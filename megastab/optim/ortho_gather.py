"""Matrices whose columns are rotated too (axes "both") and of which several ranks hold parts.

Each owner of a part gathers gradient and moments of the other parts, computes the whole matrix and keeps its own elements: as with cut
rows there is one authority per element and no state besides the moments. A rank holds one gathered matrix at a time, so that memory is
bounded by the largest; matrices without a common owner are gathered by the same exchange.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megastab.optim.ortho_segment import RotationFor, Segment, right_of
from megastab.optim.rotation import Rotation
from megastab.optim.row_step import Pace, Views, apply, turned_update
from megastab.parallel import collectives
from megastab.parallel.collectives import Group

Holding = tuple[str, int, int, int]  # name, first element, one past the last, elements of the whole matrix
Share = tuple[int, int, int]  # rank in the group, first element, one past the last
FLOAT = 4  # bytes


@dataclass(frozen=True)
class CutMatrix:
    """This rank's part of one matrix, and what it gives and takes to make it whole."""

    segment: Segment
    right: Rotation | None
    send: list[slice]
    """Of the flat tensor, by the rank they go to."""
    receive: list[slice]
    """Of the whole matrix, by the rank they come from."""
    send_counts: list[int]
    receive_counts: list[int]

    @property
    def sent_bytes(self) -> int:
        """Sent a step."""
        return 3 * FLOAT * sum(self.send_counts)

    @property
    def temporary_bytes(self) -> int:
        """The most that gathering and stepping hold at a time, small blocks aside."""
        sent, received, whole = sum(self.send_counts), sum(self.receive_counts), self.segment.num_whole
        return FLOAT * max(3 * (sent + received), 3 * (received + whole), 5 * whole)

    def packed(self, flat: Views) -> Tensor:
        """[n, 3] of gradient, mean, square: what the other owners need."""
        out, at = flat.gradient.new_empty(sum(self.send_counts), 3), 0
        for here in self.send:
            length = here.stop - here.start
            for column, tensor in enumerate((flat.gradient, flat.mean, flat.square)):
                out[at : at + length, column] = tensor[here]
            at += length
        return out

    def whole(self, flat: Views, arrived: Tensor) -> list[Tensor]:
        """Gradient, mean and square [rows, D], from this rank's part and the others'."""
        segment, out = self.segment, []
        for column, tensor in enumerate((flat.gradient, flat.mean, flat.square)):
            space, at = tensor.new_empty(segment.num_whole), 0
            for here in self.receive:
                space[here] = arrived[at : at + here.stop - here.start, column]
                at += here.stop - here.start
            space[segment.first : segment.stop] = tensor[segment.offset : segment.offset + segment.length]
            out.append(space.view(-1, segment.width))
        return out

    def step(self, flat: Views, gathered: list[Tensor], pace: Pace) -> None:
        """Update this rank's elements."""
        segment, (gradient, mean, square) = self.segment, gathered
        mine, own = slice(segment.offset, segment.offset + segment.length), slice(segment.first, segment.stop)
        update = turned_update(gradient, mean, square, segment.left, self.right, pace)
        apply(flat.weights[mine], update.view(-1)[own], pace)
        flat.mean[mine], flat.square[mine] = mean.view(-1)[own], square.view(-1)[own]


@dataclass(frozen=True)
class CutMatrices:
    """The cut matrices of one flat tensor."""

    group: Group
    num_ranks: int
    names: frozenset[str]
    """On all ranks of the group."""
    rounds: list[CutMatrix | None]
    """One exchange each; None where this rank holds nothing of what is gathered."""

    @property
    def mine(self) -> list[CutMatrix]:
        """Those this rank holds parts of."""
        return [matrix for matrix in self.rounds if matrix is not None]

    def update(self, flat: Views, paces: tuple[Pace, Pace]) -> None:
        """One step (collective over ``group``, also for a rank that holds nothing)."""
        for matrix in self.rounds:
            gathered = self._gather(flat, matrix)
            if matrix is not None:
                matrix.step(flat, gathered, paces[matrix.segment.decays])

    def _gather(self, flat: Views, matrix: CutMatrix | None) -> list[Tensor]:
        none = [0] * self.num_ranks
        packed = flat.gradient.new_empty(0, 3) if matrix is None else matrix.packed(flat)
        send, receive = (none, none) if matrix is None else (matrix.send_counts, matrix.receive_counts)
        arrived, work = collectives.exchange_rows(packed, send, receive, self.group)
        arrived = collectives.arrived_rows(arrived, work, flat.gradient.device)
        del packed, work  # before the whole matrix is made
        return [] if matrix is None else matrix.whole(flat, arrived)


def holdings(segments: Sequence[Segment]) -> list[Holding]:
    """What to tell the other ranks about matrices."""
    return [(s.name, s.first, s.stop, s.num_whole) for s in segments if s.left is not None]


def plan_matrices(
    segments: Sequence[Segment], rotation_for: RotationFor, everyone: Sequence[Sequence[Holding]], mine: int, group: Group
) -> CutMatrices | None:
    """Plan one flat tensor; None, alike on every rank, where each owner has its matrices whole.

    Args:
        segments: what this rank's flat tensor holds.
        rotation_for: (name, width) to its Q.
        everyone: the :func:`holdings` of every rank, by rank.
        mine: this rank's place among them.
        group: these ranks.
    """
    shares: dict[tuple[str, int], list[Share]] = defaultdict(list)
    for rank, held in enumerate(everyone):
        for name, first, stop, whole in held:
            shares[name, whole].append((rank, first, stop))
    covers = {key: _cover(*key, shares[key]) for key in sorted(shares)}
    split = [key for key, cover in covers.items() if any(_wanted(share, cover) for share in shares[key])]
    if not split:
        return None
    here = {segment.name: segment for segment in segments if segment.left is not None}
    rounds: list[CutMatrix | None] = []
    for owned in _rounds({key: {rank for rank, _, _ in shares[key]} for key in split}):
        key = owned.get(mine)
        if key is None:
            rounds.append(None)
        else:
            segment = here[key[0]]
            rounds.append(_cut_matrix(segment, right_of(segment, rotation_for), shares[key], covers[key], mine, len(everyone)))
    return CutMatrices(group, len(everyone), frozenset(name for name, _ in split), rounds)


def _cover(name: str, whole: int, shares: Sequence[Share]) -> list[Share]:
    """Who sends which elements: tensor-parallel ranks may hold copies of the same rows."""
    found, at = [], 0
    for rank, first, stop in sorted(shares, key=lambda share: (share[1], share[0])):
        if first <= at < stop:
            found.append((rank, at, stop))
            at = stop
    if at != whole or len({rank for rank, _, _ in shares}) < len(shares):
        raise RuntimeError(f"{name} of {whole} elements is not whole over the ranks of its group: {shares}")
    return found


def _wanted(share: Share, cover: Sequence[Share]) -> list[Share]:
    """What a rank has to be sent."""
    mine, first, stop = share
    return [(rank, low, high) for rank, low, high in cover if rank != mine and not (first <= low and high <= stop)]


def _rounds(owners: dict[tuple[str, int], set[int]]) -> list[dict[int, tuple[str, int]]]:
    """Matrices by exchange, as rank -> matrix: no rank has two in one."""
    rounds: list[dict[int, tuple[str, int]]] = []
    for key, ranks in owners.items():
        free = next((owned for owned in rounds if not ranks & owned.keys()), None)
        if free is None:
            rounds.append(free := {})
        free.update(dict.fromkeys(ranks, key))
    return rounds


def _cut_matrix(
    segment: Segment, right: Rotation | None, shares: Sequence[Share], cover: Sequence[Share], mine: int, num_ranks: int
) -> CutMatrix:
    send: list[list[slice]] = [[] for _ in range(num_ranks)]
    receive: list[list[slice]] = [[] for _ in range(num_ranks)]
    move = segment.offset - segment.first
    for share in shares:
        for rank, low, high in _wanted(share, cover):
            if share[0] == mine:
                receive[rank].append(slice(low, high))
            elif rank == mine:
                send[share[0]].append(slice(low + move, high + move))
    counts = [[sum(here.stop - here.start for here in each) for each in by] for by in (send, receive)]
    return CutMatrix(segment, right, [h for each in send for h in each], [h for each in receive for h in each], *counts)
