"""What a rank does in a test job: build an engine from a config, train on the synthetic samples, report what it holds.

Masters, weights and gradients are reported as pieces of logical matrices and merged by the caller, so that a comparison never knows
the layout.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from tests.layouts import SyntheticSource

Piece = tuple[str, int, int, np.ndarray]  # logical name, elements of the whole, first element, values


@dataclass
class Job:
    """One engine on one rank, with its data."""

    config: Any
    grid: Any
    built: Any
    stepper: Any
    batches: Any

    def step(self) -> float:
        return self.stepper.train(self.batches.next_step())

    @property
    def norm(self) -> float:
        return self.built.controller.norm

    @property
    def decision(self) -> Any:
        return self.built.controller.decision


@functools.cache
def grid_of(*cut: Any) -> Any:
    """A job's runs share their groups: gloo's threads of each wake a hundred times a second as long as the process lives."""
    from megastab.parallel.grid import Grid

    return Grid.create(*cut)


def start(config: dict[str, Any]) -> Job:
    """Build everything on this rank (collective)."""
    from megastab.config.load import load_config
    from megastab.data.batches import Batches
    from megastab.engine.build import build
    from megastab.engine.train_step import Stepper

    loaded = load_config(config)
    parallel, model = loaded.megastab.parallel, loaded.megastab.model
    grid = grid_of(parallel.tensor, parallel.pipeline, parallel.sequence, model.num_kv_heads, parallel.context)
    built = build(loaded, grid)
    batches = Batches(
        SyntheticSource(),
        micro_batch=loaded.micro_batch,
        accumulation=loaded.accumulation,
        dp_rank=grid.samples.rank,
        dp_size=grid.samples.size,
        cp_rank=grid.cp.rank,
        cp_size=grid.cp.size,
        document_mask=loaded.megastab.data.document_mask,
    )
    stepper = Stepper(built.engine, loaded, grid)
    built.controller.read_loss = stepper.loss_at_norm
    return Job(loaded, grid, built, stepper, batches)


def piece(fragment: Any, values: Tensor) -> Piece:
    """``values`` of one fragment, placed in its logical matrix."""
    part, width = fragment.part, fragment.info.width or 1
    flat = values.detach().float().reshape(-1).cpu().numpy().copy()
    return part.name, part.global_rows * width, part.start * width + fragment.start, flat


def masters(job: Job) -> list[Piece]:
    """The fp32 masters this rank owns."""
    return [piece(fragment, fragment.master) for fragment in job.built.adapter.fragments()]


class GradientTap:
    """Notes, at each update, the gradient the client optimizer is handed: reduced over every rank, unscaled, clipped."""

    def __init__(self, job: Job):
        self.job = job
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        wrapper = job.built.engine.optimizer
        self.client = getattr(wrapper, "optimizer", wrapper)
        update = self.client.step

        def step(*args: Any, **kwargs: Any) -> Any:
            for group in self.client.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None and parameter.numel():
                        self.seen[parameter.data_ptr()] = (parameter.data, parameter.grad.detach().clone())
            return update(*args, **kwargs)

        self.client.step = step

    def pieces(self) -> list[Piece]:
        """The last update's gradients by logical matrix."""
        out = []
        for fragment in self.job.built.adapter.fragments():
            for data, gradient in self.seen.values():
                first = (fragment.master.data_ptr() - data.data_ptr()) // 4
                if data.data_ptr() <= fragment.master.data_ptr() and first < data.numel():
                    out.append(piece(fragment, gradient.reshape(-1)[first : first + fragment.master.numel()]))
        return out


@dataclass
class Report:
    """What one rank saw."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    rescaled: list[int] = field(default_factory=list)
    qk_clipped: list[list[tuple[int, int]]] = field(default_factory=list)  # (layer, head) of each step
    """Matrices TVR shrank after each step."""
    initial: list[Piece] = field(default_factory=list)
    gradients: list[Piece] = field(default_factory=list)
    """Of the first update."""
    final: list[Piece] = field(default_factory=list)
    wrapper: str = ""
    moved_bytes: int = 0
    """Activations that left for their store."""


def train(config: dict[str, Any], steps: int) -> Report:
    """Train ``steps`` on this rank."""
    job, report = start(config), Report()
    report.wrapper = type(job.built.engine.optimizer).__name__
    report.initial = masters(job)
    tap = GradientTap(job)
    for step in range(steps):
        report.losses.append(job.step())
        report.norms.append(job.norm)
        report.scales.append(job.decision.scale)
        job.built.controller.step_done()
        report.rescaled.append(len(job.built.controller.rescaled))
        if (qk_clip := job.built.controller.qk_clip) is not None:
            report.qk_clipped.append([(head.layer, head.head) for head in qk_clip.clipped])
        if step == 0:
            report.gradients = tap.pieces()
    report.final = masters(job)
    if (offload := job.built.offload) is not None:
        report.moved_bytes = offload.counts.written + offload.counts.forwarded
    job.built.engine.destroy()
    return report


def merge(per_rank: Iterable[list[Piece]]) -> tuple[dict[str, np.ndarray], float]:
    """Whole matrices by name, and the largest difference between two ranks' copies of one element; every element must be there."""
    whole: dict[str, np.ndarray] = {}
    drift = 0.0
    for pieces in per_rank:
        for name, size, first, values in pieces:
            target = whole.setdefault(name, np.full(size, np.nan, np.float32))
            here = target[first : first + len(values)]
            both = ~np.isnan(here)
            if both.any():
                drift = max(drift, float(np.abs(here[both] - values[both]).max()))
            here[:] = values
    missing = [name for name, values in whole.items() if np.isnan(values).any()]
    assert not missing, f"no rank holds all of {missing}"
    return whole, drift
