"""The contestants that live in a job of ours: the engine as the trainer steps it, and the bare loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from megastab.config.load import load_config
from megastab.data.batches import MicroBatch
from megastab.data.training import open_training_data
from megastab.engine.build import build
from megastab.engine.train_step import Stepper
from megastab.parallel import collectives
from megastab.parallel.grid import Grid
from megastab.report.bench.bare import BareLoop
from megastab.report.bench.cases import BATCH, LEARNING_RATE, SEQ, SIZES, Spec

_NUM_BATCHES = 4  # random batches made beforehand and taken in turn
_TIMED = ("sum_", "max_", "gather_rows", "scatter_rows_sum", "sum_coalesced_", "sum_scalars", "wait")


def random_batches(vocab_size: int, count: int = _NUM_BATCHES, batch: int = BATCH, seq: int = SEQ) -> list[MicroBatch]:
    """Uniform tokens, the same in every process."""
    tokens = torch.randint(0, vocab_size, (count, batch, seq + 1), generator=torch.Generator().manual_seed(0))
    weights, ids = torch.ones(batch, seq), torch.arange(batch)
    return [MicroBatch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), weights, ids, None) for t in tokens]


class Ours:
    """A DeepSpeed engine with its seams, stepped as the trainer steps it."""

    def __init__(self, source: dict[str, Any], tensor: int = 1):
        config = load_config(source, world_size=collectives.world()[1])
        self.config, self.grid = config, Grid.create(tensor)
        self.built = build(config, self.grid)
        self.stepper = Stepper(self.built.engine, config, self.grid)

    def step(self, batch: MicroBatch) -> float:
        """One step; its loss."""
        return self.stepper.train([batch])

    def weights(self) -> dict[str, Tensor]:
        """The fp32 masters by canonical name (one rank, which owns them all)."""
        return {f.part.name: f.master.view(f.part.rows, f.info.width or 1).squeeze(-1) for f in self.built.adapter.fragments()}

    def fetcher(self) -> Callable[[], MicroBatch]:
        """The trainer's own data path."""
        batches = open_training_data(self.config)[1].cut(self.config, self.grid.samples, self.grid.cp).train
        return lambda: batches.next_step()[0]


class Contestants:
    """Those of one process; a step is one of each on the same batch."""

    def __init__(self, spec: Spec):
        self.steps: list[Callable[[MicroBatch], float]] = []
        batches = random_batches(SIZES[spec.size]["vocab_size"], batch=spec.batch)
        self.fetch: Callable[[], MicroBatch] = lambda: batches[self.num_taken % len(batches)]
        self.num_taken = 0
        self.ours = ours = Ours(spec.source(), spec.tensor) if spec.who != "bare" else None
        if ours is not None:
            self.steps.append(ours.step)
            self.fetch = ours.fetcher() if spec.data else self.fetch
        if spec.who not in ("ours", "offload"):
            self.steps.append(_bare_step(spec, ours))
        self.clock = time_collectives()

    def step(self) -> dict[str, Any]:
        """What :class:`megastab.report.bench.jobs.Reply` holds."""
        waited, began = self.clock["seconds"], time.perf_counter()
        batch = self.fetch()
        fetching = time.perf_counter() - began
        seconds, cpu_seconds, losses = zip(*(_timed(step, batch) for step in self.steps), strict=True)
        self.num_taken += 1
        return {
            "seconds": [s + fetching for s in seconds],
            "cpu_seconds": cpu_seconds,
            "losses": losses,
            "communicating": self.clock["seconds"] - waited,
            "fetching": fetching,
        }


def _timed(step: Callable[[MicroBatch], float], batch: MicroBatch) -> tuple[float, float, float]:
    began, cpu_began = time.perf_counter(), time.process_time()
    loss = step(batch)  # a float: the device has finished
    return time.perf_counter() - began, time.process_time() - cpu_began, loss


def _bare_step(spec: Spec, ours: Ours | None) -> Callable[[MicroBatch], float]:
    model = load_config(spec.source(), world_size=1).megastab.model
    device = get_accelerator().current_device_name()
    dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    loop = BareLoop(model, LEARNING_RATE, is_compiled=spec.is_compiled, dtype=dtype, device=device)
    if ours is not None:
        loop.load(ours.weights())
    return lambda batch: loop.step(batch.tokens.to(device), batch.labels.to(device))


def time_collectives() -> dict[str, float]:
    """From here on, time spent inside megastab's collectives is added up in the returned clock.

    An asynchronous one counts while it is started and while it is waited for: what it overlaps with is not lost.
    """
    clock = {"seconds": 0.0}

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                clock["seconds"] += time.perf_counter() - began

        return run

    for name in _TIMED:
        setattr(collectives, name, timed(getattr(collectives, name)))
    return clock
