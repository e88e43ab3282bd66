"""The three policies of ``parallel.recompute`` side by side, everything else as the config has it: memory against products done twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from megastab.config.config import Config
from megastab.config.schema import Recompute
from megastab.plan.activations import activations
from megastab.plan.budget import Budget, largest_budget
from megastab.plan.cluster import Cluster
from megastab.plan.parameters import Stage
from megastab.plan.predict import Prediction, predict
from megastab.plan.units import seconds, size, table
from megastab.plan.work import stage_flops

RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)


@dataclass(frozen=True)
class Policy:
    """One of them, on the stage that holds most."""

    recompute: Recompute
    kept: int
    """Bytes of activations of a micro-batch between its forward and its backward."""
    activations: int
    """Bytes at the worst moment of a step."""
    products: float
    """FLOPs of a step over those without recomputation."""


def with_recompute(config: Config, recompute: Recompute) -> Config:
    """The same run under another policy."""
    parallel = config.megastab.parallel.model_copy(update={"recompute": recompute})
    return replace(config, megastab=config.megastab.model_copy(update={"parallel": parallel}))


def policies(config: Config, stages: Sequence[Stage]) -> tuple[Policy, ...]:
    """In the order none, selective, full."""
    return tuple(_policy(with_recompute(config, recompute), stages) for recompute in RECOMPUTES)


def _policy(config: Config, stages: Sequence[Stage]) -> Policy:
    held = [activations(config, stage) for stage in stages]
    work = [stage_flops(config, stage) for stage in stages]
    forward, again = (sum(part) for part in zip(*work, strict=True))
    most = max(held, key=lambda one: one.peak)
    return Policy(config.megastab.parallel.recompute, most.per_micro_batch, most.peak, 1 + again / (3 * forward))


def policy_table(found: Sequence[Policy], chosen: str) -> list[str]:
    """Without a cluster: memory and products."""
    rows = [["", *_heads(chosen)], ["kept of a micro-batch", *(size(one.kept) for one in found)]]
    rows += [["activations, at most", *(size(one.activations) for one in found)]]
    return table([*rows, ["products of a step", *(f"x {one.products:.3f}" for one in found)]])


def on_cluster(config: Config, cluster: Cluster, stages: Sequence[Stage]) -> list[tuple[Recompute, Budget, Prediction]]:
    """Memory of the fullest stage and the time of a step, by policy."""
    configs = {recompute: with_recompute(config, recompute) for recompute in RECOMPUTES}
    return [(name, largest_budget(one, stages, cluster), predict(one, cluster, stages)) for name, one in configs.items()]


def cluster_policy_table(config: Config, cluster: Cluster, stages: Sequence[Stage]) -> list[str]:
    """With a cluster: whether it fits, and how long a step takes."""
    found = on_cluster(config, cluster, stages)
    rows = [["", *_heads(config.megastab.parallel.recompute)], ["memory of a rank", *(size(held.total) for _, held, _ in found)]]
    rows += [["", *("fits" if held.fits else "DOES NOT FIT" for _, held, _ in found)]]
    rows += [["step", *(seconds(time.seconds) for _, _, time in found)]]
    return table([*rows, ["MFU", *(f"{100 * time.mfu:.1f} %" for _, _, time in found)]])


def _heads(chosen: str) -> list[str]:
    return [f"{name} (this)" if name == chosen else name for name in RECOMPUTES]
