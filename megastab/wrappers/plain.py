"""fp32 at ZeRO stage 0: DeepSpeed wraps nothing, so the norm, the clip and the non-finite skip are ours.

DeepSpeed's own clip of this path counts one pipeline stage only, counts tied weights twice, reports no norm, and lets a NaN through.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megastab.parallel import collectives
from megastab.parallel.grid import Grid
from megastab.parallel.ownership import counts_here
from megastab.wrappers.adapter import Adapter, Fragment, block_norms, skip_lone_reduction, split_parts


class PlainAdapter(Adapter):
    """A bare torch optimizer under a DeepSpeed engine."""

    is_partitioned = False

    def __init__(self, engine: object, grid: Grid):
        super().__init__(engine)
        self.grid = grid
        skip_lone_reduction(self.engine)
        self.optimizer._global_grad_norm, self.optimizer.overflow = 0.0, False
        # The engine clips only where gradient_clipping() > 0: claim so, and do the whole decision where it clips.
        self.engine.gradient_clipping = lambda: 1.0
        self.engine.clip_fp32_gradients = self._clip
        update = self.optimizer.step

        @functools.wraps(update)  # keeps the mark by which torch's schedulers know a step they watch
        def step(*args: object, **kwargs: object) -> None:
            if not self.optimizer.overflow:
                update(*args, **kwargs)
                self.updated()

        self.optimizer.step = step

    def fragments(self) -> Iterator[Fragment]:
        """Whole parameters: they are their own masters."""
        for parameter in self.parameters():
            yield from split_parts(parameter, self.info(parameter), 0, parameter.data.view(-1), parameter)

    def stepped(self) -> list[Tensor]:
        """The parameters themselves."""
        return list(self.parameters())

    def publish(self) -> None:
        """Nothing to do: the masters are the weights."""

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The accumulated ``.grad``."""
        return parameter.grad

    def reduced(self, parameter: nn.Parameter) -> tuple[int, Tensor] | None:
        """The whole ``.grad``, equal on all data-parallel ranks."""
        return None if parameter.grad is None else (0, parameter.grad.view(-1))

    def _clip(self) -> None:
        self.begin_step()
        norm = self._global_norm()
        if not norm < math.inf:  # NaN compares false; every wrapper tells a bad step as inf
            norm = math.inf
        self.observe(norm)
        self.optimizer._global_grad_norm = norm
        self.optimizer.overflow = self.skipping or norm == math.inf
        scale = min(1.0, self.limit / (norm + 1e-6)) if self.limit > 0 else 1.0
        self.end_step()
        if not self.optimizer.overflow and scale < 1.0:
            torch._foreach_mul_([g for _, g in self.gradients()], scale)

    def _global_norm(self) -> float:
        counted = [g for p, g in self.gradients() if counts_here(p, self.grid.tp.rank)]
        squares = torch.stack(torch._foreach_norm(block_norms(counted))).double().square().sum().item() if counted else 0.0
        # Sum over (tp x pp): ownership counts each row once; data-parallel ranks already hold equal gradients.
        return float(collectives.sum_scalars([squares], self.grid.model.group)[0] ** 0.5)
