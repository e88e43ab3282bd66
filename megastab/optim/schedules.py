"""Learning-rate schedules: a factor of the peak as a function of applied steps. A skipped step does not advance them."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from megastab.config.schema import ScheduleKind


def lr_factor(step: int, kind: ScheduleKind, total_steps: int, warmup_steps: int, min_ratio: float, decay_fraction: float) -> float:
    """Factor of the 0-based ``step``: ``(step + 1) / warmup`` first, then ``kind`` down to ``min_ratio`` at the last step."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    start = warmup_steps if kind != "wsd" else max(warmup_steps, total_steps - round(decay_fraction * total_steps))
    if kind == "constant" or step < start:
        return 1.0
    progress = min(1.0, (step - start + 1) / max(1, total_steps - start))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress
    return min_ratio + (1 - min_ratio) * shape


def build_schedule(
    optimizer: Optimizer,
    kind: ScheduleKind,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    min_ratio: float = 0.1,
    decay_fraction: float = 0.2,
) -> LambdaLR:
    """The schedule over ``optimizer``'s groups, whose ``lr`` is the peak."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, kind, total_steps, warmup_steps, min_ratio, decay_fraction))
