"""Target variance rescaling (arXiv 2503.17500): every N steps, a matrix whose standard deviation exceeds its target is shrunk to it.

``w <- (w - mean) * target / std + mean``: the mean is kept. Statistics are those of the logical matrix (q, k, v, gate and up apart even
when fused), over tensor-parallel shards and ZeRO partitions, from one all-reduce for all matrices; no weight is ever gathered. The
edit is made on the fp32 masters before they are published, so that every low-precision copy equals its master after the step.

Differs from the released callback: threshold 1.0 instead of 1.2 (the paper's curves plateau at the target, which 1.2 does not give);
biases are kept unless ``zero_bias``; statistics are exact at any size (the released ones count elements in fp32); the phase survives a
resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megastab.parallel import collectives
from megastab.parallel.collectives import Group
from megastab.parallel.param_info import ParamInfo, Part, Role
from megastab.wrappers.adapter import Fragment

RESCALED_ROLES: frozenset[Role] = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
BLOCK = 1 << 12  # fp32 sums of this many elements, added in fp64: as exact as fp64 throughout, at fp32's speed
FAR = 2.0  # std / target from which a first look that rescales every matrix is warned of

Matrices = Sequence[tuple[ParamInfo, Part]]


@dataclass(frozen=True)
class RescaleEvent:
    """One matrix that was shrunk."""

    name: str
    std: float
    """Before."""
    target: float
    mean: float

    @property
    def factor(self) -> float:
        """What the deviations from the mean were multiplied by."""
        return self.target / self.std


class Seen(NamedTuple):
    """One matrix as a look finds it."""

    name: str
    mean: float
    std: float
    target: float


@dataclass
class TVR:
    """When to look, and what each matrix's standard deviation may be.

    Args:
        target_std: of every matrix (paper: 0.01 with initial std 0.006).
        ratio_threshold: fire where std / target exceeds it.
        interval_steps: applied steps between looks (paper: 10 M to 1 G tokens make no difference).
        depth_scaled: target / sqrt(l) for the l-th block from 1 (hurts in the paper: HellaSwag .505 against .555).
        zero_bias: set the bias of a rescaled matrix to 0, as the released code does.
        two_sided: also inflate a matrix below target / ratio_threshold.
        targets: other targets by role.
        exclude: roles left alone, e.g. ("q", "k") beside QK-clip.
        interval_tokens: instead of ``interval_steps``, in tokens, rounded up to steps.
        tokens_per_step: of one optimizer step over all ranks; ``interval_tokens`` needs it.

    Raises:
        ValueError: a setting that makes no sense; the message names it and the way out.
    """

    target_std: float = 0.01
    ratio_threshold: float = 1.0
    interval_steps: int = 50
    depth_scaled: bool = False
    zero_bias: bool = False
    two_sided: bool = False
    targets: Mapping[str, float] = field(default_factory=dict)
    exclude: Sequence[str] = ()
    interval_tokens: int | None = None
    tokens_per_step: int | None = None
    applied_steps: int = 0
    """Steps seen so far; the phase."""
    stds: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    """Standard deviation of every matrix of this pipeline stage as the last look found it, before it rescaled any."""

    def __post_init__(self) -> None:
        for name in ("target_std", "ratio_threshold", "interval_steps", "interval_tokens", "tokens_per_step"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"TVR {name} = {value} must be positive")
        if self.ratio_threshold < 1:
            raise ValueError(f"TVR ratio_threshold = {self.ratio_threshold} must be at least 1: below it every matrix fires every time")
        if self.interval_tokens is None:
            return
        if self.interval_steps != type(self).interval_steps:
            raise ValueError(
                f"TVR interval_steps = {self.interval_steps} and interval_tokens = {self.interval_tokens} are both given: "
                f"keep one (interval_steps = {type(self).interval_steps} is its default, interval_tokens is off at None)"
            )
        if self.tokens_per_step is None:
            raise ValueError(
                f"TVR interval_tokens = {self.interval_tokens} needs tokens_per_step, which only a loop that knows its data can tell: "
                f"give interval_steps instead"
            )

    @property
    def interval(self) -> int:
        """Applied steps between looks."""
        if self.interval_tokens is None or self.tokens_per_step is None:
            return self.interval_steps
        return -(-self.interval_tokens // self.tokens_per_step)

    def target(self, role: str, layer: int | None) -> float:
        """The standard deviation a matrix may have."""
        std = self.targets.get(role, self.target_std)
        return std / math.sqrt(layer + 1) if self.depth_scaled and layer is not None else std

    def fires(self, std: float, target: float) -> bool:
        """Whether a matrix of this std is to be rescaled (NaN and 0 never are)."""
        ratio = std / target
        return ratio > self.ratio_threshold or (self.two_sided and 0 < ratio < 1 / self.ratio_threshold)

    def advance(self) -> bool:
        """Count one applied step; whether it is time to look."""
        self.applied_steps += 1
        return self.applied_steps % self.interval == 0

    def rescale_(self, named_matrices: Mapping[str, Tensor]) -> list[RescaleEvent]:
        """Rescale plain tensors in place, all to ``target_std`` (one process, no roles)."""
        events, self.stds = [], {}
        for name, matrix in named_matrices.items():
            flat = matrix.detach().view(-1)
            total, squares = sums_of_pieces([flat])[0].tolist()
            mean, std = mean_and_std(total, squares, flat.numel())
            self.stds[name] = std
            if self.fires(std, self.target_std):
                events.append(RescaleEvent(name, std, self.target_std, mean))
                _shrink_(flat, events[-1])
        return events

    @torch.no_grad()  # BF16_Optimizer's masters ask for gradients
    def rescale_fragments_(self, held: Sequence[Fragment], matrices: Matrices, group: Group, counts: bool) -> list[RescaleEvent]:
        """Rescale the masters this rank holds, from statistics over ``group``: one all-reduce whatever the number of matrices.

        Args:
            held: this rank's pieces; it may hold none of some matrices (ZeRO partitions).
            matrices: all matrices of the pipeline stage, in the same order on every rank (:meth:`selected`).
            group: the ranks that hold pieces of the stage (tp x dp).
            counts: False where another data-parallel rank holds the very same pieces and contributes them.
        """
        found = self._look(held, matrices, group, counts)
        events = {m.name: RescaleEvent(m.name, m.std, m.target, m.mean) for m in found if self.fires(m.std, m.target)}
        for fragment in held:
            self._edit_(fragment, events)
        return list(events.values())

    def start_warning(self, held: Sequence[Fragment], matrices: Matrices, group: Group, counts: bool, pp_group: Group = None) -> str | None:
        """What to say at the start of a new run where the first look would change every matrix of the model by more than ``FAR``.

        Some matrices far above the target are what LIR with a target is meant to give; all of them are a target (or an initial std)
        nobody meant. Collective over the job: one all-reduce over ``group``, and the findings of the stages over ``pp_group``.

        Args:
            held: as for :meth:`rescale_fragments_`, as the other three.
            matrices: of the stage.
            group: of the stage.
            counts: whether this rank contributes.
            pp_group: the pipeline stages of this rank's place; None where there is one.
        """
        stages = collectives.gather_objects_in(self._look(held, matrices, group, counts), pp_group)  # over pp: the model's matrices
        found = [matrix for stage in stages for matrix in stage]
        if not found or not all(self.fires(m.std, m.target) and not 1 / FAR <= m.std / m.target <= FAR for m in found):
            return None
        listed = ", ".join(f"{m.name}: {m.std:.3g} / {m.target:.3g}" for m in found)
        return (
            f"TVR's first look, after {self.interval} steps, is to change every matrix by more than {FAR:g}x, and the function of the "
            f"model with them (std / target): {listed}. Take a target_std nearer to the initial std, or draw smaller weights"
        )

    def selected(self, catalogue: Iterable[tuple[ParamInfo, Part]]) -> list[tuple[ParamInfo, Part]]:
        """The matrices TVR looks at, each once."""
        wanted = {part.name: (info, part) for info, part in catalogue if part.role in RESCALED_ROLES and part.role not in self.exclude}
        return list(wanted.values())

    @torch.no_grad()
    def _look(self, held: Sequence[Fragment], matrices: Matrices, group: Group, counts: bool) -> list[Seen]:
        """The statistics of ``matrices`` from one all-reduce; arguments as for :meth:`rescale_fragments_`."""
        sums = torch.zeros(len(matrices), 2, dtype=torch.float64)
        place = {part.name: i for i, (_, part) in enumerate(matrices)}
        mine = [f for f in held if f.info.is_first_copy and f.part.name in place] if counts else []
        sums.index_add_(0, torch.tensor([place[f.part.name] for f in mine], dtype=torch.long), sums_of_pieces([f.master for f in mine]))
        collectives.sum_doubles_(sums, group)  # over (tp x dp): each row of each matrix was added once
        found = []
        for (info, part), (total, squares) in zip(matrices, sums.tolist(), strict=True):
            mean, std = mean_and_std(total, squares, part.global_rows * (info.width or 1))
            found.append(Seen(part.name, mean, std, self.target(part.role, info.layer)))
        self.stds = {matrix.name: matrix.std for matrix in found}
        return found

    def _edit_(self, fragment: Fragment, events: Mapping[str, RescaleEvent]) -> None:
        name = fragment.part.name
        if name in events:
            _shrink_(fragment.master, events[name])
        elif self.zero_bias and fragment.part.role == "bias" and name.removesuffix(".bias") in events:
            fragment.master.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The phase."""
        return {"applied_steps": self.applied_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the same phase."""
        self.applied_steps = int(state["applied_steps"])


def sums_of_pieces(pieces: Sequence[Tensor]) -> Tensor:
    """(sum, sum of squares) of 1-D tensors: [len(pieces), 2] in fp64 on the CPU.

    Pieces lie on one device, or on two where a part of the optimizer is offloaded; each device is waited for once.
    """
    devices = {piece.device: None for piece in pieces}
    if len(devices) == 1:
        return _sums_on_device(pieces).cpu()
    out = torch.zeros(len(pieces), 2, dtype=torch.float64)
    for device in devices:
        here = [i for i, piece in enumerate(pieces) if piece.device == device]
        out[here] = _sums_on_device([pieces[i] for i in here]).cpu()
    return out


def _sums_on_device(pieces: Sequence[Tensor]) -> Tensor:
    """[len(pieces), 2], fp64: blocks in fp32, in one table for all pieces, then sums of blocks."""
    lengths = [-(-piece.numel() // BLOCK) for piece in pieces]
    table = torch.empty(sum(lengths), 2, dtype=torch.promote_types(pieces[0].dtype, torch.float32), device=pieces[0].device)
    first = 0
    for run in _runs(pieces):
        whole = run.numel() // BLOCK
        stop = first + whole
        if whole:
            _sums_of_rows(run[: whole * BLOCK].view(whole, BLOCK), table[first:stop])
        if whole * BLOCK < run.numel():
            _sums_of_rows(run[whole * BLOCK :].view(1, -1), table[stop : stop + 1])
            stop += 1
        first = stop
    doubles = table.double()
    doubles[:, 1].square_()
    return torch.segment_reduce(doubles, "sum", lengths=torch.tensor(lengths, device=table.device))


def _runs(pieces: Sequence[Tensor]) -> Iterator[Tensor]:
    """The pieces, with neighbours in memory joined where their blocks stay the same: fewer kernels, equal bits.

    Wrappers keep masters in one flat tensor, so that a stage's matrices are usually one run.
    """
    run, length, stop, end = pieces[0], 0, 0, 0
    for piece in pieces:
        address, elements = piece.data_ptr(), piece.numel()
        if address != stop or address == end or length % BLOCK:  # at the end of its storage a run must not go on into another's
            if length:
                yield run.as_strided((length,), (1,))
            storage = piece.untyped_storage()
            run, length, end = piece, 0, storage.data_ptr() + storage.nbytes()
        length, stop = length + elements, address + elements * piece.element_size()
    yield run.as_strided((length,), (1,))


def _sums_of_rows(rows: Tensor, out: Tensor) -> None:
    """The sum and the norm of each row, into ``out`` [rows, 2]."""
    torch.sum(rows, 1, dtype=out.dtype, out=out[:, 0])
    torch.linalg.vector_norm(rows, dim=1, dtype=out.dtype, out=out[:, 1])


def mean_and_std(total: float, squares: float, count: int) -> tuple[float, float]:
    """Mean and unbiased standard deviation; single-pass is safe in fp64 because weights have means near 0."""
    mean = total / count
    return mean, math.sqrt(max(squares - count * mean * mean, 0.0) / max(1, count - 1))  # NaN stays NaN in this order


def _shrink_(flat: Tensor, event: RescaleEvent) -> None:
    shift = flat.new_full((), event.mean * (1 - event.factor))
    torch.add(shift, flat, alpha=event.factor, out=flat)  # one pass, one rounding
