"""What the three policies of recompute would hold and do, beside one another: the choice is between memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from megastab.config.config import Config
from megastab.config.schema import Recompute
from megastab.plan.activations import activations
from megastab.plan.parameters import Stage
from megastab.plan.predict import stage_flops


@dataclass(frozen=True)
class Policy:
    """One of them, on the stage that keeps most."""

    name: Recompute
    per_micro_batch: int
    """Bytes of activations from forward to backward."""
    peak: int
    """Bytes of activations at the worst moment of a step, micro-batches in flight and workspace included."""
    more_compute: float
    """FLOPs of products and attention done again, over those of a step without."""


def policies(config: Config, cut: Sequence[Stage]) -> tuple[Policy, ...]:
    """All three, with the rest of ``config`` as it is."""
    return tuple(_policy(with_recompute(config, name), cut) for name in get_args(Recompute))


def with_recompute(config: Config, name: Recompute) -> Config:
    """``config`` under another policy."""
    parallel = config.megastab.parallel.model_copy(update={"recompute": name})
    return replace(config, megastab=config.megastab.model_copy(update={"parallel": parallel}))


def _policy(config: Config, cut: Sequence[Stage]) -> Policy:
    fullest = max((activations(config, stage) for stage in cut), key=lambda held: held.peak)
    forward, again = (sum(parts) for parts in zip(*(stage_flops(config, stage) for stage in cut), strict=True))
    return Policy(config.megastab.parallel.recompute, fullest.per_micro_batch, fullest.peak, again / (3 * forward))
