"""Which elements of a flat tensor are which rows of which matrix, and how the rows that a partition cuts are completed.

Under ZeRO the optimizer sees 1-D partitions that cut matrices anywhere. Whole rows are rotated where they lie. A row that lies on
several ranks is completed by one exchange of (gradient, both moments) of its fragments between their owners; each owner computes the
whole row and writes back its own elements only. So there is one authority per element, no state besides the moments, and nothing to
mend after a load.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megastab.optim.ortho_gather import FLOAT, CutMatrices
from megastab.optim.ortho_segment import RotationFor, Segment, right_of
from megastab.optim.rotation import Rotation
from megastab.optim.row_step import Pace, Views, step_both, step_plain, step_rows
from megastab.parallel import collectives
from megastab.parallel.collectives import Group, Work

Span = tuple[str, int, int, int]  # name, first element, one past the last, width: what other ranks need to know of rotated rows


@dataclass(frozen=True)
class CutRow:
    """One row this rank holds a part of, whole in the workspace."""

    rotation: Rotation
    row: int
    """Number in its matrix."""
    at: int
    """First element in the workspace."""
    decays: bool


@dataclass
class CutRows:
    """The cut rows of one flat tensor and their exchange."""

    group: Group
    total: int = 0
    """Cut rows on all ranks of the group."""
    rows: list[CutRow] = field(default_factory=list)
    size: int = 0
    """Elements of the workspace."""
    own_flat: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    own_here: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Where this rank's elements lie: in the flat tensor, in the workspace."""
    send: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    receive: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Elements of the flat tensor by rank they go to; elements of the workspace by rank they come from."""
    send_counts: list[int] = field(default_factory=list)
    receive_counts: list[int] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Of the tables, and of what a step holds for them."""
        tables = sum(t.numel() * t.element_size() for t in (self.own_flat, self.own_here, self.send, self.receive))
        return tables + FLOAT * (4 * self.size + 3 * (self.send.numel() + self.receive.numel()))

    def begin(self, flat: Views) -> tuple[Tensor, Work | None]:
        """Start the exchange: [n, 3] of gradient, mean, square (collective over ``group``, also for a rank that holds no cut row)."""
        # Each gathered first: stacking the flat tensors would copy them whole.
        triple = torch.stack([t[self.send] for t in (flat.gradient, flat.mean, flat.square)], dim=1)
        return collectives.exchange_rows(triple, self.send_counts, self.receive_counts, self.group)

    def finish(self, flat: Views, arrived: Tensor, work: Work | None, paces: tuple[Pace, Pace]) -> None:
        """Complete the rows, update each, and keep what is this rank's."""
        arrived = collectives.arrived_rows(arrived, work, flat.gradient.device)
        if not self.rows:
            return
        spaces = [flat.gradient.new_zeros(self.size) for _ in range(4)]
        tensors = (flat.weights, flat.gradient, flat.mean, flat.square)
        for space, tensor in zip(spaces, tensors, strict=True):
            space[self.own_here] = tensor[self.own_flat]
        for space, values in zip(spaces[1:], arrived.unbind(1), strict=True):
            space[self.receive] = values
        work_views = Views(*spaces)  # the weights are right at this rank's elements only, and only these are kept
        for cut in self.rows:
            step_rows(work_views.rows(cut.at, 1, cut.rotation.width), cut.rotation, cut.row, paces[cut.decays])
        for space, tensor in zip((spaces[0], *spaces[2:]), (tensors[0], *tensors[2:]), strict=True):
            tensor[self.own_flat] = space[self.own_here]


@dataclass
class FlatPlan:
    """How one flat tensor is updated."""

    whole: list[tuple[Segment, Rotation | None]]
    """Whole rows, and whole matrices some of whose axes are rotated."""
    plain: list[Segment]
    cuts: CutRows | None = None
    gathered: CutMatrices | None = None
    """Whole matrices that lie on several ranks."""

    @property
    def temporaries(self) -> list[tuple[int, Segment]]:
        """Bytes that whole matrices take while they are stepped, one after another."""
        alone = [(2 * FLOAT * segment.num_whole, segment) for segment, _ in self.whole if segment.left is not None]
        return alone + [(matrix.temporary_bytes, matrix.segment) for matrix in (self.gathered.mine if self.gathered else [])]

    def update(self, flat: Views, pace: Pace) -> None:
        """One step, in place. What no segment covers (padding) is not touched."""
        paces = (replace(pace, decay=0.0), pace)
        started = self.cuts.begin(flat) if self.cuts is not None else None
        for segment, rotation in self.whole:
            rows = flat.rows(segment.offset, segment.length // segment.width, segment.width)
            if segment.left is not None or rotation is None:
                step_both(rows, segment.left, rotation, paces[segment.decays])
            else:
                step_rows(rows, rotation, segment.first // segment.width, paces[segment.decays])
        if self.gathered is not None:
            self.gathered.update(flat, paces)
        for segment in self.plain:
            step_plain(flat.part(slice(segment.offset, segment.offset + segment.length)), paces[segment.decays])
        if self.cuts is not None and started is not None:
            self.cuts.finish(flat, *started, paces)


def spans(segments: Sequence[Segment]) -> list[Span]:
    """What to tell the other ranks of a group about rows."""
    return [(s.name, s.first, s.stop, s.width) for s in segments if s.width and s.left is None]


def plan_flat(
    segments: Sequence[Segment],
    rotation_for: RotationFor,
    everyone: Sequence[Sequence[Span]] = (),
    mine: int = 0,
    group: Group = None,
    device: torch.device | str = "cpu",
    gathered: CutMatrices | None = None,
) -> FlatPlan:
    """Plan one flat tensor.

    Args:
        segments: what this rank's flat tensor holds.
        rotation_for: (name, width) to its Q.
        everyone: the :func:`spans` of every rank's share of this flat tensor, by rank; empty where nothing is partitioned.
        mine: this rank's place among them.
        group: these ranks.
        device: of the flat tensor.
        gathered: the matrices of which this rank may hold a part only; without it every matrix is whole.
    """
    plan, elsewhere = FlatPlan([], [s for s in segments if not s.width], gathered=gathered), gathered.names if gathered else ()
    for segment in segments:
        if segment.left is not None:
            if segment.name not in elsewhere:
                plan.whole.append((segment, right_of(segment, rotation_for)))
        elif segment.width:
            first, stop = -(-segment.first // segment.width) * segment.width, segment.stop // segment.width * segment.width
            if first < stop:
                plan.whole.append((segment.cut(first, stop), rotation_for(segment.name, segment.width)))
    owners = cut_rows(everyone)
    if owners:  # alike on every rank: all take part in the exchange, or none
        plan.cuts = _plan_cuts(segments, rotation_for, owners, mine, len(everyone), group, device)
    return plan


Owners = dict[tuple[str, int, int], list[tuple[int, int, int]]]  # (name, row, width) -> (rank, first element in the row, one past the last)


def cut_rows(everyone: Sequence[Sequence[Span]]) -> Owners:
    """The rows that lie on several ranks, in an order all ranks agree on."""
    found: dict[tuple[str, int, int], list[tuple[int, int, int]]] = defaultdict(list)
    for rank, held in enumerate(everyone):
        for name, first, stop, width in held:
            for row in _broken(first, stop, width):
                low, high = max(first - row * width, 0), min(stop - row * width, width)
                found[name, row, width].append((rank, low, high))
    for (name, row, width), parts in found.items():
        ends = [0] + [high for _, _, high in sorted(parts, key=lambda part: part[1])]
        if sorted(low for _, low, _ in parts) != ends[:-1] or ends[-1] != width:
            raise RuntimeError(f"row {row} of {name} is not whole over the ranks of its group: {parts}")
    return {key: found[key] for key in sorted(found)}


def _broken(first: int, stop: int, width: int) -> Iterator[int]:
    """Rows of which [first, stop) holds a part but not the whole."""
    head, tail = first // width, (stop - 1) // width
    if first % width or (head == tail and stop % width):
        yield head
    if tail != head and stop % width:
        yield tail


def _plan_cuts(
    segments: Sequence[Segment],
    rotation_for: RotationFor,
    owners: Owners,
    mine: int,
    num_ranks: int,
    group: Group,
    device: torch.device | str,
) -> CutRows:
    held = {(s.name, row, s.width): s for s in segments if s.width and s.left is None for row in _broken(s.first, s.stop, s.width)}
    cuts, own_flat, own_here = CutRows(group, len(owners)), [], []
    send: list[list[Tensor]] = [[] for _ in range(num_ranks)]
    receive: list[list[Tensor]] = [[] for _ in range(num_ranks)]
    for key, parts in owners.items():
        segment = held.get(key)
        if segment is None:
            continue
        name, row, width = key
        low, high = next((low, high) for rank, low, high in parts if rank == mine)
        here = torch.arange(segment.offset + row * width + low - segment.first, segment.offset + row * width + high - segment.first)
        own_flat.append(here)
        own_here.append(cuts.size + torch.arange(low, high))
        for rank, low, high in parts:
            if rank != mine:
                send[rank].append(here)
                receive[rank].append(cuts.size + torch.arange(low, high))
        cuts.rows.append(CutRow(rotation_for(name, width), row, cuts.size, segment.decays))
        cuts.size += width
    none = torch.empty(0, dtype=torch.long)
    cuts.own_flat, cuts.own_here = (torch.cat([none, *tensors]).to(device) for tensors in (own_flat, own_here))
    cuts.send, cuts.receive = (torch.cat([none, *(t for each in by for t in each)]).to(device) for by in (send, receive))
    cuts.send_counts, cuts.receive_counts = ([sum(t.numel() for t in each) for each in by] for by in (send, receive))
    return cuts
