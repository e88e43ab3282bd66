"""A rank's memory by category against what a GPU has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megastab.config.config import Config
from megastab.plan.cluster import Cluster
from megastab.plan.offload import offloaded
from megastab.plan.parameters import Stage
from megastab.plan.states import states

RESERVE = 0.08
"""Share of a GPU kept free: context and communication buffers of the libraries (1 to 3 GiB), and the allocator's fragments."""


@dataclass(frozen=True)
class Budget:
    """Bytes of one rank of a stage at the worst moment of a step."""

    categories: dict[str, int]
    available: int
    """What a GPU has, less the reserve."""
    reserve: int

    @property
    def total(self) -> int:
        """All categories."""
        return sum(self.categories.values())

    @property
    def fits(self) -> bool:
        """Whether the total is available."""
        return self.total <= self.available

    @property
    def largest(self) -> str:
        """The category that takes most."""
        return max(self.categories, key=lambda name: self.categories[name])


def budget(config: Config, stage: Stage, cluster: Cluster) -> Budget:
    """One rank of ``stage``. Activations and buffers live in backward, the step's workspace after it: the larger of the two counts."""
    held, kept = states(config, stage), offloaded(config, stage, cluster).activations
    # What the backward of the head adds is the logits' gradient and the loss's chunk; elsewhere it is a recomputed block.
    head = kept.workspace if stage.has_head else 0
    backward = {
        "activations": kept.peak - head,
        "logits and loss": head,
        "bucket buffers": held.buckets,
        "gathered weights": held.gathered,
    }
    if held.step_workspace > sum(backward.values()):
        backward = {"step workspace": held.step_workspace}
    categories = {
        "weights": held.weights,
        "gradients": held.gradients,
        "fp32 masters": held.masters,
        "optimizer moments": held.moments,
        **backward,
    }
    memory = int(cluster.memory_gb * 2**30)
    reserve = int(memory * RESERVE)
    return Budget(categories, memory - reserve, reserve)


def largest_budget(config: Config, stages: Sequence[Stage], cluster: Cluster) -> Budget:
    """Of the fullest stage."""
    return max((budget(config, stage, cluster) for stage in stages), key=lambda one: one.total)
