"""Faults planted in a run, and the run they are planted in: on a rank, before anything is built."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BadSamples:
    """Every step that takes one of ``samples`` goes wrong."""

    samples: range
    kind: str
    """``nan``: an odd rank puts out NaN in the second block; ``huge``: the step's loss and gradients are 1000 times too large."""
    dies_after_rewind: bool = False
    saves_before: bool = False
    """Before it dies, at the first step after the rewind."""

    def plant(self) -> None:
        from megastab.engine.train_step import Stepper
        from megastab.engine.trainer import Trainer
        from megastab.model.mlp import MLP
        from megastab.stability import loss_spikes

        loss_spikes.FEWEST = 2  # judge losses from the third step on
        take_step, arguments, pipeline_input, forward = Trainer.take_step, Stepper._arguments, Stepper._pipeline_input, MLP.forward
        now = {"is_bad": False, "furthest": 0}

        def step(trainer: Trainer) -> Any:
            if self.dies_after_rewind and trainer.step < now["furthest"]:
                if self.saves_before:
                    trainer.save()
                os._exit(9)
            train = trainer.data.train
            now["is_bad"] = any(int(sample) in self.samples for sample in train.skips.take(train.consumed, train.global_batch))
            try:
                return take_step(trainer)
            finally:
                now["is_bad"], now["furthest"] = False, max(now["furthest"], trainer.step)

        def factor() -> float:
            return 1000.0 if now["is_bad"] and self.kind == "huge" else 1.0

        def spoilt(mlp: MLP, *args: Any) -> Any:
            out = forward(mlp, *args)
            is_second = "layers.1" in next(mlp.parameters()).megastab_info.name  # type: ignore[attr-defined]
            is_hit = now["is_bad"] and self.kind == "nan" and is_second and int(os.environ["RANK"]) % 2
            return out * float("nan") if is_hit else out

        Trainer.take_step, MLP.forward = step, spoilt  # type: ignore[method-assign]
        Stepper._arguments = lambda s, batch, scale=1.0: arguments(s, batch, scale * factor())  # type: ignore[method-assign]
        Stepper._pipeline_input = lambda s, batches, scale=1.0: pipeline_input(s, batches, scale * factor())  # type: ignore[method-assign]


@dataclass(frozen=True)
class AtMoment:
    """Rank 1 does something to itself once, when the run enters ``method`` of the Trainer after ``step`` steps."""

    method: str
    step: int
    does: str
    """``kill``, ``stop``, ``sleep``, or the name of a signal that asks for an orderly end."""
    seconds: float = 0.0
    """This much later, by another thread."""
    everyone: bool = False
    """Every rank does."""

    def plant(self) -> None:
        from megastab.engine import heartbeat
        from megastab.engine.trainer import Trainer

        heartbeat.WRITE_SECONDS = 0.0  # steps here are shorter than the second that passes between two
        inner = getattr(Trainer, self.method)
        done = []

        def entered(trainer: Trainer) -> Any:
            if trainer.step == self.step and (self.everyone or os.environ["RANK"] == "1") and not done:
                done.append(True)
                self._act()
            return inner(trainer)

        setattr(Trainer, self.method, entered)

    def _act(self) -> None:
        if self.does == "sleep":
            fetch_from_a_dead_disk()
        numbers = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
        number = numbers.get(self.does) or signal.Signals[self.does]
        if self.seconds:
            threading.Thread(target=_later, args=(self.seconds, number), daemon=True).start()
        else:
            os.kill(os.getpid(), number)


def fetch_from_a_dead_disk() -> None:
    time.sleep(1000)


def _later(seconds: float, number: int) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), number)


def pretrain(config: dict[str, Any], fault: BadSamples | AtMoment | None = None) -> int:
    """On a rank: what ``pretrain.py`` does with a config."""
    from megastab.config.load import load_config
    from megastab.pretrain import train

    if fault is not None:
        fault.plant()
    return train(load_config(config))


def train_synthetic(config: dict[str, Any], fault: BadSamples) -> dict[str, Any]:
    """On a rank: a trainer's run on synthetic samples; what the rank ends with."""
    from megastab.config.load import load_config
    from megastab.data.batches import Batches
    from megastab.data.training import TrainingData
    from megastab.engine.trainer import Trainer
    from megastab.parallel.grid import Grid
    from tests import jobs
    from tests.layouts import SyntheticSource

    fault.plant()
    loaded = load_config(config)
    parallel = loaded.megastab.parallel
    grid = Grid.create(parallel.tensor, parallel.pipeline, parallel.sequence, loaded.megastab.model.num_kv_heads, parallel.context)
    sizes = {"micro_batch": loaded.micro_batch, "accumulation": loaded.accumulation}
    sizes |= {"dp_rank": grid.samples.rank, "dp_size": grid.samples.size, "cp_rank": grid.cp.rank, "cp_size": grid.cp.size}
    batches = Batches(SyntheticSource(), document_mask=loaded.megastab.data.document_mask, **sizes)
    trainer = Trainer(loaded, grid, TrainingData(batches))
    trainer.announce()
    trainer.resume()
    trainer.train()
    job = jobs.Job(loaded, grid, trainer.built, trainer.stepper, batches)
    return {"masters": jobs.masters(job), "consumed": batches.consumed}
