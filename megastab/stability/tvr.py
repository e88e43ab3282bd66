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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megastab.parallel import collectives
from megastab.parallel.collectives import Group
from megastab.parallel.param_info import ParamInfo, Part, Role
from megastab.wrappers.adapter import Fragment

RESCALED_ROLES: frozenset[Role] = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
BLOCK = 1 << 12  # fp32 sums of this many elements, added in fp64: as exact as fp64 throughout, at fp32's speed


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
    """

    target_std: float = 0.01
    ratio_threshold: float = 1.0
    interval_steps: int = 50
    depth_scaled: bool = False
    zero_bias: bool = False
    two_sided: bool = False
    targets: Mapping[str, float] = field(default_factory=dict)
    exclude: Sequence[str] = ()
    applied_steps: int = 0
    """Steps seen so far; the phase."""

    def __post_init__(self) -> None:
        for name in ("target_std", "ratio_threshold", "interval_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"TVR {name} = {getattr(self, name)} must be positive")
        if self.ratio_threshold < 1:
            raise ValueError(f"TVR ratio_threshold = {self.ratio_threshold} must be at least 1: below it every matrix fires every time")

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
        return self.applied_steps % self.interval_steps == 0

    def rescale_(self, named_matrices: Mapping[str, Tensor]) -> list[RescaleEvent]:
        """Rescale plain tensors in place, all to ``target_std`` (one process, no roles)."""
        events = []
        for name, matrix in named_matrices.items():
            flat = matrix.detach().view(-1)
            mean, std = _mean_and_std(*_sums(flat), flat.numel())
            if self.fires(std, self.target_std):
                events.append(RescaleEvent(name, std, self.target_std, mean))
                _shrink_(flat, events[-1])
        return events

    def rescale_fragments_(
        self, held: Sequence[Fragment], matrices: Sequence[tuple[ParamInfo, Part]], group: Group, counts: bool
    ) -> list[RescaleEvent]:
        """Rescale the masters this rank holds, from statistics over ``group``: one all-reduce whatever the number of matrices.

        Args:
            held: this rank's pieces; it may hold none of some matrices (ZeRO partitions).
            matrices: all matrices of the pipeline stage, in the same order on every rank (:meth:`selected`).
            group: the ranks that hold pieces of the stage (tp x dp).
            counts: False where another data-parallel rank holds the very same pieces and contributes them.
        """
        sums = torch.zeros(len(matrices), 2, dtype=torch.float64)
        place = {part.name: i for i, (_, part) in enumerate(matrices)}
        for fragment in held:
            if counts and fragment.info.is_first_copy and fragment.part.name in place:
                sums[place[fragment.part.name]] += torch.stack(_sums(fragment.master)).cpu()
        collectives.sum_doubles_(sums, group)  # over (tp x dp): each row of each matrix was added once
        events = {}
        for (info, part), (total, squares) in zip(matrices, sums.tolist(), strict=True):
            mean, std = _mean_and_std(total, squares, part.global_rows * (info.width or 1))
            target = self.target(part.role, info.layer)
            if self.fires(std, target):
                events[part.name] = RescaleEvent(part.name, std, target, mean)
        for fragment in held:
            self._edit_(fragment, events)
        return list(events.values())

    def selected(self, catalogue: Iterable[tuple[ParamInfo, Part]]) -> list[tuple[ParamInfo, Part]]:
        """The matrices TVR looks at, each once."""
        wanted = {part.name: (info, part) for info, part in catalogue if part.role in RESCALED_ROLES and part.role not in self.exclude}
        return list(wanted.values())

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


def _sums(flat: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, sum of squares) in fp64, from fp32 sums of blocks."""
    whole = flat.numel() // BLOCK * BLOCK
    blocks, tail = flat[:whole].view(-1, BLOCK), flat[whole:].double()
    total = blocks.sum(1).double().sum() + tail.sum()
    squares = torch.linalg.vector_norm(blocks, dim=1).double().square().sum() + tail.square().sum()
    return total, squares


def _mean_and_std(total: Tensor | float, squares: Tensor | float, count: int) -> tuple[float, float]:
    """Mean and unbiased standard deviation; single-pass is safe in fp64 because weights have means near 0."""
    mean = float(total) / count
    return mean, math.sqrt(max(0.0, float(squares) - count * mean * mean) / max(1, count - 1))


def _shrink_(flat: Tensor, event: RescaleEvent) -> None:
    flat.mul_(event.factor).add_(event.mean * (1 - event.factor))
