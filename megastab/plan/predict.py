"""How long a step would take on a cluster: arithmetic over the plan's FLOPs and bytes, not a measurement.

Assumed, and printed beside every prediction:

* products run at ``efficiency`` of the peak, recomputed ones included; the slowest stage sets the pace of all;
* 1F1B: m micro-batches over p stages take m + p - 1 times the slowest stage's micro-batch;
* a ring of k ranks moves (k - 1)/k of an all-gather's or a reduce-scatter's bytes through each link, twice that for an all-reduce; an
  all-to-all sends (k - 1)/k of what it is given; every call costs :data:`LATENCY` a doubling of its ranks;
* ranks fill nodes in order, tensor fastest, then context, then data, then pipeline: a group inside one node has its links, any other the
  network;
* tensor-parallel, context-parallel and pipeline traffic is exposed, and so is what ZeRO 0 to 2 and BF16_Optimizer send at the end of a
  step; ZeRO 2 with ``overlap_comm`` hides its reduction behind backward, ZeRO 3 all it sends but the kept weights behind the products, as
  far as these last.

Not in it: the update itself, data loading, evaluation and checkpoints, copies of offloaded optimizer states, stragglers, contention
between groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megastab.config.config import Config
from megastab.model.counts import flops_per_token
from megastab.plan.cluster import Cluster
from megastab.plan.offload import offloaded
from megastab.plan.parameters import Stage
from megastab.plan.traffic import traffic
from megastab.plan.transfer import Transfer, ranks_of
from megastab.plan.work import stage_flops
from megastab.plan.zero import overlaps, wrapper_kind

LATENCY = 5e-6
"""Seconds; small messages inside a node take a few microseconds a hop."""


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step on the slowest stage."""

    compute: float
    tensor: float
    """Exposed traffic of tensor-parallel groups."""
    context: float
    """Exposed traffic of ranks that share a sequence."""
    pipeline: float
    data: float
    """Exposed traffic of data-parallel groups."""
    bubble: float
    offload: float
    """Waiting for activations that all go out, where the link is slower than forward or backward."""
    flops_per_step: float
    peak: float
    """FLOP/s of all ranks."""

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.compute + self.tensor + self.context + self.pipeline + self.data + self.bubble + self.offload

    @property
    def mfu(self) -> float:
        """The model's FLOPs, recompute not counted, over what the ranks could have done (PaLM, appendix B)."""
        return self.flops_per_step / (self.seconds * self.peak)


def predict(config: Config, cluster: Cluster, stages: Sequence[Stage]) -> Prediction:
    """One step of ``config``, whose layout fills the cluster.

    Raises:
        KeyError: the cluster says no peak for the precision.
    """
    rate = cluster.peak_tflops[config.precision] * 1e12
    slowest = max((_stage(config, cluster, stage, rate * cluster.efficiency) for stage in stages), key=sum)
    compute, tensor, context, pipeline, data, offload = slowest
    bubble = (compute + tensor + context + pipeline + offload) * (config.layout.pipeline - 1) / config.accumulation
    total = flops_per_token(config.megastab.model) * config.tokens_per_step
    return Prediction(compute, tensor, context, pipeline, data, bubble, offload, total, rate * config.layout.world)


def _stage(config: Config, cluster: Cluster, stage: Stage, rate: float) -> tuple[float, ...]:
    forward, again = stage_flops(config, stage)
    compute = config.accumulation * (3 * forward + again) / rate
    spent = {"tensor": 0.0, "context": 0.0, "pipeline": 0.0, "data": 0.0}
    hidden = 0.0
    for transfer in traffic(config, stage):
        lasts = seconds_of(transfer, config, cluster)
        if transfer.group == "data" and _is_hidden(config, transfer):
            hidden += lasts
        else:
            own = "tensor" if transfer.group == "heads" else transfer.group
            spent[own if own in spent else "pipeline"] += lasts
    behind = compute if wrapper_kind(config) == "zero3" else compute * 2 / 3  # of three parts backward has two
    waits = config.accumulation * offloaded(config, stage, cluster).waits
    return compute, spent["tensor"], spent["context"], spent["pipeline"], spent["data"] + max(0.0, hidden - behind), waits


def _is_hidden(config: Config, transfer: Transfer) -> bool:
    return config.zero_stage >= 2 and overlaps(config) and transfer.what in ("gradients", "weights as they are used")


def seconds_of(transfer: Transfer, config: Config, cluster: Cluster) -> float:
    """Of all calls, one after another."""
    ranks = ranks_of(config, transfer.group)
    link = (cluster.intra_gbps if is_inside_node(config, cluster, transfer.group) else cluster.inter_gbps) * 1e9 / 8
    share = (ranks - 1) / ranks
    factor = {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share, "all_to_all": share}.get(transfer.kind, 1.0)
    return transfer.bytes * factor / link + transfer.calls * LATENCY * (ranks - 1).bit_length()


def is_inside_node(config: Config, cluster: Cluster, group: str) -> bool:
    """Whether every group of this kind lies in one node."""
    layout = config.layout
    shared = layout.tensor * layout.context
    spans = {"tensor": layout.tensor, "heads": layout.tensor, "context": shared, "data": shared * layout.data}
    span = spans.get(group, layout.world)
    return cluster.gpus_per_node % span == 0
