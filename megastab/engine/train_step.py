"""One step and one evaluation on either engine: micro-batches in, mean loss out.

The loss is a sum over targets. Each micro-batch's weights carry ``accumulation * dp / targets of the step``: DeepSpeed divides by
accumulation and averages over data-parallel ranks, and what is left is the sum over the step's global target count. So masks,
accumulation and data parallelism commute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from megastab.config.config import Config
from megastab.data.batches import MicroBatch
from megastab.model.stages import Payload, Sides
from megastab.parallel import collectives
from megastab.parallel.grid import Grid
from megastab.wrappers.pipeline import running_loss

PIPELINED_EVALUATION = 16  # micro-batches a stage between looks at whether to stop: filling and draining the pipeline costs 1/16


class Stepper:
    """Runs micro-batches through an engine, pipelined or not."""

    def __init__(self, engine: Any, config: Config, grid: Grid):
        self.engine, self.grid = engine, grid
        self._losses: list[Tensor] = []  # of the step's micro-batches on this rank, while it runs
        self._share, self._loss = 1, math.nan
        self.has_documents = config.megastab.data.document_mask
        self.has_dropout = config.megastab.model.dropout > 0.0
        self.sides = Sides(config.megastab, grid.tp, grid.cp)
        self.device = get_accelerator().current_device_name()

    def train(self, batches: Sequence[MicroBatch]) -> float:
        """Forward, backward and update over one step's micro-batches; the mean loss over the step's targets on all ranks."""
        targets = sum(float(batch.weights.sum()) for batch in batches)
        # Only a document mask makes the count depend on the data; it is summed over data-parallel ranks then.
        total = collectives.sum_scalars([targets], self.grid.dp.group)[0] if self.has_documents else targets * self.grid.dp.size
        share = len(batches) * self.grid.dp.size
        scale = share / max(total, 1.0)
        if self.grid.pp.size > 1:
            self.engine.reset_activation_shape()  # evaluation may have sent another shape
            return float(self.engine.train_batch(self._pipeline_input(batches, scale)))
        self._losses, self._share = [], share
        for batch in batches:
            loss = self.engine(*self._arguments(batch, scale))
            self._losses.append(loss.detach())
            self.engine.backward(loss)
            if len(self._losses) == len(batches):
                self._loss = self._mean_loss()  # before the update, which a rule may make depend on it
            self.engine.step()
        return self._loss

    def _mean_loss(self) -> float:
        mine = float(torch.stack(self._losses).double().sum())
        return collectives.sum_scalars([mine], self.grid.dp.group)[0] / self._share

    def loss_at_norm(self) -> float:
        """The step's global loss from inside the norm seam (collective over the job where there are pipeline stages)."""
        if self.grid.pp.size == 1:
            return self._loss
        is_mine = self.grid.pp.rank == self.grid.pp.size - 1 and self.grid.tp.rank == 0
        mine = running_loss(self.engine) if is_mine else 0.0
        return collectives.sum_scalars([mine], collectives.job_group())[0] / self.grid.dp.size

    def _arguments(self, batch: MicroBatch, scale: float = 1.0) -> tuple[Tensor | None, ...]:
        samples = batch.sample_ids.to(self.device) if self.has_dropout else None
        documents = batch.document_ids.to(self.device) if self.has_documents and batch.document_ids is not None else None
        tokens, labels, weights = (x.to(self.device) for x in (batch.tokens, batch.labels, batch.weights * scale))
        return tokens, labels, weights, samples, documents

    def _pipeline_input(self, batches: Iterable[MicroBatch], scale: float = 1.0) -> Iterator[tuple[Payload, tuple[Tensor, Tensor]]]:
        for batch in batches:
            inputs = self.sides.pack(batch.tokens, batch.sample_ids, batch.document_ids)
            yield inputs, (batch.labels, batch.weights * scale)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch], goes_on: Callable[[], bool] = lambda: True) -> float | None:
        """Mean loss over the targets of ``batches`` on all ranks, which hold equally many micro-batches each.

        None where ``goes_on``, called alike on all ranks between micro-batches (between runs of them in a pipeline), said no.
        """
        held = list(batches)
        targets = sum(float(batch.weights.sum()) for batch in held)
        total = collectives.sum_scalars([targets], self.grid.dp.group)[0]
        if not held or not total:
            return math.nan
        together = PIPELINED_EVALUATION * self.grid.pp.size if self.grid.pp.size > 1 else 1
        mine = 0.0
        for first in range(0, len(held), together):
            if not goes_on():
                return None
            mine += self._evaluate_some(held[first : first + together])
        if self.grid.pp.size > 1:
            return mine * self.grid.dp.size / total  # DeepSpeed has averaged over data-parallel ranks
        return collectives.sum_scalars([mine], self.grid.dp.group)[0] / total

    def _evaluate_some(self, held: Sequence[MicroBatch]) -> float:
        """Sum of the losses of micro-batches: this rank's, or in a pipeline the mean over data-parallel ranks."""
        if self.grid.pp.size > 1:
            return self._evaluate_pipeline(held) * len(held)
        self.engine.eval()
        mine = sum(float(self.engine(*self._arguments(batch))) for batch in held)
        self.engine.train()
        return mine

    def _evaluate_pipeline(self, held: Sequence[MicroBatch]) -> float:
        self.engine.reset_activation_shape()
        mean = self.engine.eval_batch(self._pipeline_input(held), num_micro_batches=len(held))
        return float(mean)
